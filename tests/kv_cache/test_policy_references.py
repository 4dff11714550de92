"""Each policy against a slow reference of its formula, written from the paper and sharing no code with ours."""

import math

import pytest
import torch

from helpers import small_model
from llmopt.kv_cache import EvictingCache, EvictionConfig
from llmopt.kv_cache.attention import packed
from llmopt.kv_cache.policies import POLICIES

N, WINDOW, HEADS, GROUP, SIZE = 90, 8, 2, 2, 16


@pytest.fixture(scope="module")
def model():
    made = small_model("llama", vocab_size=256, num_hidden_layers=2, head_dim=SIZE)
    torch.manual_seed(1)
    for p in made.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return made


def ids(n=N):
    return torch.randint(4, 256, (1, n), generator=torch.Generator().manual_seed(3))


def read(model, policy, budget="100%", **kw):
    "A cache that has read the text."
    cache = EvictingCache(model.config, EvictionConfig(budget, policy, window=WINDOW, unit=1, **kw))
    with torch.no_grad(), packed(model):
        model(ids(), past_key_values=cache)
    return cache


def scores_of(cache):
    "What the policy of a cache says now: (H, n) for each layer."
    return [cache.evictor.policy.score(l.observe(None, SIZE**-0.5))[0] for l in cache.slab_layers]


def projections(model):
    "Queries (Hq, n, D) of each layer before they are turned, from hooks on the stock model."
    found, handles = [], []
    for layer in model.model.layers:
        handles.append(layer.self_attn.q_proj.register_forward_hook(lambda m, i, o: found.append(o[0])))
    with torch.no_grad():
        model(ids(), use_cache=False)
    for h in handles:
        h.remove()
    return [q.view(N, HEADS * GROUP, SIZE).transpose(0, 1).double() for q in found]


def rotation_matrix(model, position):
    "The turn of a position as a matrix (D, D), from the definition."
    theta, half = model.config.rope_parameters["rope_theta"], SIZE // 2
    turn = torch.zeros(SIZE, SIZE, dtype=torch.double)
    for i in range(half):
        angle = position * theta ** (-2 * i / SIZE)
        a, b = i, i + half
        turn[a, a] = turn[b, b] = math.cos(angle)
        turn[a, b], turn[b, a] = -math.sin(angle), math.sin(angle)
    return turn


def test_expected_attention(model):
    "Mean and covariance of the queries, turned by the mean matrix of the next 512 positions."
    cache = read(model, "expected")
    mean_turn = sum(rotation_matrix(model, p) for p in range(N, N + 512)) / 512
    for layer, q, got in zip(cache.slab_layers, projections(model), scores_of(cache)):
        for h in range(HEADS):
            keys, values = layer.slab.keys[0, h].double(), layer.slab.values[0, h].double()
            weights = torch.zeros(N, dtype=torch.double)
            for g in range(GROUP):
                some = q[h * GROUP + g, 4:]  # without the first tokens
                mu = mean_turn @ some.mean(0)
                rest = some - some.mean(0)
                sigma = mean_turn @ (rest.T @ rest / len(some)) @ mean_turn.T
                logits = [k @ mu / SIZE**0.5 + k @ sigma @ k / (2 * SIZE) for k in keys]
                weights += torch.stack(logits).softmax(0) / GROUP
            want = (weights + 0.01) * values.norm(dim=-1)
            assert (got[h] - want).abs().max() < 1e-3 * want.max()


def test_expected_attention_in_pieces_and_with_padding(model):
    "The moments are those of one piece without padding."
    whole = scores_of(read(model, "expected"))
    cache = EvictingCache(model.config, EvictionConfig("100%", "expected", window=WINDOW, unit=1))
    padded = torch.cat([torch.zeros(1, 20, dtype=torch.long), ids()], 1).repeat(2, 1)
    mask = torch.ones_like(padded)
    mask[:, :20] = 0
    at = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), packed(model):
        for a, b in (0, 60), (60, 61), (61, 110):
            kw = dict(attention_mask=mask[:, :b], position_ids=at[:, a:b])
            model(padded[:, a:b], past_key_values=cache, **kw)
    visible = mask.bool()
    for layer, want in zip(cache.slab_layers, whole):
        got = cache.evictor.policy.score(layer.observe(visible, SIZE**-0.5))
        assert (got[:, :, 20:] - want).abs().max() < 1e-3 * want.max()


def test_keydiff(model):
    "The cosine of each key with the mean of all directions, in loops."
    cache = read(model, "keydiff")
    for layer, got in zip(cache.slab_layers, scores_of(cache)):
        for h in range(HEADS):
            keys = [k / k.norm() for k in layer.slab.keys[0, h].double()]
            anchor = sum(keys) / len(keys)
            want = torch.tensor([-(k @ anchor / anchor.norm()).item() for k in keys])
            assert (got[h] - want).abs().max() < 1e-5


@pytest.mark.parametrize("policy", ["snapkv", "cake", "keydiff", "expected"])
def test_head_budgets(model, policy):
    "AdaKV, by a plain search: a fifth of an even division for each head, the rest to the best of all heads."
    kept = 40
    cache, judged = read(model, policy, kept, share="heads", slack=0), read(model, policy)
    layers = zip(cache.slabs, judged.slab_layers, scores_of(judged))
    totals = [int(s.lengths.sum()) for s in cache.slabs]
    assert sum(totals) == 2 * HEADS * kept
    for total, (slab, _, scores) in zip(totals, layers):
        safe = torch.zeros(N, dtype=torch.bool)
        safe[:4] = safe[-WINDOW:] = True
        held, ends = [int(n) for n in slab.lengths[0]], []
        assert min(held) >= int(0.2 * total / HEADS)
        for h in range(HEADS):
            at = slab.positions[0, h, : held[h]]
            inside = torch.zeros(N, dtype=torch.bool)
            inside[at] = True
            assert inside[safe].all()
            best = scores[h].masked_fill(safe, torch.inf).argsort(descending=True, stable=True)[: held[h]]
            assert {*best.tolist()} == {*at.tolist()}  # the best of its head
            ends.append((scores[h][inside & ~safe], scores[h][~inside]))
        (mine, left), (theirs, missing) = ends
        if min(held) > total / 9 + 2 and max(held) < N:  # nobody lives by the safeguard alone, or has everything
            assert mine.min() >= missing.max() - 1e-6 and theirs.min() >= left.max() - 1e-6  # nobody would swap


def test_all_heads_of_all_layers(model):
    "The best scores of the whole model stay, beside what is always kept, and all rows together hold the budget."
    cache, judged = read(model, "keydiff", 40, share="model", slack=0), read(model, "keydiff")
    scores = torch.stack(scores_of(judged))  # (layers, H, n)
    scores[..., :4] = scores[..., -WINDOW:] = torch.inf
    # the second layer of the cut cache has read what the first one, cut, has not changed: one forward pass
    total = 2 * HEADS * 40
    best = torch.zeros(scores.numel(), dtype=torch.bool)
    best[scores.flatten().argsort(descending=True, stable=True)[:total]] = True
    for slab, want in zip(cache.slabs, best.view(scores.shape)):
        for h in range(HEADS):
            assert slab.positions[0, h, : slab.lengths[0, h]].tolist() == want[h].nonzero().flatten().tolist()


def test_every_policy_has_a_reference():
    "A policy that is added here or elsewhere is tested against its formula somewhere: say where."
    where = dict(
        cake="test_eviction.py",
        snapkv="test_eviction.py",  # the mean of cake's statistics
        pyramidkv="test_policies.py",
        h2o="test_eviction_equality.py",
        streaming_llm="test_policies.py",
        random="nothing to compare with",
        expected="here",
        keydiff="here",
        kvzip="test_second_pass.py",
        foreseen="test_foreseen.py",
    )
    assert where.keys() == POLICIES.keys()
