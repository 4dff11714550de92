"Dropped caches give their pages back at once, work grows with the tokens, and what is no number is said to be none."

import gc
import math
import weakref

import numpy as np
import pytest
import torch

from helpers import random_ids, small_model
from llmopt.errors import BudgetError, ConfigError
from llmopt.kv_cache import EvictingCache, EvictionConfig, PrefixStore, evicting_layer
from llmopt.kv_cache.attention import packed
from llmopt.kv_cache.budget import apportion, parse_budget, sizes_for_mass
from llmopt.kv_cache.policies import POLICIES, Observed, seen_attention
from llmopt.kv_cache.query_moments import Rotation, merged


@pytest.fixture(scope="module")
def model():
    return small_model(max_position_embeddings=4096)


@pytest.fixture
def no_collector():
    "Python does not look for circles: what has one stays."
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def used(model, n=300, policy="cake"):
    "A cache that has read a prompt and written a few tokens under a budget."
    cache, ids = EvictingCache(model.config, EvictionConfig("25%", policy, window=8, unit=1)), random_ids(n)
    with torch.no_grad(), packed(model):
        model(ids, past_key_values=cache)
        model.generate(ids[:, :1].repeat(1, n + 1), past_key_values=cache, max_new_tokens=4, pad_token_id=5)
    return cache


@pytest.mark.parametrize("policy", ["cake", "h2o"])
def test_pages_go_back_with_the_last_reference(model, no_collector, policy):
    "With the collector off: a circle between cache, evictor and layers would keep them alive."
    cache = used(model, policy=policy)
    rows = [weakref.ref(r) for s in cache.slabs for r in s.storage]
    owners = [weakref.ref(o) for o in (cache, cache.evictor, *cache.slab_layers)]
    del cache
    assert [r() for r in rows + owners] == [None] * len(rows + owners)


def test_pages_of_copies_resets_and_restored_caches_go_back(model, no_collector, tmp_path):
    "A deep copy, and a cache that was reset and filled from a store, are in no circle either."
    import copy

    cache = copy.deepcopy(used(model))
    store, restored = PrefixStore(tmp_path, chunk=16), EvictingCache(model.config, EvictionConfig(64))
    for _ in range(2):
        restored.reset()
        with packed(model):
            store.prefill(model, restored, random_ids(100))
    for t in store.loaders:
        t.join()
    refs = [weakref.ref(r) for c in (cache, restored) for s in c.slabs for r in s.storage]
    del cache, restored
    assert [r() for r in refs] == [None] * len(refs)


def test_memory_stays_flat_through_many_caches(model, no_collector):
    "Six caches made and dropped in turn leave nothing behind."
    from llmopt.kv_cache.memory import PagedRows

    before = sum(type(o) is PagedRows for o in gc.get_objects())
    for _ in range(6):
        used(model, 200)
    assert sum(type(o) is PagedRows for o in gc.get_objects()) == before


def test_an_error_in_a_forward_pass_leaves_no_circle(model, no_collector):
    "A budget that cannot be met raises from inside the model."
    cache = EvictingCache(model.config, EvictionConfig("3KiB", window=32, unit=1))
    ref = weakref.ref(cache)
    with torch.no_grad(), packed(model), pytest.raises(BudgetError):
        model(random_ids(300), past_key_values=cache)
    del cache
    assert ref() is None


@pytest.mark.parametrize("policy", ["cake", "streaming_llm"])
def test_twice_the_answer_takes_twice_the_scoring(model, policy, monkeypatch):
    "Attention weights that are computed once more to judge tokens, under a budget of tokens."
    counted, real = [], seen_attention

    def counting(*args):
        weights = real(*args)
        counted.append(weights.numel())
        return weights

    monkeypatch.setattr(evicting_layer, "seen_attention", counting)

    def work(n):
        counted.clear()
        cache, ids = EvictingCache(model.config, EvictionConfig(128, policy, window=16, unit=1)), random_ids(n)
        with torch.no_grad(), packed(model):
            model(ids[:, :128], past_key_values=cache)
            for i in range(128, n):
                model(ids[:, i : i + 1], past_key_values=cache)
        return sum(counted)

    once, twice = work(128 + 160), work(128 + 320)
    assert 0 < twice <= 2.3 * once


def test_attention_that_is_no_number_is_not_reported_as_kept(model):
    "Weights that are not a number give a loss that is not a number, and never a loss of zero."
    broken = small_model(max_position_embeddings=4096)
    broken.model.layers[0].self_attn.k_proj.weight.data[0, 0] = math.nan
    for policy in (name for name, p in POLICIES.items() if p.needs in (None, "queries")):
        cache = EvictingCache(broken.config, EvictionConfig(64, policy, window=8, unit=1))
        with torch.no_grad(), packed(broken):
            broken(random_ids(200), past_key_values=cache)
        assert cache.evictions and all(math.isnan(r["lost"]) for r in cache.evictions if r["layer"] > 0)
        assert sum(s.lengths for s in cache.slabs).unique().tolist() == [128]


def test_scores_that_are_no_numbers_keep_what_must_stay(model):
    "A policy of somebody's own may return anything."
    from llmopt.kv_cache.policies import Policy

    for value in (math.nan, math.inf, -math.inf):
        POLICIES["odd"] = Policy("odd", lambda o, v=value: torch.full_like(o.mean, v), lambda o, v=value: o.entropy * v)
        try:
            cache = EvictingCache(model.config, EvictionConfig(64, "odd", window=8, first=2, unit=1))
            with torch.no_grad(), packed(model):
                model(random_ids(200), past_key_values=cache)
        finally:
            del POLICIES["odd"]
        for s in cache.slabs:
            for h in range(s.num_heads):
                at = {*s.positions[0, h, : s.lengths[0, h]].tolist()}
                assert {0, 1, *range(192, 200)} <= at


def test_a_query_that_sees_nothing_has_zeros():
    "A row that is masked as a whole would be NaN after softmax; keys that are NaN stay NaN and are not hidden."
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 5, 4)
    allowed = torch.tensor([[[True] * 5, [False] * 5, [True] + [False] * 4]])
    weights = seen_attention(q, k, allowed, 0.5)
    assert weights[:, :, 1].abs().max() == 0 and (weights[:, :, 2, 0] == 1).all()
    assert seen_attention(q, k * math.nan, allowed, 0.5)[:, :, 0].isnan().all()


BAD = ["much", "", "64 bananas", True, 2.5, None, "2.5", "mass=50%", [3], "9" * 5000, "1e9", "٢٥%", "25%\n25%", "nan%"]
BAD += [np.float32(3), "mass=nan", "mass=", "-", b"25%", "0x10", "25 %  %"]


@pytest.mark.parametrize("bad", BAD, ids=lambda b: repr(b)[:20])
def test_what_is_no_budget_is_refused_in_one_line(bad):
    "Words, wrong types, digits of other scripts and numbers without end; the message stays short."
    with pytest.raises(ConfigError, match="budget must be") as e:
        parse_budget(bad)
    assert "\n" not in str(e.value) and len(str(e.value)) < 300


@pytest.mark.parametrize("bad", [0, -5, "0%", "-3%", "0MiB", "mass=0", "0", "-1MiB", "0.0000%"])
def test_nothing_is_no_budget(bad):
    "Zero and less, in each of the units."
    with pytest.raises(ConfigError, match="more than nothing"):
        parse_budget(bad)


def test_numbers_of_numpy_are_numbers():
    "numpy's integers become Python's; zero, fractions, switches and texts are refused in every field."
    e = EvictionConfig(np.int64(512), window=np.int32(16), slack=np.int8(3))
    assert (e.parsed.amount, e.window, e.slack) == (512, 16, 3)
    for kw in dict(window=0), dict(window=2.0), dict(first=-1), dict(slack=True), dict(unit="4"), dict(policy=None):
        with pytest.raises(ConfigError):
            EvictionConfig(512, **kw)


def test_shares_of_weights_that_are_no_numbers_still_add_up():
    "NaN, infinite, zero and negative weights: the whole budget is handed out, within the caps."
    caps = np.array([5, 5, 5])
    for w in ([math.nan, 1.0, 2.0], [math.inf, 1.0, 1.0], [math.nan] * 3, [0.0] * 3, [-1.0, 2.0, 3.0]):
        got = apportion(np.array(w), 7, caps)
        assert got.sum() == 7 and (got >= 0).all() and (got <= caps).all()
    assert (sizes_for_mass(torch.full((1, 1, 4), math.nan), torch.arange(4)[None, None], 0.9, 2) == 2).all()


def test_a_policy_needs_no_model():
    "Scores and preferences of every policy come from an `Observed` of plain tensors."
    zeros, one = torch.zeros(2, 3, 9), torch.ones(2)
    o = Observed(zeros, zeros, one, one, zeros, torch.arange(9).expand(2, 3, -1), 9 * one.long(), zeros, 0, 4)
    o.keys, o.values, o.rebuilt, o.foreseen = torch.ones(2, 3, 9, 4), torch.ones(2, 3, 9, 4), zeros, zeros
    o.queries = merged(None, torch.ones(2, 6, 5, 4), torch.ones(2, 5, dtype=torch.bool), Rotation())
    for p in POLICIES.values():
        assert p.score(o).shape == (2, 3, 9)
        assert p.preference is None or p.preference(o).shape == (2,)
