"""A budget in bytes is never exceeded, whoever judges, whoever competes, and however the text comes.

Live bytes at every step, pages where the system has them, and the books of the cache.
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import small_model
from llmopt.errors import BudgetError
from llmopt.kv_cache import EvictingCache, EvictionConfig
from llmopt.kv_cache.attention import packed
from llmopt.kv_cache.fit_foreseen import linear_fit
from llmopt.kv_cache.foreseen import ScoreMap
from llmopt.kv_cache.policies import POLICIES, SHARES
from llmopt.kv_cache.second_pass import reconstruct

from .test_second_pass import parts_of

LAYERS, HEADS, SIZE = 3, 2, 4
TOKEN = LAYERS * HEADS * (2 * SIZE * 4 + 4)  # bytes of a token in all rows, with positions
ONE_PASS = [name for name, p in POLICIES.items() if p.needs != "second_pass"]


@pytest.fixture(scope="module")
def model():
    return small_model(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=LAYERS)


def some_map():
    "A map of random numbers for the small model."
    gen, features = torch.Generator().manual_seed(0), (4 + 2 + 2) * SIZE
    pairs = [(torch.randn(40, features, generator=gen), torch.randn(40, HEADS, generator=gen)) for _ in range(LAYERS)]
    return ScoreMap([linear_fit(x, y) for x, y in pairs], {})


def new(model, budget, policy, **kw):
    "An empty cache under a budget, with a map where the policy wants one."
    scores = some_map() if POLICIES[policy].needs == "map" else None
    return EvictingCache(model.config, EvictionConfig(budget, policy, **kw), scores)


def pages(cache, unit):
    "Pages under all rows of a cache, when a page holds `unit` tokens."
    return sum(math.ceil(n / unit) for s in cache.slabs for n in s.lengths.flatten().tolist())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    policy=st.sampled_from(ONE_PASS),
    share=st.sampled_from([None, *SHARES]),
    kib=st.integers(6, 40),
    window=st.integers(1, 10),
    slack=st.one_of(st.none(), st.integers(0, 12)),
    unit=st.sampled_from([1, 4, 7]),
    pieces=st.lists(st.sampled_from([1, 1, 2, 5, 17, 40]), min_size=2, max_size=12),
    pad=st.integers(0, 30),
    batch=st.integers(1, 2),
)
def test_bytes_are_a_ceiling(model, policy, share, kib, window, slack, unit, pieces, pad, batch):
    "After every piece of a text, for every policy and every way to share; and so are the pages under the rows."
    cache, n, at = new(model, f"{kib}KiB", policy, window=window, slack=slack, unit=unit, share=share), sum(pieces), 0
    mask = torch.ones(batch, n, dtype=torch.long)
    mask[-1, : min(pad, pieces[0] - 1)] = 0
    ids = torch.randint(0, 64, (batch, n), generator=torch.Generator().manual_seed(n))
    limit = kib * 1024 // (TOKEN * batch) // unit * unit  # tokens of a row, on average
    for q in pieces:
        try:
            with torch.no_grad(), packed(model):
                model(ids[:, at : at + q], attention_mask=mask[:, : at + q], past_key_values=cache)
        except BudgetError:
            assert limit < math.ceil((4 + window) / unit) * unit
            return
        at += q
        live = cache.kv_bytes().live
        assert live <= kib * 1024 and cache.evictor.live == live
        if cache.evictor.cfg.competes != "layers":
            assert pages(cache, unit) <= batch * LAYERS * HEADS * limit // unit


@pytest.mark.parametrize("share", [None, *SHARES])
@pytest.mark.parametrize("kib", [10, 20])
def test_bytes_are_a_ceiling_after_a_second_pass(model, share, kib):
    "KVzip cuts at once, and then while tokens are written."
    ids = torch.randint(20, 64, (140,), generator=torch.Generator().manual_seed(kib))
    cache = new(model, f"{kib}KiB", "kvzip", window=6, unit=1, share=share)
    with torch.no_grad(), packed(model), cache.paused():
        model(ids[None, :120], past_key_values=cache)
    reconstruct(model, cache, iter(parts_of(ids[:120], 50)), 120)
    cache.evict()
    assert 0.8 * kib * 1024 < cache.kv_bytes().live <= kib * 1024 or 120 * TOKEN <= kib * 1024
    for token in ids[120:]:
        with torch.no_grad(), packed(model):
            model(token[None, None], past_key_values=cache)
        assert cache.kv_bytes().live <= kib * 1024


@pytest.mark.parametrize("policy", ["snapkv", "expected", "keydiff"])
@pytest.mark.parametrize("share", ["heads", "model"])
def test_pages_that_are_predicted_are_returned(policy, share):
    "Where rows differ, the system gets the pages behind each of them back: 16 tokens lie on a page here."
    model = small_model(vocab_size=64, head_dim=64)
    cache, ids = new(model, "30%", policy, window=8, share=share), torch.randint(0, 64, (1, 500))
    with torch.no_grad(), packed(model):
        model(ids, past_key_values=cache)
    assert any(s.ragged for s in cache.slabs)
    rows = [r for s in cache.slabs for r in (s.key_rows, s.value_rows)]
    if not rows[0].backend.startswith("mmap"):
        pytest.skip("no demand-paged memory here")
    want = 0
    for s in cache.slabs:
        for r in s.key_rows, s.value_rows:
            want += sum(math.ceil(n * r.token_bytes / r.group) * r.group for n in s.lengths.flatten().tolist())
    got = sum(r.resident() for r in rows)
    assert want <= got <= want + len(rows) * HEADS * rows[0].group  # a page ahead in each row at the most


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "policy, share", [("cake", None), ("snapkv", "heads"), ("expected", "model"), ("keydiff", "heads")]
)
def test_bytes_are_a_ceiling_in_few_bits(bits, policy, share):
    "Records, positions, window and table together, while a text is read in pieces and then written."
    low = pytest.importorskip("llmopt.kv_cache.low_bit_cache", reason="comes with slabs of few bits")
    model, limit = small_model(vocab_size=64, head_dim=32), 100 * 1024
    cfg = EvictionConfig("100KiB", policy, window=32, slack=8, unit=1, share=share)
    cache, ids = low.LowBitEvictingCache(model.config, cfg, bits=bits), torch.randint(0, 64, (1, 500))
    for a, b in (0, 200), (200, 460), *((i, i + 1) for i in range(460, 500)):
        with torch.no_grad(), packed(model):
            model(ids[:, a:b], past_key_values=cache)
        assert cache.kv_bytes().live <= limit
    assert cache.evictor.rounds > 1 and cache.kv_bytes().live > 0.5 * limit
