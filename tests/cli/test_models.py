"`llmopt models` lists and clears, and loads nothing."

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmopt.cli import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path / "cache"))


def test_a_table_and_json(capsys):
    assert main(["models"]) == 0
    table = capsys.readouterr().out
    assert "llmopt-tiny" in table and "smollm2" in table and max(map(len, table.splitlines())) <= 100
    assert main(["models", "--json"]) == 0
    assert [m["name"] for m in json.loads(capsys.readouterr().out)][:2] == ["llmopt-tiny", "smollm2"]


def test_clear_says_how_many_bytes(tmp_path, capsys):
    folder = tmp_path / "cache" / "gguf" / "abc-1"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(1234))
    folder.with_name(f"{folder.name}.lock").touch()
    assert main(["models", "--clear"]) == 0
    assert "1,234 bytes" in capsys.readouterr().out and not folder.exists()


def test_no_torch_is_loaded():
    code = "import sys; from llmopt.cli import main; main(['models']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0
