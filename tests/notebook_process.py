"Runs one notebook in a process of its own."

import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

from forked import CONTEXT, begin


def plainly():
    "Make nbdev run notebooks without keeping outputs: figures are drawn once, at the usual resolution."
    import execnb.shell
    import nbdev.test

    execnb.shell._out_nb = lambda *args: []  # private: it draws what a cell ends with a second time
    nbdev.test.CaptureShell = partial(execnb.shell.CaptureShell, mpl_format="png")  # not "retina", four times the dots


def run_here(path, root, flags, log):
    "Run the notebook `path` in this process, what it prints goes to the file `log`; exit code 1 if a cell fails."
    os.chdir(root)
    sys.path.insert(0, root)
    from nbdev.test import test_nb

    plainly()
    begin(root)
    with open(log, "w", encoding="utf-8") as f, redirect_stdout(f), redirect_stderr(f):
        passed, _ = test_nb(Path(path), skip_flags=flags, basepath=root)
    os._exit(not passed)


def run_notebook(path, root, flags, log):
    "Run the notebook `path` in a process of its own: its exit code, and what it printed."
    process = CONTEXT.Process(target=run_here, args=(str(path), str(root), flags, str(log)))
    process.start()
    process.join()
    return process.exitcode, log.read_text(encoding="utf-8") if log.exists() else ""
