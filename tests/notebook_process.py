"Runs one notebook in a process of its own, which begins as a copy of one that has loaded the libraries already."

import gc
import multiprocessing
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

LIBRARIES = [  # what most notebooks import sooner or later, this one last; none of it starts a thread
    "torch",
    "transformers.generation.utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "numba",
    "scipy.stats",
    "pydantic.json_schema",
    "gguf",
    "platformdirs",
    "rouge_score.rouge_scorer",
    "pandas",
    "matplotlib.pyplot",
    "seaborn",
    "ipywidgets",
    "nbdev.test",
    "llmopt.cli",
    "llmopt.benchmark.suites",
    "llmopt.evaluation.comparison",
    "llmopt.visualization.charts",
]
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
CONTEXT = multiprocessing.get_context(METHOD)
if METHOD == "forkserver":
    CONTEXT.set_forkserver_preload(LIBRARIES)


def plainly():
    "Make nbdev run notebooks without keeping outputs: figures are drawn once, at the usual resolution."
    import execnb.shell
    import nbdev.test

    execnb.shell._out_nb = lambda *args: []  # private: it draws what a cell ends with a second time
    nbdev.test.CaptureShell = partial(execnb.shell.CaptureShell, mpl_format="png")  # not "retina", four times the dots


def as_if_new(root):
    "Leave nothing of the fork server to be seen: the package is that of `root`, and may use its threads."
    package = sys.modules.get("llmopt")
    if package and not Path(package.__file__).is_relative_to(root):
        for name in [n for n in sys.modules if n.partition(".")[0] == "llmopt"]:
            del sys.modules[name]
    if axpy := sys.modules.get("llmopt.larosa.axpy"):
        axpy._omp = axpy._openmp()  # private: given up in every fork, but the fork server has never had threads


def run_here(path, root, flags, log):
    "Run the notebook `path` in this process, what it prints goes to the file `log`; exit code 1 if a cell fails."
    gc.freeze()  # what the libraries hold is never searched for garbage: that copies the pages it lies on
    os.chdir(root)
    sys.path.insert(0, root)
    from nbdev.test import test_nb

    plainly()
    as_if_new(root)
    with open(log, "w", encoding="utf-8") as f, redirect_stdout(f), redirect_stderr(f):
        passed, _ = test_nb(Path(path), skip_flags=flags, basepath=root)
    os._exit(not passed)


def run_notebook(path, root, flags, log):
    "Run the notebook `path` in a process of its own: its exit code, and what it printed."
    process = CONTEXT.Process(target=run_here, args=(str(path), str(root), flags, str(log)))
    process.start()
    process.join()
    return process.exitcode, log.read_text(encoding="utf-8") if log.exists() else ""
