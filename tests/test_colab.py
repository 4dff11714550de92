"The copies of the notebooks for Colab, and the badges that lead to them."

import importlib.util
from pathlib import Path

import pytest

nbio = pytest.importorskip("execnb.nbio", reason='needs the development tools: pip install -e ".[dev]"')
CI = Path(__file__).resolve().parent.parent / ".ci"


@pytest.fixture
def colab(monkeypatch):
    "The script, in the root of the project."
    monkeypatch.chdir(CI.parent)
    spec = importlib.util.spec_from_file_location("colab", CI / "colab.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_copy_brings_the_package_to_its_own_folder(colab):
    "So that `../../data` means the same there; nothing else of the page changes."
    page = Path("nbs/explore/your_first_chatbot.ipynb")
    title, setup, *rest = colab.for_colab(page).cells
    assert title.source.startswith("# ") and setup.cell_type == "code"
    assert "github.com/llmopt/llmopt llmopt" in setup.source and setup.source.endswith("%cd llmopt/nbs/explore")
    assert [c.source for c in [title, *rest]] == [c.source for c in nbio.read_nb(page).cells]


def test_a_badge_leads_to_the_copy(colab):
    assert "/llmopt/llmopt/blob/colab/nbs/index.ipynb)" in colab.badge("nbs/index.ipynb")
