"""What must hold for every score, budget and history.

Shares add up, cutting in stages is cutting once, what is protected stays, positions increase.
"""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import small_model
from llmopt.kv_cache.attention import packed
from llmopt.kv_cache.budget import EvictionConfig, apportion, parse_budget, sizes_for_mass
from llmopt.kv_cache.evicting_slab import EvictingSlab
from llmopt.kv_cache.eviction import EvictingCache
from llmopt.kv_cache.policies import POLICIES

settings.register_profile("eviction", deadline=None, suppress_health_check=[HealthCheck.too_slow])
quick, costly = (settings(settings.get_profile("eviction"), max_examples=n) for n in (150, 25))
weights = st.lists(
    st.one_of(st.sampled_from([0.0, 1.0, 2.0]), st.floats(0, 1e12), st.floats(0, 1e-12)), min_size=1, max_size=12
)


@quick
@given(weights, st.integers(0, 200), st.integers(0, 40), st.data())
def test_shares_add_up_and_no_layer_gains_by_company(ws, total, cap, data):
    "The cascade relies on this: a layer that is cut before the later ones are known never has to grow again."
    caps = np.array(data.draw(st.lists(st.integers(0, cap), min_size=len(ws), max_size=len(ws))))
    got = apportion(np.array(ws), total, caps)
    assert got.sum() == min(total, caps.sum()) and (got <= caps).all() and (got >= 0).all()
    for m in range(1, len(ws)):
        assert (apportion(np.array(ws[:m]), total, caps[:m]) >= got[:m]).all()


@quick
@given(weights, st.integers(0, 500))
def test_shares_are_within_one_of_proportion_where_webster_promises_it(ws, total):
    "With two layers Webster's method is never further than one page from the exact proportion."
    a, b = (ws * 2)[:2]
    if a + b < 1e-6:
        return
    got = apportion(np.array([a, b]), total, np.array([total, total]))
    assert abs(got[0] - total * a / (a + b)) <= 1


@quick
@given(st.integers(1, 60), st.integers(0, 2**32 - 1), st.data())
def test_cutting_in_stages_is_cutting_once(n, seed, data):
    "For any order of the slots and any falling sizes, ties included; keys and values follow their tokens."
    gen = torch.Generator().manual_seed(seed)
    ranks = torch.rand(2, 3, n, generator=gen).argsort(-1)
    sizes = sorted(data.draw(st.lists(st.integers(0, n), min_size=1, max_size=4)), reverse=True)
    kv = torch.randn(2, 2, 3, n, 4, generator=gen)
    stages, once = EvictingSlab(3, 4, 2, 100), EvictingSlab(3, 4, 2, 100)
    for s in stages, once:
        s.append(*kv)
    r = ranks.clone()
    for m in sizes:
        stages.keep(r < m, [r])
        r = r[..., : stages.seq_len]
    once.keep(ranks < sizes[-1])
    assert torch.equal(stages.positions[stages.filled], once.positions[once.filled])
    assert torch.equal(stages.keys[stages.filled], once.keys[once.filled]) and torch.equal(
        stages.values[stages.filled], once.values[once.filled]
    )
    assert torch.equal(once.keys[once.filled], kv[0][ranks < sizes[-1]])


@quick
@given(st.integers(1, 40), st.floats(0.01, 1), st.integers(1, 16), st.integers(0, 2**32 - 1))
def test_mass_is_held_with_the_fewest_tokens(n, share, unit, seed):
    "The size holds the share of the attention, and one unit less would not."
    gen = torch.Generator().manual_seed(seed)
    mass, ranks = torch.rand(1, 2, n, generator=gen).softmax(-1), torch.rand(1, 2, n, generator=gen).argsort(-1)
    sizes = sizes_for_mass(mass, ranks, share, unit)
    for h in range(2):
        best, size = mass[0, h][ranks[0, h].argsort()].double(), sizes[0, h].item()
        assert size % unit == 0 and best[:size].sum() >= share * best.sum() - 1e-5
        if size > unit:
            assert best[: size - unit].sum() < share * best.sum() + 1e-5


@pytest.fixture(scope="module")
def model():
    return small_model(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=3)


@costly
@given(
    policy=st.sampled_from([name for name, p in POLICIES.items() if p.needs in (None, "queries")]),
    budget=st.sampled_from([16, 30, "20%", "50%", "8KiB", "mass=0.6", "mass=0.95"]),
    window=st.integers(1, 10),
    first=st.integers(0, 5),
    slack=st.one_of(st.none(), st.integers(0, 12)),
    unit=st.sampled_from([0, 1, 7]),
    pieces=st.lists(st.sampled_from([1, 1, 2, 5, 17, 40]), min_size=1, max_size=12),
    pad=st.integers(0, 30),
)
def test_any_history_keeps_what_must_stay(model, policy, budget, window, first, slack, unit, pieces, pad):
    "First tokens and window are there, positions increase, and all layers together hold what the budget says."
    cache, n = EvictingCache(model.config, EvictionConfig(budget, policy, window, first, slack, unit)), sum(pieces)
    mask, at, rounds = torch.ones(2, n, dtype=torch.long), 0, 0
    mask[1, : min(pad, pieces[0] - 1)] = 0
    ids = torch.randint(0, 64, (2, n), generator=torch.Generator().manual_seed(n))
    for q in pieces:
        try:
            with torch.no_grad(), packed(model):
                model(ids[:, at : at + q], attention_mask=mask[:, : at + q], past_key_values=cache)
        except ValueError as e:  # 18 tokens fit in 8 KiB
            assert (
                budget == "8KiB" and "always kept" in str(e) and (unit == 0 or -(-(first + window) // unit) * unit > 18)
            )
            return
        at += q
        assert budget != "8KiB" or cache.kv_bytes().live <= 8192
        if cache.evictor.rounds > rounds:
            _check_budget(cache, mask[:, :at].bool())
        rounds = cache.evictor.rounds
        for layer in cache.slab_layers:
            _check_rows(layer.slab, mask[:, :at].bool(), first, window)
    assert cache.get_seq_length() == n and all(
        -1e-6 <= r["lost"] <= 1 + 1e-5 and r["after"] < r["before"] for r in cache.evictions
    )


def _check_rows(slab, visible, first, window):
    "The tokens of each row of one layer."
    for b, see in enumerate(visible):
        real = see.nonzero().flatten()
        must = {*real[:first].tolist(), *real[-window:].tolist()}
        for h in range(slab.num_heads):
            pos = slab.positions[b, h, : slab.lengths[b, h]]
            assert (pos.diff() > 0).all() and must <= {*pos.tolist()} and pos.max() < len(see)


def _check_budget(cache, visible):
    "After a round: no more tokens than the budget."
    e = cache.evictor
    if parse_budget(e.cfg.budget).kind == "mass":
        return
    limits = e.limits(visible)
    for b, (limit, _) in enumerate(limits):
        held = sum(s.sizes[b] for s in cache.slabs)
        if cache.slabs[0].position_rows is not None:
            assert held <= limit * len(cache.slabs), (held, limit)
