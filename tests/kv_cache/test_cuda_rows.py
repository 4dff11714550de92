"Rows on a GPU over the stand-in for its driver: random lengths, closing, refusals, and caches that do not notice."

import copy
import math
import os
import random
from unittest.mock import patch as replaced

import pytest
import torch
import transformers as T

from helpers import small_model
from llmopt.errors import ConfigError, LlmoptError
from llmopt.kv_cache.attention import packed
from llmopt.kv_cache.backends import backend, make_rows
from llmopt.kv_cache.budget import EvictionConfig
from llmopt.kv_cache.cache import SlabCache
from llmopt.kv_cache.cuda import CudaRows
from llmopt.kv_cache.eviction import EvictingCache
from llmopt.kv_cache.residency import PAGE

from .test_cuda import StandIn

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="the stand-in for a GPU needs Linux")


@pytest.mark.parametrize(
    "rows, tokens, width, dtype",
    [(6, 5000, 48, torch.float32), (7, 300, 20, torch.bfloat16), (5, 1, 1, torch.int8), (3, 4096, 8, torch.float16)],
)
def test_mapped_pages_are_those_that_hold_a_byte_in_use(rows, tokens, width, dtype):
    "Counted from the address of every token in the first and in the last row, growing and shrinking."
    d = StandIn()
    r = CudaRows(rows, tokens, width, dtype, prefault=False, driver=d)
    for n in 1, 7, 300, 301, 4000, 299, 0, 90:
        n = min(n, tokens)
        r.resize(n)
        r.data[:, :n] = 1
        pages = set()
        for i in (0, rows - 1):
            for t in range(n):
                first = r.data[i, t].data_ptr() - r.address
                pages |= {first // d.page, (first + width * dtype.itemsize - 1) // d.page}
        assert (r.resident(), d.held()) == (len(pages) * d.page, len(pages))


@pytest.mark.parametrize(
    "tokens, width, page_tokens, prefault",
    [(3000, 64, 0, False), (3000, 64, 0, True), (3000, 16, 500, True), (50, 16, 0, False), (999, 7, 5000, True)],
)
def test_random_lengths_against_a_plain_tensor(tokens, width, page_tokens, prefault):
    "What was written stays, fresh memory is zeros, every page mapped is needed (or spare), and nothing is left."
    rnd, files = random.Random(0), len(os.listdir("/proc/self/fd"))
    d = StandIn()
    r = CudaRows(5, tokens, width, torch.float32, page_tokens, prefault, driver=d)
    plain, most = torch.zeros(5, 0, width), 0
    for _ in range(200):
        d.queued, old = True, r.length
        longer, shorter = min(old + 1, tokens), max(old - 1, 0)
        n = rnd.choice([rnd.randint(0, tokens), longer, longer, shorter, 0])
        if rnd.random() < 0.1 and n <= old:
            r.trim([n, *(rnd.randint(0, n) for _ in range(4))])
        else:
            r.resize(n)
        if n > most:
            assert not r.data[:, most:n].any()
        new = torch.rand(5, max(n - old, 0), width)
        plain = torch.cat([plain[:, :n], new], 1)
        most = max(most, n)
        r.data[:, old:n] = new
        need = math.ceil(n * 5 * width * 4 / r.page)
        assert torch.equal(r.data[:, :n], plain) and need <= d.held() <= need + bool(prefault and n)
    d.queued = True
    r.close()
    assert (d.held(), d.ranges, len(os.listdir("/proc/self/fd"))) == (0, {}, files)


def test_closing_and_copies():
    "Closing gives everything back, and what a forgotten tensor needs as soon as that is gone."
    d = StandIn()
    r = CudaRows(3, 5000, 64, driver=d)
    r.resize(100)
    r.data[:, :100] = 3.0
    c = copy.deepcopy(r)
    c.data[:, :100] = 4.0
    assert (r.data[:, :100] == 3).all() and (c.data[:, :100] == 4).all() and c.length == 100
    view = c.data[:, :50]
    c.close()
    c.close()
    assert (c.reserved, c.resident(), view.mean().item()) == (0, 5 * d.page, 4.0)
    del view
    assert c.resident() == 0
    r.close()
    assert (d.held(), d.ranges) == (0, {})
    for use in (lambda: r.resize(1), lambda: r.trim([0] * 3)):
        with pytest.raises(LlmoptError, match="closed"):
            use()


def test_uses_that_are_refused():
    "Sizes below zero or beyond the reservation, a trim that would grow, and a device that is no GPU."
    r = CudaRows(2, 100, 8, driver=StandIn())
    for use, text in (
        (lambda: r.resize(-1), "do not fit"),
        (lambda: r.resize(101), "reserve more"),
        (lambda: r.trim([1, 0]), "trim takes"),
        (lambda: CudaRows(2, -5, 8, driver=StandIn()), "at least 1"),
        (lambda: CudaRows(2, 5, 8, device="cpu"), "no CUDA device"),
    ):
        with pytest.raises(ConfigError, match=text):
            use()


def test_the_choice_of_memory_is_reported():
    "On a device with the calls `cuda`; without it copies, with a warning that says why."
    if torch.cuda.is_available():
        assert backend("cuda") in ("cuda", "copying")
    else:
        with pytest.warns(UserWarning, match="no demand-paged memory on cuda .* copying"):
            assert backend.__wrapped__("cuda") == "copying"
    with (
        replaced("torch.cuda.is_available", lambda: True),
        replaced("llmopt.kv_cache.cuda.get_driver", lambda i: StandIn()),
        replaced("llmopt.kv_cache.backends.backend", backend.__wrapped__),
    ):
        r = make_rows(4, 100, 8, torch.bfloat16, device="cuda:0")
        r.resize(7)
    assert (r.backend, r.data.shape, r.data.dtype) == ("cuda", (4, 100, 8), torch.bfloat16)
    assert r.resident() == StandIn.page
    r.close()


def logits(model, cache, **kw):
    "Logits of 40 tokens after a prompt of 20, for two sequences."
    x = torch.arange(40).view(2, 20) * 7 % 90 + 10
    length = dict(max_new_tokens=40, min_new_tokens=40)
    out = model.generate(
        x,
        attention_mask=torch.ones_like(x),
        past_key_values=cache,
        pad_token_id=5,
        output_logits=True,
        return_dict_in_generate=True,
        do_sample=False,
        **length,
        **kw,
    )
    return torch.stack(out.logits)


def on(driver):
    "All slabs lie on `driver`."
    return replaced("llmopt.kv_cache.slab.make_rows", lambda *a: CudaRows(*a[:6], driver=driver))


@pytest.mark.parametrize("longest", [64, 4096])
def test_caches_do_not_notice(longest):
    "Bit-identical logits to `DynamicCache`, also when a model crops and reorders; all memory comes back."
    m, d = small_model(), StandIn(page=PAGE)
    for kw in dict(), dict(num_beams=3):
        with on(d):
            cache = SlabCache(m.config, longest)
            a = logits(m, cache, **kw)
        assert torch.equal(a, logits(m, T.DynamicCache(config=m.config), **kw))
        assert {r.backend for s in cache.slabs for r in s.storage} == {"cuda"}
        assert cache.kv_bytes().resident == d.held() * PAGE
        cache.crop(-30)
        assert cache.kv_bytes().resident == d.held() * PAGE
        cache.close()
        assert (d.held(), d.ranges) == (0, {})


@pytest.mark.parametrize("budget, kw", [(16, dict()), ("mass=0.8", dict()), (16, dict(num_beams=3))])
def test_eviction_does_not_notice(budget, kw):
    "It leaves rows of unequal lengths, reorders them and grows them again."
    m = small_model()
    here, there = (EvictingCache(m.config, EvictionConfig(budget, window=4, slack=4, unit=1)) for _ in range(2))
    with packed(m):
        a = logits(m, here, **kw)
    with packed(m), on(StandIn(page=PAGE)):
        assert torch.equal(a, logits(m, there, **kw))
    assert {s.key_rows.backend for s in there.slabs} == {"cuda"} and there.evictions
    there.close()
