"Every notebook runs. That the tree is what they export is seen by `python .ci/nb.py check`."

import json
from pathlib import Path

import pytest
from notebook_process import run_notebook

doclinks = pytest.importorskip("nbdev.doclinks", reason='needs the development tools: pip install -e ".[dev]"')
ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(Path(p).resolve().relative_to(ROOT).as_posix() for p in doclinks.nbglob(ROOT / "nbs"))


@pytest.fixture
def flags(request):
    "Directives that keep a cell from running: hub and slow unless pytest was told so; test cells run as exported"
    on = {mark for mark in ("slow", "hub") if request.config.getoption(mark)}
    return ["test", *(f for f in doclinks.get_config(path=ROOT).tst_flags.split() if f not in on)]


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_notebook_runs_in_a_process_of_its_own(path, flags, tmp_path):
    code, said = run_notebook(ROOT / path, ROOT, flags, tmp_path / "log.txt")
    assert code == 0, said


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_no_widget_is_stored(path):
    nb = json.loads((ROOT / path).read_text(encoding="utf-8"))
    kept = [nb["metadata"], *(cell.get("outputs") for cell in nb["cells"])]
    assert "jupyter.widget" not in json.dumps(kept)
