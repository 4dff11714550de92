"Processes that begin as a copy of one that has loaded the libraries already: notebooks, and the `llmopt` command."

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
CONTEXT = multiprocessing.get_context(METHOD)
if METHOD == "forkserver":
    CONTEXT.set_forkserver_preload(["warm"])


class Process(CONTEXT.Process):
    "A process that begins as a copy of the fork server, which has loaded `warm.py`."

    def start(self):
        "Begin; the first one starts the fork server, which looks for modules where this variable says."
        paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(paths)):
            super().start()


def begin(root):
    "Leave nothing of the fork server to be seen: the package is that of `root`, and may use its threads."
    gc.freeze()  # what the libraries hold is not searched for garbage: that would copy the pages it lies on
    package = sys.modules.get("llmopt")
    if package and not Path(package.__file__).is_relative_to(root):
        for name in [n for n in sys.modules if n.partition(".")[0] == "llmopt"]:
            del sys.modules[name]
    if threads := sys.modules.get("llmopt.core.threads"):
        threads._omp = threads._openmp()  # private: given up in every fork, but the fork server has never had threads


def command_here(args, cwd, env, streams):
    "The command `llmopt ARGS` in this process; `streams` is a folder with files for its input, output and errors."
    for number, (name, mode) in enumerate(zip(("in", "out", "err"), ("r", "w", "w"), strict=True)):
        with open(Path(streams, name), mode) as f:
            os.dup2(f.fileno(), number)
    sys.stdin, sys.stdout, sys.stderr = (
        open(n, mode, buffering=1, encoding="utf-8", closefd=False) for n, mode in enumerate("rww")
    )
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background is told to ignore it
    os.environ.update(env)
    os.chdir(cwd)
    begin(ROOT)
    from llmopt.cli import main

    sys.exit(main(args))


def start_command(*args, cwd, streams, env=(), input=""):
    "Begin the command `llmopt ARGS` in folder `cwd`; what it prints goes to the files `out` and `err` in `streams`."
    Path(streams, "in").write_text(input, encoding="utf-8")
    process = Process(target=command_here, args=([*map(str, args)], str(cwd), dict(env), str(streams)))
    process.start()
    return process


def run_command(*args, cwd, timeout=300, **kw) -> subprocess.CompletedProcess:
    "Run the command `llmopt ARGS` in folder `cwd`, in a process of its own."
    with tempfile.TemporaryDirectory() as streams:
        process = start_command(*args, cwd=cwd, streams=streams, **kw)
        process.join(timeout)
        process.kill()  # if it still runs: its exit code says so
        process.join()
        out, err = (Path(streams, name).read_text(encoding="utf-8") for name in ("out", "err"))
    return subprocess.CompletedProcess(args, process.exitcode, out, err)
