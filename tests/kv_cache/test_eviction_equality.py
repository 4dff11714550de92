"""A model under a budget computes what the stock model computes with the dropped tokens masked, whatever was dropped.

For several models, policies, budgets, paddings and ways to cut a text. And a budget in bytes holds at every token.
"""

import copy

import pytest
import torch

from helpers import small_model
from llmopt.errors import BudgetError, ConfigError
from llmopt.kv_cache import EvictingCache, EvictionConfig, SlabCache
from llmopt.kv_cache.attention import packed, packed_attention, reference_attention
from llmopt.kv_cache.evicting_slab import EvictingSlab, slot_mask
from llmopt.kv_cache.policies import POLICIES

from .test_eviction import both_ways

MODELS = {
    "llama": lambda: small_model("llama", vocab_size=256, num_hidden_layers=3, head_dim=16),
    "gpt2": lambda: small_model("gpt2", vocab_size=256, n_layer=3),
    "mixed": lambda: small_model(
        "qwen3", vocab_size=256, num_hidden_layers=3, sliding_window=16, use_sliding_window=True, max_window_layers=2
    ),
}
made = {}


def model_of(name):
    "A small model with weights large enough that they matter, made once."
    if name not in made:
        made[name] = MODELS[name]()
        torch.manual_seed(1)
        for p in made[name].parameters():
            p.data.add_(0.1 * torch.randn_like(p))
    return made[name]


def random_ids(rows, n, seed=2):
    return torch.randint(4, 256, (rows, n), generator=torch.Generator().manual_seed(seed))


WHOLE, PIECES = [0, 150, *range(151, 158), 165, 166, 200], [0, 60, 110, 114, 115, 150, *range(151, 160)]
RUNS = [(name, "cake", "20%", left, cuts) for name in ("llama", "gpt2") for left in (0, 40) for cuts in (WHOLE, PIECES)]
ONE_PASS = [name for name, p in POLICIES.items() if p.needs in (None, "queries")]
RUNS += [("llama", policy, 48, 40, PIECES) for policy in ONE_PASS]
RUNS += [("llama", "cake", "mass=0.7", 40, PIECES), ("mixed", "snapkv", "20KiB", 0, PIECES)]


@pytest.mark.parametrize("name, policy, budget, left, cuts", RUNS)
def test_equal_to_the_masked_model(name, policy, budget, left, cuts):
    "The logits are those of stock attention with the evicted tokens masked, within the rounding of float32."
    model, ids = model_of(name), random_ids(2, 200)
    pad = torch.ones_like(ids)
    pad[1, :left] = 0
    cache = EvictingCache(model.config, EvictionConfig(budget, policy, window=8, slack=4, unit=1))
    a, b = both_ways(model, cache, ids, pad, cuts)
    assert cache.evictor.rounds > 2 and (a - b).abs().max() < 1e-5 * b.abs().max()


@pytest.mark.parametrize("ragged", [False, True])
def test_attention_of_a_slab_through_several_rounds(ragged):
    "One query and several, with padding, rows of equal and of unequal length."
    gen, (B, H, g, D) = torch.Generator().manual_seed(1), (2, 3, 2, 16)
    pad = torch.ones(B, 200, dtype=torch.bool)
    pad[1, :30] = False
    s, K, V = EvictingSlab(H, D, B, 1000), *torch.randn(2, B, H, 200, D, generator=gen)
    held = torch.zeros(B, H, 200, dtype=torch.bool)
    for a, b, drop in (0, 100, 0.5), (100, 101, 0.2), (101, 140, 0.5), (140, 141, 0), (141, 157, 0.6), (157, 158, 0.1):
        s.append(K[:, :, a:b], V[:, :, a:b])
        held[:, :, a:b] = True
        q, causal = torch.randn(B, H * g, b - a, D, generator=gen), torch.arange(b) <= torch.arange(a, b)[:, None]
        for mask in (None, causal & pad[:, None, None, :b]):
            full = (causal if mask is None else mask) & held[:, :, None, :b]
            full = full.expand(B, H, b - a, b).repeat_interleave(g, 1)
            want = reference_attention(q, K[:, :, :b], V[:, :, :b], full)
            real = torch.ones(B, b - a, dtype=torch.bool) if mask is None else pad[:, a:b]
            got = packed_attention(q, s.keys, s.values, slot_mask(s, mask, b - a))
            assert (got - want).transpose(1, 2)[real].abs().max() < 1e-5 and got.isfinite().all()
        drop = torch.rand(*(B, H) if ragged else (1, 1), b, generator=gen) < drop
        drop[..., -1] = False
        held[:, :, :b] &= ~drop
        s.keep(~drop.expand(B, H, b).gather(2, s.positions.clamp(max=b - 1)))
    assert s.ragged == ragged


class Rows:
    "What an evicting slab should hold: for each sequence and head a list of positions, and keys and values."

    def __init__(self, batch, heads, width):
        empty = torch.empty(0, width)
        self.rows = [[([], empty, empty) for _ in range(heads)] for _ in range(batch)]

    def append(self, k, v, start):
        for b, row in enumerate(self.rows):
            for h, (at, a, c) in enumerate(row):
                new = [*range(start, start + k.shape[2])]
                row[h] = at + new, torch.cat([a, k[b, h]]), torch.cat([c, v[b, h]])

    def keep(self, mask):
        for b, row in enumerate(self.rows):
            for h, (at, a, c) in enumerate(row):
                m = mask[b, h, : len(at)]
                row[h] = [x for x, y in zip(at, m) if y], a[m], c[m]

    def check(self, s):
        for b, row in enumerate(self.rows):
            for h, (at, k, v) in enumerate(row):
                n = s.lengths[b, h]
                assert s.positions[b, h, :n].tolist() == at and s.filled[b, h].sum() == len(at)
                assert torch.equal(s.keys[b, h, :n], k) and torch.equal(s.values[b, h, :n], v)


def test_slab_against_lists():
    "Through appending, dropping at random, reordering, copying and taking back."
    gen, s, want, seen = torch.Generator().manual_seed(0), EvictingSlab(3, 8, 2, 5000), Rows(2, 3, 8), 0
    for q, p, idx in (
        (300, 0.5, None),
        (1, 1, [1, 0]),
        (7, 0.3, None),
        (1, 0.9, [1, 1, 0]),
        (900, 0.1, [0, 2]),
        (1, 1, 0),
    ):
        k, v = torch.randn(2, len(want.rows), 3, q, 8, generator=gen)
        s.append(k, v)
        want.append(k, v, seen)
        seen += q
        keep = torch.rand(s.batch, 3, s.seq_len, generator=gen) < p
        keep[0, 1] |= p < 1
        s.keep(keep)
        want.keep(keep)
        if idx:
            s.select(torch.tensor(idx))
            want.rows = [[*want.rows[i]] for i in idx]
        want.check(s)
        want.check(copy.deepcopy(s))
        assert s.tokens_seen == seen
    s.truncate(seen - 1)
    want.keep(
        torch.arange(s.seq_len + 1).lt(torch.tensor([[len(r[0]) - 1 for r in row] for row in want.rows])[..., None])
    )
    want.check(s)
    with pytest.raises(ConfigError, match="have been evicted"):
        s.truncate(seen - 900)
    assert s.live == sum(len(at) for row in want.rows for at, *_ in row) * (2 * 8 * 4 + 4)


CEILINGS = [
    ("200KiB", 1, 300, 0),
    ("200KiB", 1, 60, 0),
    ("400KiB", 1, 300, 0),
    ("300KiB", 2, 150, 60),
    ("130KiB", 1, 120, 0),
]


@pytest.mark.parametrize("budget, batch, n, pads", CEILINGS)
def test_bytes_are_a_ceiling_at_every_token(budget, batch, n, pads):
    "Positions and padding included, for prompts that fit, just do not fit, and are far too long."
    model, new = model_of("llama"), 30
    ids = random_ids(batch, n + new, seed=n)
    mask = torch.ones_like(ids)
    mask[-1, :pads] = 0
    cache = EvictingCache(model.config, EvictionConfig(budget, window=8), prefault=False)
    limit, live, resident = cache.evictor.budget.amount, [], []
    for a, b in (0, n), *((i, i + 1) for i in range(n, n + new)):
        with torch.no_grad(), packed(model):
            model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache)
        live.append(cache.kv_bytes().live)
        if b % 10 == 0:
            rows = [s.key_rows for s in cache.slabs] + [s.value_rows for s in cache.slabs]
            resident += [sum(r.resident() or 0 for r in rows)] * rows[0].backend.startswith("mmap")
    assert max(live) <= limit and max(resident, default=0) <= limit
    token = batch * 3 * 2 * (2 * 16 * 4 + 4)
    fits = n + new <= limit // token // 64 * 64  # pages of 64 tokens
    assert (not cache.evictions) == fits and (fits or max(live) > limit / 2)


def test_cascade_equals_one_cut_at_the_end_in_whole_pages():
    "Cutting layers while later ones are still read keeps the same tokens, with less memory at the peak."
    model, ids, unit = model_of("llama"), random_ids(2, 300), 16
    caches = [EvictingCache(model.config, EvictionConfig(80, window=8, slack=10, unit=unit)) for _ in range(2)]
    caches[
        1
    ].evictor._cascade = False  # private: there is no other way to wait for the last layer; for this comparison alone
    for c in caches:
        with torch.no_grad(), packed(model):
            for a, b in (0, 250), *((i, i + 1) for i in range(250, 270)), (270, 300):
                model(ids[:, a:b], past_key_values=c)
    for s, t in zip(*(c.slabs for c in caches)):
        for name in ("positions", "keys", "values"):
            assert torch.equal(getattr(s, name)[s.filled], getattr(t, name)[t.filled])
    for a, b in zip(*(c.evictions for c in caches)):
        assert a | dict(lost=0, lost_max=0) == b | dict(lost=0, lost_max=0)
    assert sum(s.lengths for s in caches[0].slabs).unique().tolist() == [3 * 80]
    assert caches[0].peak < caches[1].peak


def test_h2o_adds_up_all_attention():
    "Its sums are those of the full attention matrix, and keep up through evictions."
    model, ids = model_of("llama"), random_ids(1, 150)
    cache = EvictingCache(model.config, EvictionConfig(149, "h2o", window=8, slack=50, unit=1))
    with torch.no_grad():
        with packed(model):
            for a, b in (0, 120), (120, 121), (121, 150):
                model(ids[:, a:b], past_key_values=cache)
        model.set_attn_implementation("eager")
        attention = model(ids, output_attentions=True).attentions
        model.set_attn_implementation("sdpa")
    for layer, a in zip(cache.slab_layers, attention):
        want = a[0].sum(1).unflatten(0, (2, 2)).mean(1).gather(1, layer.slab.positions[0])
        assert layer.slab.position_rows is not None and (layer.received[0] - want).abs().max() < 1e-4


MODES = [dict(do_sample=False), dict(num_beams=3), dict(do_sample=True, num_return_sequences=3)]
MODES += [dict(prompt_lookup_num_tokens=3), dict(prefill_chunk_size=50)]


@pytest.mark.parametrize("budget", ["25%", "mass=0.8"])
@pytest.mark.parametrize("mode", MODES, ids=lambda m: next(iter(m)))
def test_every_way_to_generate(mode, budget):
    "Greedy, beams, several samples, prompt lookup and a prompt in pieces all evict, and lose a share below 1."
    model, ids = model_of("llama"), random_ids(1, 60).repeat(1, 2)
    cache = EvictingCache(model.config, EvictionConfig(budget, window=16, slack=8, unit=1))
    kw = dict(attention_mask=torch.ones_like(ids), max_new_tokens=24, min_new_tokens=24, pad_token_id=0)
    with packed(model):
        model.generate(ids, past_key_values=cache, **kw, **mode)
    assert cache.evictor.rounds > 1 and all(0 < r["lost"] < 1 for r in cache.evictions)


def test_a_copy_goes_on_alone_and_a_reset_starts_anew():
    "A copy has an evictor of its own, which knows the layers of the copy and not those of the original."
    model, ids = model_of("llama"), random_ids(1, 100)
    cache = EvictingCache(model.config, EvictionConfig("25%", window=16, slack=8, unit=1))
    with torch.inference_mode(), packed(model):
        model(ids, past_key_values=cache)
    fork = copy.deepcopy(cache)
    with torch.no_grad(), packed(model):
        a, b = (model(ids[:, :30], past_key_values=c).logits for c in (cache, fork))
    assert torch.equal(a, b) and fork.evictor is not cache.evictor
    assert all(x is y for x, y in zip(fork.evictor.layers, fork.slab_layers))
    assert all(layer.evictor is fork.evictor for layer in fork.slab_layers)
    cache.reset()
    assert (cache.get_seq_length(), cache.kv_bytes().live, cache.evictor.live) == (0, 0, 0)
    assert fork.get_seq_length() == 130 and fork.kv_bytes().live > 0


def test_what_cannot_be_is_refused():
    "Cropping works; a mask of numbers and a budget below the window do not."
    model, ids = model_of("llama"), random_ids(1, 100)
    cache = EvictingCache(model.config, EvictionConfig("25%", window=16, slack=8, unit=1))
    with torch.no_grad(), packed(model):
        model(ids, past_key_values=cache)
        cache.crop(-5)
        assert cache.get_seq_length() == 95
        with pytest.raises(ConfigError, match="takes masks of bool"):
            model(ids[:, :1], attention_mask=torch.zeros(1, 1, 1, 96), past_key_values=cache)
        with pytest.raises(BudgetError, match="always kept"):
            model(ids, past_key_values=EvictingCache(model.config, EvictionConfig("3KiB", window=16)))


def test_a_large_budget_is_exact_with_padding():
    "Where nothing has to go, the logits are bit-identical to those of a slab cache, whatever the unit of the budget."
    model, ids = model_of("llama"), random_ids(2, 100)
    mask = torch.ones_like(ids)
    mask[1, :50] = 0
    kw = dict(attention_mask=mask, max_new_tokens=10, min_new_tokens=10, do_sample=False, pad_token_id=0)
    kw |= dict(output_logits=True, return_dict_in_generate=True)
    with packed(model):
        want = torch.stack(model.generate(ids, past_key_values=SlabCache(model.config), **kw).logits)
        for budget in (120, 10_000, "100%", "250%", "1GiB", "mass=1"):
            cache = EvictingCache(model.config, EvictionConfig(budget, window=8))
            got = model.generate(ids, past_key_values=cache, **kw)
            assert torch.equal(torch.stack(got.logits), want) and cache.evictions == [], budget
