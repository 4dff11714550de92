"Runs one notebook in a process of its own."

import os
import sys
import traceback
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path

from forked import Process, begin

UNDRAWN = []  # what drawing has raised in this process: IPython prints it, and lets the cell pass


def lay_out(figure, *args, **kw):
    "Draw `figure` without making a picture, which no one looks at; keep what that raises."
    from llmopt.visualization.style import Chart, drawing

    try:
        with drawing() if isinstance(figure, Chart) else nullcontext():
            figure.draw_without_rendering()
    except Exception:
        UNDRAWN.append(traceback.format_exc())


def plainly():
    "Make nbdev run notebooks without keeping outputs: figures are laid out, and no picture is made."
    import execnb.shell
    import IPython.core.pylabtools

    execnb.shell._out_nb = lambda *args: []  # private: it draws what a cell ends with a second time
    IPython.core.pylabtools.print_figure = lay_out


def run_here(path, root, flags, log):
    "Run the notebook `path` here, what it prints goes to the file `log`; exit code 1 if a cell or a figure fails."
    os.chdir(root)
    sys.path.insert(0, root)
    from nbdev.test import test_nb

    plainly()
    begin(root)
    with open(log, "w", encoding="utf-8") as f, redirect_stdout(f), redirect_stderr(f):
        passed, _ = test_nb(Path(path), skip_flags=flags, basepath=root)
        print(*UNDRAWN, sep="\n")
    os._exit(not passed or bool(UNDRAWN))


def run_notebook(path, root, flags, log):
    "Run the notebook `path` in a process of its own: its exit code, and what it printed."
    process = Process(target=run_here, args=(str(path), str(root), flags, str(log)))
    process.start()
    process.join()
    return process.exitcode, log.read_text(encoding="utf-8") if log.exists() else ""
