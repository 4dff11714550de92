"A notebook that fails is seen to fail, and says where."

import json
from pathlib import Path

import pytest

pytest.importorskip("nbdev.test", reason='needs the development tools: pip install -e ".[dev]"')
from notebook_process import run_notebook  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def run(source, folder):
    "Run a notebook of one cell: its exit code, and what it printed."
    cell = dict(cell_type="code", execution_count=None, id="a", metadata={}, outputs=[], source=source)
    kernel = dict(kernelspec=dict(display_name="python3", language="python", name="python3"))
    path = folder / "bad.ipynb"
    path.write_text(json.dumps(dict(cells=[cell], metadata=kernel, nbformat=4, nbformat_minor=5)))
    return run_notebook(path, ROOT, [], folder / "log.txt")


def test_a_failing_cell_is_an_exit_code_and_a_message(tmp_path):
    code, said = run("print(1)\nnobody_knows", tmp_path)
    assert code == 1 and "nobody_knows" in said


@pytest.mark.parametrize("ends_with", ["", "\nplt.gcf()"])
def test_a_figure_that_cannot_be_drawn_fails(tmp_path, ends_with):
    "Whether a cell leaves it open or ends with it."
    code, said = run("import matplotlib.pyplot as plt\n_ = plt.title('$\\\\frac$')" + ends_with, tmp_path)
    assert code == 1 and "ParseSyntaxException" in said


def test_widgets_call_what_the_page_has_not(tmp_path):
    "A function that a widget shows is called again only with other arguments; what it raises then fails the page."
    page = """
from ipywidgets import IntSlider, fixed, interact
called, table = [], {}
def shown(x=1, t=table):
    "Notes what it is called with."
    called.append(x)
    assert x < 3
shown()
interact(shown, x=IntSlider(1, 0, 9), t=fixed(table))
interact(shown, x=IntSlider(2, 0, 9), t=fixed(table))
interact(shown, x=IntSlider(2, 0, 9), t=fixed({}))
assert called == [1, 2, 2], called
"""
    code, said = run(page, tmp_path)
    assert code == 0, said
    code, said = run(page + "interact(shown, x=IntSlider(5, 0, 9), t=fixed({}))", tmp_path)
    assert code == 1 and "x < 3" in said
