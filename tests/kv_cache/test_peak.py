"""While a prompt is read in pieces, a budget holds as well: at most 1.3 times of it, and one piece in one layer."""

import pytest
import torch

from helpers import ROOT, small_model
from llmopt.core import load
from llmopt.kv_cache import EvictingCache, EvictionConfig, SlabCache, eviction
from llmopt.kv_cache.attention import packed

LAYERS, HEADS, WIDTH = 12, 2, 16
TOKEN = HEADS * (2 * WIDTH * 4 + 4)  # bytes of a token in a layer, with its position
made = {}


def model():
    "A Llama of many layers, made once."
    if not made:
        made["it"] = small_model("llama", vocab_size=256, num_hidden_layers=LAYERS, head_dim=WIDTH)
        torch.manual_seed(1)
        for p in made["it"].parameters():
            p.data.add_(0.1 * torch.randn_like(p))
    return made["it"]


def read(budget, policy, chunk, n=480):
    "A cache that has read `n` tokens in pieces of `chunk`."
    cache = EvictingCache(model().config, EvictionConfig(budget, policy, window=8, unit=1))
    ids = torch.randint(4, 256, (1, n), generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), packed(model()):
        for piece in ids.split(chunk, 1):
            model()(piece, past_key_values=cache)
    return cache


@pytest.mark.parametrize("policy", ["cake", "snapkv", "pyramidkv", "random"])
@pytest.mark.parametrize("budget, chunk", [(60, 30), (60, 60), (60, 240), ("12.5%", 60), ("60KiB", 60)])
def test_the_peak_is_bounded(policy, budget, chunk):
    "And what is held in the end is what the budget allows."
    cache = read(budget, policy, chunk)
    if isinstance(budget, str) and budget.endswith("KiB"):
        allowed = cache.evictor.budget.amount
    else:
        allowed = 60 * LAYERS * TOKEN
    assert cache.peak <= 1.3 * allowed + chunk * TOKEN
    assert 0.8 * allowed < cache.kv_bytes().live <= allowed


def test_without_the_bound_it_would_be_half_as_much_again(monkeypatch):
    "Pieces as long as the budget: layers still to come hold their old shares on top of the whole budget."
    monkeypatch.setattr(eviction, "PEAK", 100)
    assert read(60, "snapkv", 60).peak > 1.4 * 60 * LAYERS * TOKEN


@pytest.mark.parametrize("policy", ["snapkv", "random"])
def test_equal_layers_keep_what_they_kept(policy, monkeypatch):
    "The bound changes when tokens go, not which, where every layer gets as much."
    bounded = read(60, policy, 60)
    monkeypatch.setattr(eviction, "PEAK", 100)
    for s, t in zip(bounded.slabs, read(60, policy, 60).slabs):
        assert torch.equal(s.positions, t.positions) and torch.equal(s.keys, t.keys)


def test_one_piece_holds_one_layer_beyond_the_budget():
    "Where the whole prompt is one piece, later layers are empty: .29 of the whole in six layers at an eighth."
    n, cache = 480, read("12.5%", "snapkv", 480)
    whole = n * LAYERS * TOKEN
    assert cache.peak <= (0.125 + 1 / LAYERS) * whole


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.parametrize("chunk", [256, 1024])
def test_the_real_model_at_4k(chunk):
    "SmolLM2 reads 4,096 tokens at 12.5 %: live bytes, and those of the operating system at every layer."
    lm = load("smollm2", "cpu")
    text = "".join(
        (ROOT / name).read_text(encoding="utf-8") for name in ("CHANGELOG.md", "README.md", "CONTRIBUTING.md")
    )
    ids = lm.tokenizer(text, return_tensors="pt").input_ids[:, :4096]
    assert ids.shape[1] == 4096
    cache = EvictingCache(lm.model.config, EvictionConfig("12.5%"), prefault=False)
    evictor, resident = cache.evictor, []
    account = evictor.account

    def measured(layer):
        account(layer)
        if layer.index % 10 == 9:
            resident.append(cache.kv_bytes().resident or 0)

    evictor.account = measured
    with torch.no_grad(), packed(lm.model):
        for piece in ids.split(chunk, 1):
            lm.model(piece, past_key_values=cache, logits_to_keep=1)
    s = cache.slabs[0]
    token = s.num_heads * (s.key_rows.token_bytes + s.value_rows.token_bytes + 4)
    allowed = 1.3 * evictor.limits(None)[0][0] * len(evictor.layers) * token + chunk * token
    rows = len(cache.slabs) * s.num_heads
    assert cache.peak <= allowed
    assert max(resident) <= allowed + rows * 2 * 4096 + 2**21  # a page begun in each row, and rows of positions
    whole = SlabCache(lm.model.config)
    with torch.no_grad(), packed(lm.model):
        lm.model(ids[:, :64], past_key_values=whole)
    assert cache.kv_bytes().live <= 0.13 * 4096 * whole.kv_bytes().live / 64
