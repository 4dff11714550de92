"""What must hold for slabs of few bits and any history, and for any budget of bytes.

A `LowBitSlab` holds what a slab in full precision holds that rounds row by row, and no step ends above its bytes.
"""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import small_model
from llmopt.errors import BudgetError, ConfigError
from llmopt.kv_cache.attention import packed
from llmopt.kv_cache.budget import EvictionConfig
from llmopt.kv_cache.low_bit_cache import LowBitEvictingCache
from llmopt.kv_cache.low_bit_slab import LowBitSlab
from llmopt.kv_cache.policies import POLICIES
from llmopt.kv_cache.quantize import bf16_above, bf16_below, decode8, encode8, pack_nibbles, rounded, unpack_nibbles

from .rounded import RoundedSlab

settings.register_profile("bits", deadline=None, suppress_health_check=[HealthCheck.too_slow])
quick, costly = (settings(settings.get_profile("bits"), max_examples=n) for n in (80, 25))
seeds = st.integers(0, 2**32 - 1)


@quick
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_bfloat16_on_either_side(numbers):
    "Below is not above, above is not below, and nothing lies between them."
    x = torch.tensor(numbers, dtype=torch.float32)
    low, high = bf16_below(x).float(), bf16_above(x).float()
    assert (low <= x).all() and (x <= high).all()
    exact = x == x.to(torch.bfloat16).float()
    assert torch.equal(low[exact], x[exact]) and torch.equal(high[exact], x[exact])
    near = x.to(torch.bfloat16).float()  # the nearest one is one of the two
    assert ((near == low) | (near == high)).all()


@quick
@given(seeds, st.sampled_from([2, 32, 48, 64]), st.floats(-20, 20), st.sampled_from([torch.float32, torch.bfloat16]))
def test_eight_bits_move_no_number_by_more_than_half_a_step(seed, size, exponent, dtype):
    "Whatever the size of the numbers; rounding again changes nothing more."
    x = torch.randn(1, 2, 5, size, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    x = x.to(dtype)
    y = decode8(encode8(x), size)
    step = bf16_above(x.float().abs().amax(-1, keepdim=True) / 127).float()
    assert ((y - x.float()).abs() <= 0.5001 * step).all()
    assert torch.equal(y.to(dtype), rounded(x, 8))


@quick
@given(seeds, st.sampled_from([2, 32, 96]))
def test_nibbles(seed, size):
    "Two codes in a byte come out as they went in."
    codes = torch.randint(0, 16, (3, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(unpack_nibbles(pack_nibbles(codes)), codes) and pack_nibbles(codes).shape == (3, size // 2)


@quick
@given(seeds, st.integers(1, 70), st.sampled_from([True, False]))
def test_four_bits_stay_within_the_range(seed, n, keys):
    "No number leaves the range of its group by more than the rounding of the scale; equal numbers stay as they are."
    x = torch.randn(1, 1, n, 64, generator=torch.Generator().manual_seed(seed))
    y, dim = rounded(x, 4, keys), 2 if keys else 3
    for a, b in zip(x.split(32, dim), y.split(32, dim)):
        low, high = a.amin(dim, keepdim=True), a.amax(dim, keepdim=True)
        slack = (high - low) / 64 + low.abs() / 64 + 1e-6
        assert (b >= low - slack).all() and (b <= high + slack).all()
    same = torch.full((1, 1, n, 64), 0.5)
    assert torch.equal(rounded(same, 4, keys), same)


VERBS = ["append", "append", "append", "keep", "crop", "select", "exactly", "copy"]
steps = st.tuples(st.sampled_from(VERBS), st.integers(1, 70), seeds)


@quick
@given(
    bits=st.sampled_from([8, 4]),
    window=st.one_of(st.none(), st.integers(0, 40)),
    page_after=st.sampled_from([0, 30]),
    history=st.lists(steps, max_size=12),
)
def test_any_history_of_a_slab(bits, window, page_after, history):
    "Appending, dropping, taking back, reordering: the same keys, values and positions, and a table as long."
    s = LowBitSlab(2, 32, 2, 2000, bits=bits, window=window, page_after=page_after)
    t = RoundedSlab(2, 32, 2, 2000, bits=bits, window=window)
    for what, n, seed in history:
        if what == "copy":
            s = copy.deepcopy(s)
            continue
        if page_after and what == "keep":  # without a budget nothing is dropped, and only there sequences may be short
            continue
        outcomes = [_do(x, what, n, torch.Generator().manual_seed(seed)) for x in (s, t)]
        assert outcomes[0] == outcomes[1]
        _compare(s, t)


def _do(slab, what, n, gen):
    "One step; what was raised, if anything."
    try:
        if what == "append":
            slab.append(*torch.randn(2, slab.batch, 2, n, 32, generator=gen))
            slab.encode_old()
        elif what == "keep":
            slab.keep(torch.rand(slab.batch, 2, slab.seq_len, generator=gen) < 0.3 + n / 100)
        elif what == "crop":
            slab.truncate(max(slab.tokens_seen - n, 0))
        elif what == "select":
            slab.select(torch.randint(0, slab.batch, (1 + n % 3,), generator=gen))
        else:
            slab.encode_old(exactly=True)
    except ConfigError as e:
        return type(e)
    return None


def _compare(s, t):
    "The same in each row, and no more bytes than planned."
    assert torch.equal(s.lengths, t.lengths) and (s.tokens_seen, s.seq_len) == (t.tokens_seen, t.seq_len)
    assert s.sizes == t.sizes and s.recent.seq_len == t.recent and torch.equal(s.filled, t.filled)
    for name in ("positions", "keys", "values"):
        assert torch.equal(getattr(s, name)[s.filled], getattr(t, name)[t.filled]), name
    assert s.table is None or s.table.seq_len == t.groups
    rows = s.batch * s.num_heads
    assert s.live <= rows * (s.seq_len * s.slot_bytes + s.spare_bytes)
    assert s.view().keys.shape[2] == s.coded.seq_len


@pytest.fixture(scope="module")
def model():
    return small_model(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=3, head_dim=32)


@costly
@given(
    bits=st.sampled_from([8, 4]),
    held=st.integers(0, 8),
    policy=st.sampled_from([name for name, p in POLICIES.items() if p.needs in (None, "queries")]),
    budget=st.sampled_from(["10%", "25%", "60%", "100KiB", "250KiB"]),
    window=st.integers(8, 12),
    first=st.integers(0, 5),
    slack=st.one_of(st.none(), st.integers(0, 12)),
    unit=st.sampled_from([0, 1, 7]),
    pieces=st.lists(st.sampled_from([1, 1, 2, 5, 17, 40, 90]), min_size=1, max_size=12),
)
def test_no_step_ends_above_its_budget_of_bytes(model, bits, held, policy, budget, window, first, slack, unit, pieces):
    "A share is one of the bytes in full precision; less than what is always kept cannot be."
    e = EvictionConfig(budget, policy, window, first, slack, unit)
    cache, n = LowBitEvictingCache(model.config, e, bits, held, max_seq_len=2000), sum(pieces)
    ids, at = torch.randint(0, 64, (2, n), generator=torch.Generator().manual_seed(n)), 0
    for q in pieces:
        try:
            with torch.no_grad(), packed(model):
                model(ids[:, at : at + q], past_key_values=cache)
        except BudgetError as error:
            assert "always kept" in str(error) and e.parsed.kind == "bytes"
            return
        at += q
        slab, rows, u = cache.slabs[0], 3 * 2 * 2, cache.evictor.unit
        kept = -(-(first + window) // u) * u
        tokens = min(kept + -(-e.spare(2 * kept) // u) * u, at)  # of a short text the slack stays, too
        least = rows * (tokens * slab.slot_bytes + slab.spare_bytes)
        amount = e.parsed.amount if e.parsed.kind == "bytes" else max(e.parsed.amount * at * rows * 256, least)
        assert cache.kv_bytes().live <= amount
    assert cache.get_seq_length() == n


@pytest.mark.parametrize("bits", [8, 4])
def test_a_text_too_short_for_its_share_is_not_cut_at_every_token(model, bits):
    "Forty tokens that always stay are more than a quarter: an answer of 64 takes a few rounds, and not 64."
    cache = LowBitEvictingCache(model.config, EvictionConfig("25%", window=36, slack=16, unit=16), bits)
    ids = torch.randint(0, 64, (1, 104), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), packed(model):
        model(ids[:, :40], past_key_values=cache)
        for at in range(40, 104):
            model(ids[:, at : at + 1], past_key_values=cache)
    assert 1 <= cache.evictor.rounds <= 5
