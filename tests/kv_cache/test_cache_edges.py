"The slab cache at its limits: sizes, slots, installed caches, encoder-decoders, memory that goes when it must."

import gc
import weakref
from contextlib import nullcontext

import numpy as np
import psutil
import pytest
import torch
import transformers as T

from helpers import random_ids, small_config, small_model
from llmopt.errors import ConfigError, LlmoptError
from llmopt.kv_cache import (
    EvictingCache,
    EvictionConfig,
    KVCacheConfig,
    PrefixStore,
    SlabCache,
    install,
    installed,
    uninstall,
)
from llmopt.kv_cache.attention import packed
from llmopt.kv_cache.backends import CopyingRows, backend
from llmopt.kv_cache.slab import SimpleVAttention

linux = pytest.mark.skipif(not backend().startswith("mmap"), reason="no demand-paged memory here")


@pytest.mark.parametrize("name", ["max_seq_len", "max_batch_size", "page_tokens"])
@pytest.mark.parametrize("bad", [-1, 2.5, "8", True])
def test_sizes_are_checked_at_once(name, bad):
    "By the cache, by `install` and by the configuration; the message names the parameter."
    for make in (lambda **kw: SlabCache(small_config(), **kw), lambda **kw: install(**kw)):
        with pytest.raises(ConfigError, match=f"{name} must be a whole number"):
            make(**{name: bad})
    if name != "max_batch_size":
        with pytest.raises(ConfigError, match=f"{name} must be a whole number"):
            KVCacheConfig(**{name: bad})


def test_numbers_of_numpy_are_sizes():
    "And a configuration with them is equal to one without, and JSON."
    c = KVCacheConfig(max_seq_len=np.int64(100), page_tokens=np.int32(16), budget=np.int64(64))
    assert c == KVCacheConfig(max_seq_len=100, page_tokens=16, budget=64) and hash(c)
    assert {type(getattr(c, k)) for k in ("max_seq_len", "page_tokens", "budget")} == {int}
    cache = SlabCache(small_config(), np.int64(100), np.int64(2), np.int64(0))
    with torch.no_grad():
        small_model()(random_ids(20), past_key_values=cache)
    assert cache.get_max_length() == 100


@linux
def test_a_cache_longer_than_all_addresses_is_one_line():
    "The system refuses 2**60 tokens; the message names the parameter that asks for less."
    with torch.no_grad(), pytest.raises(ConfigError, match="cannot reserve .* max_seq_len") as e:
        small_model()(random_ids(5), past_key_values=SlabCache(small_config(), max_seq_len=2**60))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("attention", ["stock", "packed"])
def test_autocast_gives_what_it_gives_with_a_stock_cache(family, attention):
    "Keys come in float32, values in bfloat16; begun inside or outside, and going on inside."
    m, ids = small_model(family), random_ids(30)
    for begin in (True, False):
        rows = []
        for cache in T.DynamicCache(config=m.config), SlabCache(m.config):
            with torch.no_grad(), packed(m) if attention == "packed" else nullcontext():
                with torch.autocast("cpu", torch.bfloat16, enabled=begin):
                    logits = [m(ids[:, :20], past_key_values=cache).logits]
                with torch.autocast("cpu", torch.bfloat16):
                    logits += [m(ids[:, i : i + 1], past_key_values=cache).logits for i in range(20, 30)]
            rows.append(torch.cat([x.float() for x in logits], 1))
        assert torch.equal(*rows) if attention == "stock" else (rows[0] - rows[1]).abs().max() < 0.02


def test_autocast_under_a_budget_and_with_a_store(tmp_path):
    "Tokens are evicted, and chunks that were stored under autocast are restored bit-identical."
    m, ids = small_model(), random_ids(200)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), packed(m):
        for policy in "cake", "h2o":
            cache = EvictingCache(m.config, EvictionConfig(64, policy, window=8, unit=1))
            m(ids, past_key_values=cache)
            m(ids[:, :1], past_key_values=cache)
            assert cache.evictor.rounds and all(0 < r["lost"] < 1 for r in cache.evictions)
        store, logits = PrefixStore(tmp_path, chunk=16), []
        for store.meet_at in (None, 0):
            cache = SlabCache(m.config)
            report = store.prefill(m, cache, ids)
            logits.append(m(ids[:, 192:], past_key_values=cache).logits)
        assert (report.loaded, report.damaged) == (12, 0) and torch.equal(*logits)


def test_a_wider_type_than_the_cache_began_with_is_one_line():
    "Slabs that began in bfloat16 take no float32: that would round without a word."
    m, cache = small_model("gpt2"), SlabCache(small_config("gpt2"))
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            m(random_ids(5), past_key_values=cache)
        with pytest.raises(ConfigError, match="outside of torch.autocast") as e:
            m(random_ids(5), past_key_values=cache)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("bad", [1, True, -0.5, "3", None, 10**30, float("-inf")])
@pytest.mark.parametrize("make", [SlabCache, lambda c: EvictingCache(c, EvictionConfig(64))])
def test_what_cannot_be_cropped_is_refused(make, bad):
    "Half a token was taken for a length once."
    m, cache = small_model(), make(small_config())
    with torch.no_grad(), packed(m):
        m(random_ids(7), past_key_values=cache)
    with pytest.raises(ConfigError, match="as a negative number"):
        cache.crop(bad)
    cache.crop(np.int64(-2))
    assert cache.get_seq_length() == 5
    cache.crop(-(10**30))
    assert cache.get_seq_length() == 0


def test_what_no_cache_can_be_made_of_is_one_line():
    "A model or a name in place of a configuration, a budget by itself, and text as a switch."
    for config in small_model(), None, "llmopt-tiny", {}:
        with pytest.raises(ConfigError, match="model.config"):
            SlabCache(config)
    for eviction in "25%", 64, None:
        with pytest.raises(ConfigError, match="must be an EvictionConfig"):
            EvictingCache(small_config(), eviction)
    for make in (lambda **kw: SlabCache(small_config(), **kw), install):
        with pytest.raises(ConfigError, match="prefault must be True or False"):
            make(prefault="no")


def test_a_model_of_more_layers_than_the_cache_is_one_line():
    "The third layer of a model asks a cache of two."
    with torch.no_grad(), pytest.raises(ConfigError, match="made for 2 layers"):
        small_model(num_hidden_layers=3)(random_ids(5), past_key_values=SlabCache(small_config()))


def test_a_pass_that_failed_leaves_a_cache_that_can_be_reset():
    "One layer has the tokens then and the other has not; after a reset the logits are those of a new cache."
    m, ids, cache = small_model(), random_ids(10), SlabCache(small_config())
    hook = m.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with torch.no_grad():
        with pytest.raises(ZeroDivisionError):
            m(ids, past_key_values=cache)
        hook.remove()
        cache.reset()
        assert torch.equal(m(ids, past_key_values=cache).logits, m(ids).logits)


def test_layers_made_before_the_first_token():
    "As transformers can ask for."
    m, ids, cache = small_model(), random_ids(10), SlabCache(small_config())
    cache.early_initialization(1, [2, 2], [8, 8], torch.float32, torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(m(ids, past_key_values=cache).logits, m(ids).logits)


def test_slabs_refuse_what_would_be_broadcast_or_cast():
    "Fewer heads, another type, a narrower head and a larger batch; then too many tokens, a gradient and a closed slab."
    s, t = SimpleVAttention(2, 8, 1, 10), torch.ones(1, 2, 3, 8)
    for bad in (t[:, :1], t.double(), t[..., :1], t.repeat(2, 1, 1, 1)):
        with pytest.raises(ConfigError, match="cannot take"):
            s.append(bad, bad)
    with pytest.raises(ConfigError, match="max_seq_len"):
        s.append(t.repeat(1, 1, 4, 1), t.repeat(1, 1, 4, 1))
    with pytest.raises(ConfigError, match="cannot keep"):
        s.truncate(-1)
    with pytest.raises(LlmoptError, match="no_grad"):
        s.append(t.requires_grad_(), t)
    s.close()
    with pytest.raises(LlmoptError, match="closed"):
        s.append(t.detach(), t.detach())


def test_slots_that_were_not_reserved_are_refused():
    "Negative ones too."
    s, t = SimpleVAttention(2, 8, 1, 100, prefault=False), torch.ones(1, 2, 4, 8)
    s.append(t, t)
    s.reserve_slots(20)
    for at in (-4, 3, 17, 40):
        with pytest.raises(ConfigError, match="not among the reserved"):
            s.place(t, t, at)
    with pytest.raises(ConfigError, match="cannot take"):
        s.place(t.double(), t, 8)
    for n in (-1, 3, 21):
        with pytest.raises(ConfigError, match="cannot advance"):
            s.advance_to(n)
    with pytest.raises(ConfigError, match="do not fit"):
        s.reserve_slots(101)


@linux
def test_reserved_slots_that_were_not_used_give_their_pages_back():
    "A row that was placed far ahead is resident until the reservation is taken back."
    s, t = SimpleVAttention(2, 512, 1, 100, prefault=False), torch.ones(1, 2, 4, 512)
    s.reserve_slots(50)
    s.place(t, t, 40)
    assert s.resident()
    s.reserve_slots(0)
    assert s.resident() == 0


def test_slots_on_memory_that_moves():
    "Filled from the back and from the front, on a buffer that is replaced when it is full."
    torch.manual_seed(0)
    k, v = torch.randn(2, 1, 2, 96, 64)
    s = SimpleVAttention(2, 64, 1, 1000)
    s.storage = [CopyingRows(2, 1000, 64) for _ in "kv"]
    s.reserve_slots(96)
    s.place(k[:, :, 64:], v[:, :, 64:], 64)
    s.append(k[:, :, :32], v[:, :, :32])
    s.place(k[:, :, 32:64], v[:, :, 32:64], 32)
    s.advance_to(96)
    s.reserve_slots(0)
    assert torch.equal(s.keys, k) and torch.equal(s.values, v)


def generate(model, ids, **kw):
    torch.manual_seed(3)
    length = dict(max_new_tokens=12, min_new_tokens=12, pad_token_id=5)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        output_logits=True,
        return_dict_in_generate=True,
        **length,
        **kw,
    )
    return out.past_key_values, torch.stack(out.logits)


def kinds(cache):
    return {type(layer).__name__ for layer in cache.layers}


@pytest.mark.parametrize(
    "kw",
    [
        dict(do_sample=False),
        dict(num_beams=3),
        dict(do_sample=True, num_return_sequences=2),
        dict(prefill_chunk_size=7),
    ],
)
def test_installed_slabs_change_nothing_else(kw):
    "Not a single logit, in none of the ways to generate, and not the caches that are made before and after."
    m, ids = small_model(), random_ids(40).view(2, 20)
    stock, want = generate(m, ids, **kw)
    with installed(max_seq_len=500):
        ours, got = generate(m, ids, **kw)
        with torch.no_grad():
            direct = m(ids[:1]).past_key_values
    assert torch.equal(got, want) and torch.equal(ours.layers[1].keys, stock.layers[1].keys)
    assert kinds(ours) == kinds(direct) == {"SlabLayer"}
    assert kinds(stock) == kinds(T.DynamicCache(config=m.config)) == {"DynamicLayer"}


def test_an_installed_cache_that_is_too_short_is_refused_and_uninstalled():
    "`generate` raises instead of losing tokens, and makes its usual cache again after `uninstall`."
    m, ids = small_model(), random_ids(20)
    install(max_seq_len=25)
    try:
        with pytest.raises(ConfigError, match="max_seq_len"):
            generate(m, ids)
    finally:
        uninstall()
    assert kinds(generate(m, ids)[0]) == {"DynamicLayer"}


@pytest.mark.parametrize("kw", [dict(), dict(prompt_lookup_num_tokens=3), dict(num_beams=2)])
def test_an_encoder_decoder_of_two_slab_caches(kw):
    "Bart with greedy search, prompt lookup and beams: tokens and lengths of the stock caches."
    torch.manual_seed(0)
    size = dict(encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4)
    c = T.BartConfig(
        vocab_size=99, d_model=32, encoder_ffn_dim=32, decoder_ffn_dim=32, **size, max_position_embeddings=64
    )
    m, ids = T.BartForConditionalGeneration(c).eval(), random_ids(16, 90)
    outs = []
    for make in (SlabCache, lambda config: T.DynamicCache(config=config)):
        cache = T.EncoderDecoderCache(make(c), make(c))
        out = m.generate(ids, past_key_values=cache, max_new_tokens=20, min_new_tokens=20, do_sample=False, **kw)
        outs.append((out, cache.get_seq_length()))
    assert torch.equal(outs[0][0], outs[1][0]) and outs[0][1] == outs[1][1]


@linux
def test_memory_goes_with_the_last_reference():
    "Without the cyclic collector: a cache that was used and dropped leaves nothing, however many there were."
    m, ids = small_model(max_position_embeddings=4096), random_ids(2000)
    gc.collect()
    gc.disable()
    try:
        rss = []
        for _ in range(6):
            cache = SlabCache(m.config)
            with torch.no_grad():
                m(ids, past_key_values=cache, logits_to_keep=1)
            gone = weakref.ref(cache)
            slabs = [weakref.ref(s) for s in cache.slabs]
            del cache
            assert gone() is None and not any(s() for s in slabs)
            rss.append(psutil.Process().memory_info().rss)
        assert rss[-1] - rss[1] < 2**21  # the keys and values of one take 2 MiB
    finally:
        gc.enable()
