"Bytes and bits of each layer, chosen from tables of all kinds: never more than the budget"

import numpy as np
import pytest
import torch
import transformers as T

from llmopt.errors import BudgetError, ConfigError, LlmoptError
from llmopt.kv_cache import KVCacheConfig, SlabCache
from llmopt.kv_cache import allotted_cache as allotted
from llmopt.kv_cache.bit_table import LossTable
from llmopt.kv_cache.quantize import BITS

SHARES = [1.0, 0.5, 0.25, 0.1, 0.05]
TOKENS = 400  # of the contexts that a table is made for


@pytest.fixture(scope="module")
def model():
    "A Llama of four layers with random weights."
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=128, intermediate_size=16, num_hidden_layers=4, num_attention_heads=4)
    return T.AutoModelForCausalLM.from_config(T.LlamaConfig(**sizes, num_key_value_heads=2)).eval()


def table(seed):
    "Losses that fall with bits and tokens, otherwise random; some layers do not mind anything."
    rng = np.random.default_rng(seed)
    bits = rng.random((4, 1, 1)) * np.array([0, rng.random(), 2])[None, :, None] * rng.integers(0, 2, (4, 1, 1))
    tokens = rng.random((4, 1, 1)) * (1 - np.array(SHARES)) * rng.integers(0, 2, (4, 1, 1))
    return LossTable((bits + tokens).tolist(), SHARES, dict(tokens=TOKENS))


@pytest.mark.parametrize("seed, percent", [*enumerate((8, 10, 12.5, 25, 40, 60))])
def test_bytes_stay_within_the_budget(seed, percent, model, monkeypatch):
    monkeypatch.setattr(allotted, "table_of", lambda _: table(seed))
    kv, full = KVCacheConfig(bits="auto", budget=f"{percent}%", policy="keydiff"), 4 * 2 * 2 * 32 * 4
    cache, ids = kv.make_cache(model), torch.randint(0, 64, (1, 700), generator=torch.Generator().manual_seed(seed))
    assert {c.bits for c in cache.choices} <= {*BITS} and kv.chosen(model).startswith("the KV budget is divided")
    ends = (TOKENS, *range(TOKENS + 1, TOKENS + 20), 600, 700)
    for a, b in zip((0, *ends), ends):
        with torch.no_grad(), kv.attach(model):
            model(ids[:, a:b], past_key_values=cache)
        assert cache.kv_bytes().live <= percent / 100 * b * full
    assert cache.get_seq_length() == 700 and cache.kv_bytes().live > 0.6 * percent / 100 * 700 * full


def test_the_whole_budget_is_bit_identical(model, monkeypatch):
    monkeypatch.setattr(allotted, "table_of", lambda _: table(0))
    kv, ids = KVCacheConfig(bits="auto", budget="100%", policy="keydiff"), torch.arange(150)[None] % 64
    caches = kv.make_cache(model), SlabCache(model.config)
    with torch.no_grad(), kv.attach(model):
        for a, b in (0, 140), *((i, i + 1) for i in range(140, 150)):
            x, y = (model(ids[:, a:b], past_key_values=c).logits for c in caches)
            assert torch.equal(x, y)
    assert caches[0].kv_bytes().live == caches[1].kv_bytes().live


def test_what_cannot_be_chosen_is_refused(model, monkeypatch):
    with pytest.raises(ConfigError, match="fit_bits.measure_table"):
        KVCacheConfig(bits="auto", budget="25%", policy="keydiff").make_cache(model)
    for budget in None, 512, "64MiB", "mass=0.9":
        with pytest.raises(ConfigError, match="share of the bytes"):
            KVCacheConfig(bits="auto", budget=budget)
    with pytest.raises(LlmoptError):
        KVCacheConfig(bits="automatic", budget="25%")
    monkeypatch.setattr(allotted, "table_of", lambda _: table(0))
    with pytest.raises(BudgetError, match="or more"):
        KVCacheConfig(bits="auto", budget="1%", policy="keydiff").make_cache(model)
