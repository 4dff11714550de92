"Rows in reserved memory at their limits: sizes, leaks, unequal lengths, forks."

import copy
import gc
import math
import multiprocessing
import pickle
import sys

import numpy as np
import psutil
import pytest
import torch

from llmopt.errors import ConfigError, LlmoptError
from llmopt.kv_cache.backends import CopyingRows, backend, make_rows
from llmopt.kv_cache.memory import PagedRows
from llmopt.kv_cache.residency import PAGE, anonymous_bytes, tensor_resident

linux = pytest.mark.skipif(not backend().startswith("mmap"), reason="no demand-paged memory here")
KINDS = [pytest.param(PagedRows, marks=linux), CopyingRows]


@linux
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resident_bytes_are_the_predicted_pages_in_any_type(dtype):
    "Each row begins on a page of its own, so the prediction is rounded up row by row, growing and shrinking."
    r = PagedRows(6, 50_000, 48, dtype, prefault=False)
    for n in 1, 7, 500, 501, 4000, 300, 0, 90:
        old = r.length
        r.resize(n)
        r.data[:, old:n] = 1
        assert r.resident() == 6 * math.ceil(n * 48 * dtype.itemsize / PAGE) * PAGE


@linux
@pytest.mark.parametrize("prefault", [True, False])
def test_rows_trimmed_to_lengths_of_their_own(prefault):
    "They keep what they have, hold just the pages of those lengths, and go on growing from the longest one."
    r = PagedRows(3, 50_000, 64, prefault=prefault)
    r.resize(1000)
    r.data[:, :1000] = torch.arange(1000.0)[None, :, None]
    r.trim([1000, 17, 0])

    def pages(*ns):
        return sum(math.ceil(n * 256 / PAGE) for n in ns) * PAGE

    assert (r.length, r.resident()) == (1000, pages(1000, 17))
    assert r.data[1, :17, 3].tolist() == [*range(17)]
    r.resize(1001)
    r.data[0, 1000] = r.data[1, 17] = 1.0
    assert r.resident() == pages(1001, 18)
    r.trim([20, 18, 0])
    assert r.resident() == pages(20, 18)
    with pytest.raises(ConfigError, match="trim takes"):
        r.trim([21, 1, 1])


@linux
def test_reserving_64_gib_takes_nothing():
    "Less than 1 MiB of resident memory for 64 GiB of addresses."
    rss = psutil.Process().memory_info().rss
    r = PagedRows(16, 2**20, 1024)
    assert r.reserved == 2**36 and psutil.Process().memory_info().rss - rss < 2**20
    assert r.resident() == 0


def mappings():
    gc.collect()
    with open("/proc/self/maps") as f:
        return sum(1 for _ in f)


@linux
def test_ten_thousand_times_up_and_down_leaks_nothing():
    "Neither pages nor mappings, and addresses go when no tensor looks at them."
    PagedRows(8, 4096, 64).resize(1)
    before, proc = mappings(), psutil.Process()
    r = PagedRows(8, 4096, 64)
    for i in range(10_000):
        if i == 100:
            rss = proc.memory_info().rss
        n = (i * 37) % 64
        r.resize(n)
        r.data[:, max(n - 1, 0) : n] = 1.0
    r.settle()
    assert proc.memory_info().rss - rss < 2**20
    view = r.data[:, :64]
    r.close()
    assert view.sum().item() == 0.0 and anonymous_bytes([r.address]) == 0
    del view, r
    assert mappings() <= before


@pytest.mark.parametrize("kind", KINDS)
def test_uses_that_are_refused(kind):
    "Both kinds of rows refuse sizes that do not fit, copies and pickles; closing twice is fine, use after it is not."
    r = kind(2, 100, 8)
    with pytest.raises(ConfigError, match="do not fit"):
        r.resize(-1)
    with pytest.raises(ConfigError, match="reserve more"):
        r.resize(101)
    with pytest.raises(LlmoptError, match="pickled"):
        pickle.dumps(r)
    with pytest.raises(LlmoptError, match="pickled"):
        copy.copy(r)
    r.close()
    r.close()
    for use in (lambda: r.resize(1), lambda: r.trim([0, 0])):
        with pytest.raises(LlmoptError, match="closed"):
            use()


@pytest.mark.parametrize("bad", [0, -5, 2.5, True, "8", None, float("nan")])
@pytest.mark.parametrize("name", ["rows", "tokens", "width"])
def test_what_is_no_size_is_refused(name, bad):
    "The message names the parameter, for each of the three sizes."
    with pytest.raises(ConfigError, match=f"{name} must be a whole number"):
        make_rows(**(dict(rows=2, tokens=10, width=4) | {name: bad}))


@linux
@pytest.mark.parametrize("tokens", [2**50, 2**62, 10**30])
def test_more_addresses_than_there_are(tokens):
    "One line, and no size that wraps around."
    with pytest.raises(ConfigError, match="cannot reserve .* max_seq_len"):
        PagedRows(4, tokens, 64)


def test_whole_numbers_of_numpy_and_torch_are_sizes():
    "They are kept as Python's integers: an uint8 would overflow in the product of sizes."
    r = make_rows(np.int64(2), np.uint8(10), torch.tensor(4), page_tokens=np.int32(0))
    r.resize(np.int16(3))
    assert r.data.shape[0] == 2 and r.tokens == 10 and type(r.width) is int


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_and_rows_alike(kind):
    "A copy has its own memory; `like` makes empty rows of another number."
    r = kind(2, 1000, 8, torch.bfloat16, page_tokens=64, prefault=False)
    r.resize(10)
    r.data[:, :10] = 3.0
    c, other = copy.deepcopy(r), r.like(5)
    c.data[:, :10] = 4.0
    assert (r.data[:, :10] == 3).all() and c.length == 10
    assert (other.rows, other.length, other.dtype, other.page_tokens) == (5, 0, torch.bfloat16, 64)


def grow_in_child(r, queue):
    r.resize(900)
    r.data[:, 100:900] = 2.0
    r.settle()
    fresh = PagedRows(2, 1000, 64)
    fresh.resize(500)
    fresh.settle()
    queue.put((r.data[:, :100].mean().item(), r.data[:, 100:900].mean().item(), fresh.length))


@linux
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_a_forked_child_goes_on():
    "The thread that takes pages ahead is gone in a child, and a lock may be held by nobody: both are made anew."
    r = PagedRows(2, 1000, 64)
    r.resize(100)
    r.data[:, :100] = 1.0
    r.settle()  # now the worker exists
    r.lock.acquire()  # as if it were at work at the moment of the fork
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=grow_in_child, args=(r, queue), daemon=True)
    child.start()
    try:
        assert queue.get(timeout=30) == (1.0, 2.0, 500)
        child.join(30)
        assert child.exitcode == 0
    finally:
        child.kill()
        r.lock.release()
    r.resize(200)
    assert (r.data[:, :100] == 1).all() and not r.data[:, 100:200].any()


@linux
def test_resizing_within_a_page_makes_no_call(monkeypatch):
    "Tokens one by one: calls to the system come with the pages, not with the tokens."
    r, calls = PagedRows(4, 100_000, 64, prefault=False), []
    monkeypatch.setattr(PagedRows, "_advise", lambda *a: calls.append(a))  # private: each call to the system
    for n in range(10_000):
        r.resize(n)
    assert not calls


@pytest.mark.parametrize("n", [1000, 2000, 4000])
def test_copies_grow_with_the_tokens(n, monkeypatch):
    "Growing token by token copies each token about once: a buffer of twice the size each time."
    # `_allocate` is private: each copy is counted
    copied, allocate = [], CopyingRows._allocate
    r = CopyingRows(1, 10_000, 4)
    monkeypatch.setattr(CopyingRows, "_allocate", lambda s, room: (copied.append(s.length), allocate(s, room)))
    for i in range(1, n + 1):
        r.resize(i)
    assert sum(copied) <= 1.1 * n


@pytest.mark.skipif(sys.platform != "linux", reason="pages are counted on Linux")
def test_only_what_was_written_is_resident():
    "A tensor that was only allocated takes one page at most, a quarter of it written takes that quarter."
    t = torch.empty(2**24)  # beyond what malloc keeps for reuse
    assert tensor_resident(t) <= PAGE
    t[: 2**22] = 1.0
    assert 2**24 <= tensor_resident(t) <= 2**24 + PAGE
