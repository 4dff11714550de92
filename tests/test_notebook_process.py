"A notebook that fails is seen to fail, and says where."

import json
from pathlib import Path

import pytest

pytest.importorskip("nbdev.test", reason='needs the development tools: pip install -e ".[dev]"')
from notebook_process import run_notebook  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def test_a_failing_cell_is_an_exit_code_and_a_message(tmp_path):
    cell = dict(
        cell_type="code", execution_count=None, id="a", metadata={}, outputs=[], source="print(1)\nnobody_knows"
    )
    kernel = dict(kernelspec=dict(display_name="python3", language="python", name="python3"))
    path = tmp_path / "bad.ipynb"
    path.write_text(json.dumps(dict(cells=[cell], metadata=kernel, nbformat=4, nbformat_minor=5)))
    code, said = run_notebook(path, ROOT, [], tmp_path / "log.txt")
    assert code == 1 and "nobody_knows" in said
