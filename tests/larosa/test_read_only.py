"Where compiled code cannot be kept, as in a read-only installation, the sparse products are compiled anew."

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import llmopt

PROGRAM = """
import torch
from llmopt.larosa import SparseLinear, masked_linear, topk_channels
w, x = torch.randn(64, 32), torch.randn(1, 32)
kept = topk_channels(x, 9)
with torch.no_grad():
    torch.testing.assert_close(SparseLinear(w).sparse(x, kept), masked_linear(x, w, kept))
print("equal")
"""


@pytest.mark.skipif(find_spec("numba") is None, reason="numba compiles")
def test_no_folder_for_compiled_code(tmp_path):
    "Files stand where the folders of caches would be made, so that not even root can."
    package = tmp_path / "llmopt"
    shutil.copytree(Path(llmopt.__file__).parent, package, ignore=shutil.ignore_patterns("assets", "__pycache__"))
    for folder in [package, *(p for p in package.rglob("*") if p.is_dir())]:
        (folder / "__pycache__").touch()
    env = os.environ | dict(
        PYTHONPATH=str(tmp_path), PYTHONDONTWRITEBYTECODE="1", XDG_CACHE_HOME="/dev/null", HOME="/dev/null"
    )
    env.pop("NUMBA_CACHE_DIR", None)
    r = subprocess.run([sys.executable, "-c", PROGRAM], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert r.stdout == "equal\n", r.stderr
