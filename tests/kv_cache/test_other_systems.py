"Systems without /proc, madvise or fork: answers are the same, and what cannot be measured is None, with a reason."

import builtins
import mmap
import subprocess
import sys
import textwrap

import pytest
import torch

from helpers import random_ids, small_model
from llmopt.kv_cache import HybridKVCacheOptimizer, SlabCache, backends, memory
from llmopt.kv_cache.memory import PagedRows
from llmopt.kv_cache.residency import anonymous_bytes, residency_unknown, tensor_resident
from llmopt.kv_cache.shape import cache_shape


def hide_proc(monkeypatch, *names):
    "Files of /proc (all, or those that end in one of `names`) are not there."
    real, names = builtins.open, names or ("",)

    def hidden(path, *args, **kw):
        if str(path).startswith("/proc") and str(path).endswith(names):
            raise FileNotFoundError(2, "No such file or directory", path)
        return real(path, *args, **kw)

    monkeypatch.setattr(builtins, "open", hidden)


@pytest.fixture
def fresh(monkeypatch):
    "What was found out about this system is forgotten, here and afterwards."
    found = memory.can_prefault, memory.libc, backends.backend
    for f in found:
        f.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    for f in found:
        f.cache_clear()


def use(n=150):  # more than lie in ordinary memory
    "Logits of a model with a slab cache, usage and savings."
    m = small_model()
    opt = HybridKVCacheOptimizer(**cache_shape(m), max_batch_size=1, max_seq_len=500)
    cache = opt.make_cache(m)
    with torch.no_grad():
        logits = m(random_ids(n), past_key_values=cache).logits
        logits = torch.cat([logits, m(random_ids(1), past_key_values=cache).logits], 1)
    kb = cache.kv_bytes()
    assert kb.live == (n + 1) * 2 * 2 * 2 * 8 * 4 and "live" in repr(kb)
    return logits, opt.get_memory_usage(), opt.get_memory_savings(), cache.slabs[0].get_memory_usage()


@pytest.mark.parametrize("names", [(), ("smaps",), ("pagemap",)])
def test_without_proc(monkeypatch, names):
    "A container that hides /proc, or a part of it: memory is still paged, and what nobody tells is None."
    want = use()[0]
    hide_proc(monkeypatch, *names)
    logits, usage, savings, one = use()
    assert torch.equal(logits, want)
    assert "cannot be read" in savings["unmeasured"] == residency_unknown()
    if "pagemap" in names:
        assert usage["resident"] > 0 and usage["unmeasured"] is one["unmeasured"] is None
    else:
        assert usage["unmeasured"] == one["unmeasured"] == residency_unknown()
        assert usage["resident"] is usage["fragmentation"] is one["resident"] is savings["slab"] is None
        assert anonymous_bytes([1]) is None
    if "smaps" not in names:
        assert tensor_resident(torch.ones(5)) is savings["dynamic"] is savings["saved_vs_dynamic"] is None
    assert usage["live"] > 0 and usage["reserved"] > 0


@pytest.mark.parametrize("system", ["darwin", "win32", "freebsd14"])
@pytest.mark.filterwarnings("ignore:no demand-paged memory")
def test_on_systems_other_than_linux(fresh, system):
    "Memory grows by copying, which is said, and answers are the same."
    want = use()[0]
    for f in (memory.can_prefault, memory.libc, backends.backend):
        f.cache_clear()
    fresh.setattr(sys, "platform", system)
    hide_proc(fresh, "smaps", "pagemap")
    with pytest.warns(UserWarning, match=f"{system} .* copying"):
        backends.backend()
    logits, usage, savings, one = use()
    assert torch.equal(logits, want) and usage["backend"] == ["copying"] and one["backend"] == "copying"
    assert usage["resident"] is None and system in usage["unmeasured"]
    assert savings["saved_vs_static_longest"] is None and usage["live"] > 0


def refuse(*args, **kw):
    raise OSError(38, "Function not implemented")


@pytest.mark.parametrize(
    "hide",
    [
        lambda m: m.setattr("ctypes.CDLL", refuse),
        lambda m: m.delattr(mmap, "MAP_PRIVATE"),
        lambda m: m.delattr(mmap, "MAP_ANONYMOUS"),
        lambda m: m.delattr(mmap, "PROT_READ"),
    ],
    ids=["no C library", "no MAP_PRIVATE", "no MAP_ANONYMOUS", "no PROT_READ"],
)
def test_calls_that_are_not_there(fresh, hide):
    "Whatever is missing, memory grows by copying, and the reason is said once."
    hide(fresh)
    with pytest.warns(UserWarning, match="no demand-paged memory"):
        cache = SlabCache(small_model().config)
        with torch.no_grad():
            small_model()(random_ids(20), past_key_values=cache)
    assert {r.backend for s in cache.slabs for r in s.storage} == {"copying"}


REAL_LIBC = memory.libc


class Libc:
    "The C library, in which `madvise` refuses one advice."

    def __init__(self, advice):
        self.real, self.advice = REAL_LIBC(), advice

    def __getattr__(self, name):
        return getattr(self.real, name)

    def madvise(self, address, nbytes, advice):
        return -1 if advice == self.advice else self.real.madvise(address, nbytes, advice)


@pytest.mark.skipif(sys.platform != "linux", reason="calls of Linux")
def test_an_older_linux(fresh):
    "Without `MADV_POPULATE_WRITE` no pages are taken ahead; without `MADV_DONTNEED` there is nothing to page with."
    old = Libc(memory.POPULATE_WRITE)
    fresh.setattr(memory, "libc", lambda: old)
    assert backends.backend() == "mmap" and not PagedRows(2, 100, 8).prefault
    memory.can_prefault.cache_clear()
    backends.backend.cache_clear()
    none = Libc(memory.DONTNEED)
    fresh.setattr(memory, "libc", lambda: none)
    with pytest.warns(UserWarning, match="copying"):
        assert backends.backend() == "copying"


WINDOWS = """
    import builtins, ctypes, mmap, os, sys
    import multiprocessing, pathlib, subprocess, tempfile, psutil, torch, transformers  # they know where they are
    sys.modules["resource"] = None
    real = builtins.open
    def hidden(path, *args, **kw):
        if str(path).startswith("/proc/self/"):
            raise FileNotFoundError(2, "No such file or directory", path)
        return real(path, *args, **kw)
    library = ctypes.CDLL
    def no_library(name, *args, **kw):
        if name is None:
            raise TypeError("expected str")
        return library(name, *args, **kw)
    builtins.open, ctypes.CDLL = hidden, no_library
    for name in "MAP_PRIVATE", "MAP_ANONYMOUS", "MAP_NORESERVE", "PROT_READ", "PROT_WRITE":
        vars(mmap).pop(name, None)
    for name in "register_at_fork", "fork", "memfd_create":
        vars(os).pop(name, None)
    from llmopt.engine import EnhancedFusedLLMEngine, Recipe
    import warnings
    warnings.simplefilter("ignore")
    for recipe in "baseline", "kv", "kv:budget=64":
        engine = EnhancedFusedLLMEngine("llmopt-tiny", device="cpu", recipe=Recipe.parse(recipe))
        m = engine.run("Hello", max_new_tokens=4)
        assert m.kv_bytes_live > 0 and m.kv_bytes_resident in (None, 0), m.kv_bytes_resident
    print("answered")
"""


def test_a_process_that_finds_itself_on_windows():
    "No `resource`, no fork, no calls for memory: the package imports and the engine answers, with a budget, too."
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(WINDOWS)], capture_output=True, text=True, timeout=120)
    assert out.stdout.strip() == "answered", out.stderr[-2000:]
