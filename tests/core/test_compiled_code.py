"Compiled code works where nothing can be kept on disk, and says so once."

import os
import shutil
import sys
import warnings

import pytest
from forked import Process, begin

from helpers import ROOT

numba = pytest.importorskip("numba", reason="numba is not installed: pip install numba")

from llmopt import errors  # noqa: E402
from llmopt.core.compilation import compiled, compiled_callback  # noqa: E402

SOURCE = "def twice(x):\n    return 2 * x\n"


@pytest.fixture
def function(tmp_path, monkeypatch):
    "A function in a file of its own, whose compiled code goes to `tmp_path / 'kept'`, and no warning said yet."
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "kept"))
    monkeypatch.setattr(errors, "_said", set())  # private: a warning that was said before would not come again
    (tmp_path / "twice.py").write_text(SOURCE)
    space = {"__name__": __name__}
    exec(compile(SOURCE, str(tmp_path / "twice.py"), "exec"), space)
    return space["twice"]


def call(function):
    "Two calls of a freshly compiled function with two types, and the warnings they give."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        f = compiled(function)
        assert (f(2), f(2.5)) == (4, 5.0)
    return [str(w.message) for w in said]


def test_code_is_kept_and_read_again(function, tmp_path):
    assert call(function) == []
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "kept").rglob("*.nbc")}
    assert len(files) == 2 and call(function) == []
    assert {p: p.stat().st_mtime_ns for p in files} == files


def test_code_for_callers_in_c_is_kept_too(function):
    "The second time it is read, not compiled."
    made = [compiled_callback(numba.int64(numba.int64))(function) for _ in range(2)]
    assert [f.ctypes(4) for f in made] == [8, 8]
    assert [f.cache_hits for f in made] == [0, 1]


BY_NAME = "def caller(x):\n    return helper(x) + 1\n"
IN_A_CLOSURE = """
def make(held):
    def caller(x):
        return held(x) + 1
    return caller
caller = make(helper)
"""


def added(path, factor, source):
    "A compiled function of another file, which multiplies, and one that calls it and adds one."
    spaces = {}
    for name, text in dict(helper=f"def helper(x):\n    return {factor} * x\n", caller=source).items():
        (path / f"{name}.py").write_text(text)
        exec(compile(text, str(path / f"{name}.py"), "exec"), spaces)
        spaces[name] = compiled(spaces[name])
    return spaces["caller"]


@pytest.mark.parametrize("source", [BY_NAME, IN_A_CLOSURE])
def test_code_of_another_file_is_part_of_it(function, tmp_path, source):
    "The caller's own file is the same, but what it calls is not; where that is the same too, the code is read."
    found = []
    for factor in (2, 3, 3):
        f = added(tmp_path, factor, source)
        found.append((f(5), sum(f.stats.cache_hits.values())))
    assert found == [(11, 0), (16, 0), (16, 1)]


@pytest.mark.parametrize("damage", ["index cut", "index is a folder", "code cut"])
def test_damaged_files_are_not_used(function, tmp_path, damage):
    call(function)
    for path in (tmp_path / "kept").rglob("*.nbc" if damage == "code cut" else "*.nbi"):
        path.unlink()
        path.mkdir() if damage == "index is a folder" else path.write_bytes(b"\x80")
    (message,) = call(function)
    assert "NUMBA_CACHE_DIR" in message


def test_a_full_disk(function, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    (message,) = call(function)
    assert "NUMBA_CACHE_DIR" in message


def product_of(site, log):
    "A sparse product by the package in the folder `site`, with no place for compiled code; what it says goes to `log`."
    nowhere = os.path.join(os.devnull, "cache")
    os.environ.update(NUMBA_CACHE_DIR=nowhere, XDG_CACHE_HOME=nowhere, HOME=os.devnull)
    numba.config.reload_config()
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(site))
    begin(site)
    sys.stdout = sys.stderr = log.open("w", buffering=1)
    import torch

    from llmopt.larosa.axpy import axpy_product
    from llmopt.larosa.low_bits import pack_rows
    from llmopt.larosa.selection import topk_channels

    x, rows = torch.tensor([[1.0, -3.0, 2.0, 3.0]]), pack_rows(torch.ones(64, 4), 32)
    kept = topk_channels(x, 2)
    print(axpy_product.__code__.co_filename, kept.tolist(), axpy_product(rows, kept, x)[0, 0].item())


def test_installed_where_nobody_may_write(tmp_path):
    "A copy of the package whose caches cannot exist computes the same; a file in their place stops root, too."
    site, log = tmp_path / "site", tmp_path / "log"
    shutil.copytree(ROOT / "llmopt", site / "llmopt", ignore=shutil.ignore_patterns("__pycache__", "assets"))
    (site / "llmopt" / "larosa" / "__pycache__").write_text("")
    for folder, _, _ in os.walk(site):
        os.chmod(folder, 0o555)
    process = Process(target=product_of, args=(site, log))
    process.start()
    process.join(300)
    for folder, _, _ in os.walk(site):
        os.chmod(folder, 0o755)
    said = log.read_text()
    assert process.exitcode == 0, said
    assert said.count("NUMBA_CACHE_DIR") == 1, said
    assert f"{site}/llmopt/larosa/axpy.py [[1, 3]] 0.0" in said, said
