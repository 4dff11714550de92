"Every notebook runs, and the tree is what the notebooks export."

import json
import subprocess
import sys
from pathlib import Path

import pytest
from notebook_process import run_notebook

doclinks = pytest.importorskip("nbdev.doclinks", reason='needs the development tools: pip install -e ".[dev]"')
ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(Path(p).resolve().relative_to(ROOT).as_posix() for p in doclinks.nbglob(ROOT / "nbs"))


def run(*args):
    "Run Python at the root of the project, and show what it said if it failed"
    done = subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


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


def test_the_tree_equals_a_clean_export():
    run(".ci/nb.py", "check")
