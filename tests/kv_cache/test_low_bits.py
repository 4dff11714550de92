"""A cache of 8 or 4 bits is the stock cache with older tokens rounded, whatever `generate` does and was evicted.

Both sides are read by the same attention: a difference in the last digit could round a number to the next code.
"""

import copy
import json
from contextlib import nullcontext

import pytest
import torch
import transformers as T

from helpers import small_config, small_model
from llmopt.engine.fused import EnhancedFusedLLMEngine, Recipe
from llmopt.engine.prompt_cache import copy_prefix
from llmopt.errors import ConfigError, LlmoptError, UnsupportedModelError
from llmopt.kv_cache import EvictionConfig, KVCacheConfig, LowBitCache, LowBitEvictingCache, PrefixStore, decode_kernel
from llmopt.kv_cache.attention import packed
from llmopt.kv_cache.low_bit_cache import LowBitEvictingLayer

from .rounded import RoundedCache, RoundedSlab
from .test_equality import MODES, generate, prompt, same

MODELS = {  # heads of 32, so that 4 bits hold them
    "llama": lambda: small_model("llama", vocab_size=256, head_dim=32),
    "qwen3": lambda: small_model("qwen3", vocab_size=256, head_dim=32),
    "gpt2": lambda: small_model("gpt2", vocab_size=256, n_embd=64, n_head=2, pad_token_id=5),
    "phi": lambda: small_model("phi2", vocab_size=256, hidden_size=64, num_attention_heads=2, num_key_value_heads=2),
}
LOW = [(8, None), (8, 12), (4, None), (4, 3)]  # bits, window
pytestmark = pytest.mark.filterwarnings("ignore")
_models = {}


@pytest.fixture(autouse=True)
def _read_by_torch(monkeypatch):
    "Both sides add up in the same order; what the kernel reads is compared in `test_decode_kernel.py`."
    monkeypatch.setattr(decode_kernel, "FROM", 10**9)


def model_of(name):
    "The model, made once, with weights large enough that its tokens differ."
    if name not in _models:
        _models[name] = MODELS[name]()
        torch.manual_seed(0)
        for p in _models[name].parameters():
            p.data.add_(0.1 * torch.randn_like(p))
    return _models[name]


RUNS = [("llama", mode, "packed", *low) for mode in MODES for low in (LOW[0], LOW[2])]
RUNS += [("llama", mode, "packed", *low) for mode in ("greedy", "beams", "padded") for low in (LOW[1], LOW[3])]
RUNS += [("llama", mode, "stock", *low) for mode in ("greedy", "beams", "prompt_lookup") for low in (LOW[0], LOW[2])]
RUNS += [(name, "greedy", "packed", *low) for name in ("qwen3", "gpt2", "phi") for low in (LOW[0], LOW[2])]


@pytest.mark.parametrize("name, mode, attention, bits, window", RUNS)
def test_every_way_to_generate(name, mode, attention, bits, window):
    "Greedy, sampling, beams, several sequences, prompt lookup, a prompt in chunks, padding on the left."
    model, (ids, mask) = model_of(name), prompt(dict(prompt_lookup=1, padded=3).get(mode, 2), 60)
    if mode.startswith("padded"):
        mask[1, :5] = 0
        mask[2:, :11] = 0
    read = packed if attention == "packed" else nullcontext
    with read(model):
        want = generate(model, RoundedCache(model.config, bits, window), ids, mask, 24, **MODES[mode])
        cache = LowBitCache(model.config, bits, window, attention=attention)
        got = generate(model, cache, ids, mask, 24, **MODES[mode])
    same(got, want, exact=False)
    assert cache.slabs[0].coded.seq_len > 30


@pytest.mark.parametrize("bits, window", LOW[:3])
def test_assisted_decoding(bits, window):
    """A small model drafts, and what it guessed wrong is taken back, out of the window and out of the records.

    Not with a window of 3 at 4 bits: groups cut short are encoded anew, which `RoundedLayer` does not."""
    model, (ids, mask) = model_of("llama"), prompt(1, 60)
    draft = small_model("llama", seed=1, vocab_size=256, num_hidden_layers=1)
    with packed(model):
        caches = RoundedCache(model.config, bits, window), LowBitCache(model.config, bits, window)
        want, got = (generate(model, c, ids, mask, 30, do_sample=False, assistant_model=draft) for c in caches)
    same(got, want, exact=False)


@pytest.mark.parametrize("bits, window", LOW)
def test_batch_operations_and_copies(bits, window):
    "Repeating and selecting sequences, taking tokens back inside a group of keys, then going on; a copy does the same."
    model, (ids, _) = model_of("llama"), prompt(2, 90)
    caches = [LowBitCache(model.config, bits, window), RoundedCache(model.config, bits, window)]
    with torch.no_grad(), packed(model):
        for c in caches:
            model(ids, past_key_values=c)
            model(ids[:, :1], past_key_values=c)
            c.batch_repeat_interleave(2)
            c.batch_select_indices(torch.tensor([3, 0, 1]))
            c.crop(-40)
            c.reorder_cache(torch.tensor([2, 2, 0]))
        caches.append(copy.deepcopy(caches[0]))
        for q in (3, 50, 1, 1):
            a, b, c = (model(ids[:1, :q].repeat(3, 1), past_key_values=c).logits for c in caches)
            assert (a - b).abs().max() <= 1e-5 * b.abs().max() and torch.equal(a, c)
    assert len({c.get_seq_length() for c in caches}) == 1


@pytest.mark.parametrize("bits, window", LOW)
def test_a_part_of_a_conversation_is_copied_as_it_is_stored(bits, window):
    "The engine copies the beginning of a kept cache; that is a copy of the cache, cropped."
    model, (ids, _) = model_of("llama"), prompt(1, 90)
    kept, fresh = (LowBitCache(model.config, bits, window) for _ in "ab")
    with torch.no_grad(), packed(model):
        model(ids, past_key_values=kept)
        assert copy_prefix(kept, 50, fresh)
        cropped = copy.deepcopy(kept)
        cropped.crop(-40)
        a, b = (model(ids[:, :20], past_key_values=c).logits for c in (fresh, cropped))
    assert torch.equal(a, b) and (kept.get_seq_length(), fresh.get_seq_length()) == (90, 70)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_conversation_goes_on(name):
    "Each turn sends all tokens so far, and the cache knows the older ones rounded."
    model, (new, _) = model_of(name), prompt(1, 50)
    caches, ids = (LowBitCache(model.config, 8), RoundedCache(model.config, 8)), torch.empty(1, 0, dtype=torch.long)
    for _ in range(3):
        ids = torch.cat([ids, new], 1)
        with packed(model):
            a, b = (generate(model, c, ids, torch.ones_like(ids), 5, do_sample=False) for c in caches)
        same(a, b, exact=False)
        ids = a[0]


BUDGETS = [  # budget, policy, who competes, bits, window, padding on the left
    ("20%", "cake", None, 8, None, 40),
    ("20%", "keydiff", "heads", 8, 12, 0),
    ("130KiB", "streaming_llm", None, 8, None, 0),
    (80, "h2o", None, 4, 3, 40),
    ("mass=0.7", "snapkv", None, 4, None, 0),
    ("20%", "keydiff", "heads", 4, None, 40),
]


@pytest.mark.parametrize("budget, policy, share, bits, window, left", BUDGETS)
def test_under_a_budget(monkeypatch, budget, policy, share, bits, window, left):
    "The same tokens stay, and the logits are those of a slab in full precision that rounds row by row."
    model, ids = model_of("llama"), torch.randint(4, 256, (2, 300), generator=torch.Generator().manual_seed(2))
    e, mask = EvictionConfig(budget, policy, window=32, slack=8, unit=1, share=share), torch.ones_like(ids)
    mask[1, :left] = 0
    caches = [LowBitEvictingCache(model.config, e, bits, window) for _ in "ab"]
    cuts = [0, 150, *range(150, 170), 190, 200, 290, *range(290, 301)]
    for a, b in zip(cuts, cuts[1:]):
        if a == b:
            continue
        logits = []
        for cache, kind in zip(caches, (LowBitEvictingLayer.slab_type, RoundedSlab)):
            monkeypatch.setattr(LowBitEvictingLayer, "slab_type", kind)
            with torch.no_grad(), packed(model):
                logits.append(model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits)
            monkeypatch.undo()
        x, y = (t[mask[:, a:b].bool()] for t in logits)
        assert (x - y).abs().max() <= 1e-5 * y.abs().max()
    assert caches[0].evictor.rounds == caches[1].evictor.rounds > 1
    for s, t in zip(*(c.slabs for c in caches)):
        assert torch.equal(s.lengths, t.lengths) and torch.equal(s.positions[s.filled], t.positions[t.filled])


@pytest.mark.parametrize("bits", [8, 4])
def test_a_prefix_is_restored_as_it_was_computed(tmp_path, bits):
    "From the front, from the back and from both ends, bit-identical, out of files of fewer bytes."
    model, ids = model_of("llama"), prompt(1, 65 * 4)[0]

    def logits(store, bits=bits):
        cache = KVCacheConfig(bits=bits).make_cache(model)
        with torch.no_grad(), packed(model):
            report = store.prefill(model, cache, ids)
            return report, model(ids[:, report.tokens :], past_key_values=cache).logits

    store, full = PrefixStore(tmp_path / "low", chunk=64), PrefixStore(tmp_path / "full", chunk=64)
    first, want = logits(store)
    assert (first.computed, first.hits, first.tokens) == (4, 0, 256)
    for meet in (0, 2, 4):
        store.meet_at = meet
        report, got = logits(store)
        assert (report.loaded, report.computed, report.damaged) == (4 - meet, meet, 0) and torch.equal(got, want)
    logits(full, 16)
    low, whole = (sum(f.stat().st_size for f in s.folder.glob("*.safetensors")) for s in (store, full))
    assert low < {8: 0.33, 4: 0.25}[bits] * whole  # of float32; with the heads of the files
    assert logits(store, 12 - bits)[0].hits == 0  # the other number of bits has other names


def test_a_chunk_holds_whole_groups(tmp_path):
    "Chunks of 16 tokens are no groups of 32; 8 bits have no groups."
    model, ids = model_of("llama"), prompt(1, 65)[0]
    store = PrefixStore(tmp_path, chunk=16)
    with packed(model):
        with pytest.raises(ConfigError, match="multiple of 32"):
            store.prefill(model, LowBitCache(model.config, 4), ids)
        assert store.prefill(model, LowBitCache(model.config, 8), ids).computed == 4


def test_an_eviction_after_a_restore(tmp_path):
    "A budget with a store: the prefix comes in few bits, and the prompt's end evicts from it."
    model, ids = model_of("llama"), prompt(1, 300)[0]
    store, kv = PrefixStore(tmp_path, chunk=32), KVCacheConfig(bits=8, budget="25%")
    for _ in "ab":
        cache = kv.make_cache(model)
        with torch.no_grad(), kv.attach(model):
            report = store.prefill(model, cache, ids)
            model(ids[:, report.tokens :], past_key_values=cache)
    assert report.loaded and cache.evictor.rounds == 1 and cache.get_seq_length() == 300


SLIDING = dict(sliding_window=16, use_sliding_window=True, max_window_layers=1)


def test_what_few_bits_cannot_hold():
    "Sliding and other layers, odd heads, latent attention; keys that nobody attached; sizes that are none."
    with pytest.raises(UnsupportedModelError, match="full attention in all layers"):
        KVCacheConfig(bits=8).make_cache(small_model("qwen3", **SLIDING))
    with pytest.raises(UnsupportedModelError, match="full attention in all layers"):
        KVCacheConfig(bits=8, budget="25%").make_cache(small_model("qwen3", **SLIDING))
    for kw, bits in (dict(head_dim=48), 4), (dict(), 4):
        with pytest.raises(ConfigError, match="head size"):
            LowBitCache(small_config(**kw), bits)
    latent = small_config(head_dim=32)
    latent.kv_lora_rank = 16
    with pytest.raises(UnsupportedModelError, match="latent attention"):
        LowBitCache(latent)
    model, (ids, _) = model_of("llama"), prompt(1)
    with torch.no_grad(), pytest.raises(LlmoptError, match="low bits.*kv.attach"):
        model(ids, past_key_values=LowBitCache(model.config))
    for kw in dict(window=-1), dict(window=2.5), dict(bits=True), dict(bits=12):
        with pytest.raises(ConfigError):
            LowBitCache(model.config, **kw)


def test_full_reservations_and_closed_caches_are_one_line():
    "As with a cache of full precision."
    model, (ids, _) = model_of("llama"), prompt(1, 60)
    cache = LowBitCache(model.config, 8, max_seq_len=50)
    with torch.no_grad(), packed(model), pytest.raises(ConfigError, match="60 tokens do not fit .*max_seq_len"):
        model(ids, past_key_values=cache)
    cache.close()
    with torch.no_grad(), packed(model), pytest.raises(LlmoptError, match="closed"):
        model(ids, past_key_values=cache)


RECIPES = ["kv:bits=8", "kv:bits=4,window=64", "kv:bits=8,budget=25%", "words+kv:bits=4,budget=1MiB"]


@pytest.mark.parametrize("text", RECIPES)
def test_a_recipe_of_few_bits_has_a_name_and_survives_json(text):
    "The id of the recipe and its JSON are read back as the same recipe."
    r = Recipe.parse(text)
    assert Recipe.parse(r.id) == r == Recipe.from_dict(json.loads(json.dumps(r.to_dict()))) and "bits=" in r.id


@pytest.mark.parametrize("text", ["kv:bits=3", "kv:bits=much", "kv:window=4", "kv:bits=8,window=500,budget=64"])
def test_what_is_no_recipe_of_few_bits_is_refused_in_one_line(text):
    "Other numbers of bits, a window of full precision in full precision, and one that is larger than the budget."
    with pytest.raises(LlmoptError, match="bad parameters") as e:
        Recipe.parse(text)
    assert "\n" not in str(e.value)


def test_an_answer_in_few_bits():
    "Fewer bytes; the model of the package computes in float32, so that 8 bits are a quarter."
    text = "The river runs from the hills to the sea, and the people of the town drink its water. " * 12
    recipes = map(Recipe.parse, ("kv", "kv:bits=8", "kv:bits=8,budget=25%"))
    engines = [EnhancedFusedLLMEngine("llmopt-tiny", device="cpu", recipe=r) for r in recipes]
    full, low, both = (e.run(text, max_new_tokens=12, fixed=True) for e in engines)
    assert low.kv_bytes_live < 0.33 * full.kv_bytes_live and both.kv_bytes_live <= 0.25 * full.kv_bytes_live
    assert low.prompt_tokens == full.prompt_tokens and len(low.output_ids) == 12


def test_bfloat16_takes_half_the_bytes():
    "53 % with the scales; the model's own precision is what keys and values are decoded to."
    model, ids = copy.deepcopy(model_of("llama")).to(torch.bfloat16), prompt(1, 400)[0]
    full, low = KVCacheConfig().make_cache(model), LowBitCache(model.config, 8)
    with torch.no_grad(), packed(model):
        x, y = (model(ids, past_key_values=c).logits for c in (full, low))
        assert torch.equal(x, y)  # within its own step a prompt is read exactly
        model(ids[:, :1], past_key_values=low)
    assert low.slabs[0].keys.dtype == torch.bfloat16
    assert low.kv_bytes().live <= (34 / 64 * 400 + 17) / 400 * full.kv_bytes().live


def test_the_stock_class_of_transformers_is_no_equal():
    "Its 8-bit floats share one scale in a layer; ours are closer to full precision on the same tokens."
    model, ids = model_of("llama"), prompt(1, 200)[0]
    caches = T.DynamicCache(config=model.config), T.QuantizedCache("fp8", model.config), LowBitCache(model.config, 8)
    with torch.no_grad(), packed(model):
        for c in caches:
            model(ids[:, :150], past_key_values=c)
        full, theirs, ours = (model(ids[:, 150:], past_key_values=c).logits for c in caches)
    assert (ours - full).abs().mean() < (theirs - full).abs().mean() / 2


@pytest.mark.parametrize("bits", [8, 4])
def test_the_books_follow_sequences_that_come_and_go(bits):
    "Repeated, reordered and left out, the bytes that the layers noted are those that they hold."
    model = MODELS["llama"]()
    cache = LowBitCache(model.config, bits)
    with torch.no_grad(), packed(model):
        model(torch.arange(90)[None], past_key_values=cache)
        for change, idx in (
            (cache.batch_repeat_interleave, 3),
            (cache.reorder_cache, torch.tensor([2, 0, 0])),
            (cache.batch_select_indices, torch.tensor([1])),
        ):
            change(idx)
            assert cache.tally.live == cache.kv_bytes().live <= cache.peak
