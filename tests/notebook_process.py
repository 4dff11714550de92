"Runs one notebook in a process of its own."

import ast
import inspect
import json
import os
import re
import sys
import traceback
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path

from forked import Process, begin

SWALLOWED = []  # what drawing and widgets have raised in this process: IPython prints it, and lets the cell pass
CALLS = []  # (name, arguments) of calls of the functions that widgets of this page show
PLAIN = int, float, str, bool, tuple, list  # compared by value; all else is the same only if it is one object


def lay_out(figure, *args, **kw):
    "Draw `figure` without making a picture, which no one looks at; keep what that raises."
    from llmopt.visualization.style import Chart, drawing

    try:
        with drawing() if isinstance(figure, Chart) else nullcontext():
            figure.draw_without_rendering()
    except Exception:
        SWALLOWED.append(traceback.format_exc())


class Noting(ast.NodeTransformer):
    "Functions of a page begin with a line that notes what they are called with, if a widget shows them."

    def __init__(self, path):
        cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
        self.shown = {name for c in cells for name in re.findall(r"\binteract\(\s*(\w+)", "".join(c["source"]))}

    def visit_Module(self, tree):
        for f in tree.body:
            if isinstance(f, ast.FunctionDef) and f.name in self.shown:
                at = 0 if ast.get_docstring(f, clean=False) is None else 1
                f.body[at:at] = ast.parse(f"__calls__.append(({f.name!r}, dict(locals())))").body
                ast.fix_missing_locations(f)
        return tree


def same(a, b):
    return a is b or (isinstance(a, PLAIN) and type(a) is type(b) and a == b)


def called_before(f, given):
    "Whether the page has called its function `f` with what `given` (name -> value) makes its arguments."
    bound = inspect.signature(f).bind(**given)
    bound.apply_defaults()
    now = bound.arguments
    return any(
        name == getattr(f, "__name__", None) and args.keys() == now.keys() and all(same(now[k], args[k]) for k in args)
        for name, args in CALLS
    )


def plainly():
    """Make nbdev run notebooks without keeping outputs: figures are laid out, and no picture is made. A widget does not
    call the function that it shows where the page has just called it with the same."""
    import execnb.shell
    import IPython.core.pylabtools
    from ipywidgets import interactive

    execnb.shell._out_nb = lambda *args: []  # private: it draws what a cell ends with a second time
    IPython.core.pylabtools.print_figure = lay_out
    begin_shell, call = execnb.shell.CaptureShell.__init__, interactive.update

    def begin_noting(shell, path, *args, **kw):
        begin_shell(shell, path, *args, **kw)
        shell.user_ns["__calls__"] = CALLS
        shell.ast_transformers.append(Noting(path))

    def update(widget, *args):
        f, given = widget.f, {w._kwarg: w.get_interact_value() for w in widget.kwargs_widgets}

        def watched(**kw):
            try:
                return f(**kw)
            except Exception:
                SWALLOWED.append(traceback.format_exc())
                raise

        if not called_before(f, given):
            widget.f = watched
            call(widget, *args)
            widget.f = f

    execnb.shell.CaptureShell.__init__, interactive.update = begin_noting, update


def run_here(path, root, flags, log):
    "Run the notebook `path` here, what it prints goes to the file `log`; exit code 1 if anything in it fails."
    os.chdir(root)
    sys.path.insert(0, root)
    from nbdev.test import test_nb

    plainly()
    begin(root)
    with open(log, "w", encoding="utf-8") as f, redirect_stdout(f), redirect_stderr(f):
        passed, _ = test_nb(Path(path), skip_flags=flags, basepath=root)
        print(*SWALLOWED, sep="\n")
    os._exit(not passed or bool(SWALLOWED))


def run_notebook(path, root, flags, log):
    "Run the notebook `path` in a process of its own: its exit code, and what it printed."
    process = Process(target=run_here, args=(str(path), str(root), flags, str(log)))
    process.start()
    process.join()
    return process.exitcode, log.read_text(encoding="utf-8") if log.exists() else ""
