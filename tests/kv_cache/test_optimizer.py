"What the optimizer reports: open caches, the one that was closed last, shapes of odd families, impossible sizes."

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
import transformers as T

from helpers import random_ids, small_model
from llmopt.errors import ConfigError, UnsupportedModelError
from llmopt.kv_cache import HybridKVCacheOptimizer, KVCacheConfig
from llmopt.kv_cache.backends import backend
from llmopt.kv_cache.shape import cache_shape

linux = pytest.mark.skipif(not backend().startswith("mmap"), reason="no demand-paged memory here")
FIGURES = "live", "resident", "reserved", "peak_live", "fragmentation", "backend", "evictions", "lost"


def optimizer(model, **kw):
    return HybridKVCacheOptimizer(**cache_shape(model), **(dict(max_batch_size=2, max_seq_len=400) | kw))


def answer(opt, model, cache=None, n=40):
    "One `generate` with a cache that nobody keeps, unless one is given."
    ids = random_ids(60)
    length = dict(max_new_tokens=n, min_new_tokens=n, pad_token_id=5)
    with opt.attach(model):
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache or opt.make_cache(model),
            do_sample=False,
            **length,
        )


@linux
@pytest.mark.parametrize("kw", [dict(), dict(budget=48), dict(config=KVCacheConfig(attention="stock", prefault=False))])
def test_a_cache_that_nobody_kept_is_reported_as_it_was_at_its_end(kw):
    "The same figures as with a cache that is still there."
    m = small_model()
    kept, lost = optimizer(m, **kw), optimizer(m, **kw)
    cache = kept.make_cache(m)
    answer(kept, m, cache)
    answer(lost, m)
    gc.collect()
    alive, gone = kept.get_memory_usage(), lost.get_memory_usage()
    assert (alive["caches"], alive["closed"], gone["caches"], gone["closed"]) == (1, 0, 0, 1)
    assert {k: alive[k] for k in FIGURES} == {k: gone[k] for k in FIGURES} and gone["live"] > 0
    assert kept.get_memory_savings() == lost.get_memory_savings()
    assert lost.get_memory_savings()["saved_vs_static_longest"] > 0.3


@linux
def test_closing_keeps_the_figures_as_well():
    "Closed by hand, a cache counts as closed with its last figures; that it is deleted later changes nothing."
    m = small_model()
    opt = optimizer(m)
    cache = opt.make_cache(m)
    answer(opt, m, cache)
    before = opt.get_memory_usage()
    cache.close()
    after = opt.get_memory_usage()
    assert (after["caches"], after["closed"]) == (0, 1) and {k: before[k] for k in FIGURES} == {
        k: after[k] for k in FIGURES
    }
    del cache
    gc.collect()
    assert opt.get_memory_usage() == after


@linux
def test_open_caches_come_first_and_the_last_one_closed_after_them():
    "A copy of a cache is not the optimizer's, and closing it changes nothing."
    m = small_model()
    opt = optimizer(m)
    answer(opt, m, n=10)
    answer(opt, m, n=30)
    assert opt.get_memory_usage()["live"] == (60 + 30 - 1) * 2 * 2 * 2 * 8 * 4
    cache = opt.make_cache(m)
    assert opt.get_memory_usage()["live"] == 0
    with torch.no_grad():
        m(random_ids(7), past_key_values=cache)
    fork = copy.deepcopy(cache)
    fork.close()
    usage = opt.get_memory_usage()
    assert (usage["caches"], usage["closed"], usage["live"]) == (1, 0, 7 * 2 * 2 * 2 * 8 * 4)
    del cache
    gc.collect()
    assert opt.get_memory_usage()["live"] == 7 * 2 * 2 * 2 * 8 * 4


def test_no_cache_yet():
    "Zeros, and None for ratios that would divide by zero."
    usage, savings = (
        f(optimizer(small_model()))
        for f in (HybridKVCacheOptimizer.get_memory_usage, HybridKVCacheOptimizer.get_memory_savings)
    )
    assert (usage["caches"], usage["closed"], usage["live"], usage["fragmentation"]) == (0, 0, 0, None)
    assert savings["slab"] == savings["dynamic"] == 0 and savings["saved_vs_dynamic"] is None


def test_an_optimizer_that_is_gone_is_not_reported_to():
    "A cache outlives the optimizer that made it, and closing it then is no error."
    m = small_model()
    opt = optimizer(m)
    cache, gone = opt.make_cache(m), weakref.ref(opt)
    with torch.no_grad():
        m(random_ids(7), past_key_values=cache)
    del opt
    gc.collect()
    assert gone() is None
    cache.close()
    assert cache.closed


SMALL = dict(vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
SHAPES = {  # a configuration, and what its model really caches: layers, heads, head size
    "falcon": (lambda: T.FalconConfig(**SMALL), (2, 1, 16)),
    "falcon_new": (lambda: T.FalconConfig(**SMALL, new_decoder_architecture=True, num_kv_heads=2), (2, 4, 16)),
    "starcoder": (lambda: T.GPTBigCodeConfig(vocab_size=99, n_embd=64, n_layer=2, n_head=4), (2, 1, 16)),
    "gpt2": (lambda: T.GPT2Config(vocab_size=99, n_embd=64, n_layer=2, n_head=4), (2, 4, 16)),
    "llama": (lambda: T.LlamaConfig(**SMALL, num_key_value_heads=2, head_dim=8), (2, 2, 8)),
    "gemma3": (lambda: T.Gemma3TextConfig(**SMALL, num_key_value_heads=2, head_dim=8), (2, 2, 8)),
    "bloom": (lambda: T.BloomConfig(vocab_size=99, hidden_size=64, n_layer=2, n_head=4), (2, 4, 16)),
    "neox": (lambda: T.GPTNeoXConfig(**SMALL, intermediate_size=64), (2, 4, 16)),
}


@pytest.mark.parametrize("family", SHAPES)
def test_the_shape_of_a_cache_is_what_the_model_caches(family):
    "Not what its configuration seems to say; and caches of that shape are made and filled."
    config, want = SHAPES[family]
    m = T.AutoModelForCausalLM.from_config(config()).eval()
    assert tuple(cache_shape(m).values()) == want and all(type(v) is int for v in cache_shape(m).values())
    cache = optimizer(m).make_cache(m)
    with torch.no_grad():
        m(random_ids(5, 99), past_key_values=cache)
    assert cache.get_seq_length() == 5


def test_the_shape_follows_a_model_that_was_cut():
    "The shape that was found before is not kept for a model with fewer layers."
    m = small_model()
    assert cache_shape(m)["num_layers"] == 2
    m.model.layers = m.model.layers[:1]
    m.config.num_hidden_layers = 1
    assert cache_shape(m)["num_layers"] == 1


def test_what_is_no_model_device_or_store_is_one_line():
    "Wherever a model is taken, and for the device and the store of an optimizer."
    m = small_model()
    for use in cache_shape, KVCacheConfig().make_cache, KVCacheConfig().attach, optimizer(m).make_cache:
        for bad in "llmopt-tiny", None, 7:
            with pytest.raises(ConfigError, match="model must be a transformers model"):
                use(bad)
    for kw, text in (dict(device="gpu"), "device must be"), (dict(device=None), "device must be"):
        with pytest.raises(ConfigError, match=text) as e:
            optimizer(m, **kw)
        assert "\n" not in str(e.value)
    with pytest.raises(ConfigError, match="store must be a PrefixStore"):
        optimizer(m, store="folder")


def test_the_shape_of_a_model_that_cannot_read_a_token():
    "An encoder-decoder needs more: then the configuration has to do."
    size = dict(encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4)
    m = T.BartForConditionalGeneration(T.BartConfig(vocab_size=99, d_model=32, **size))
    assert cache_shape(m)["head_size"] == 8


@pytest.mark.parametrize("bad", [0, -1, 2.0, "4", None, True, float("inf")])
@pytest.mark.parametrize("name", ["num_layers", "num_heads", "head_size", "max_batch_size", "max_seq_len"])
def test_what_is_no_size_is_refused(name, bad):
    "Each of the five sizes must be a whole number of at least 1; the message names it."
    sizes = dict(num_layers=2, num_heads=2, head_size=8, max_batch_size=1, max_seq_len=100)
    with pytest.raises(ConfigError, match=f"{name} must be a whole number of at least 1"):
        HybridKVCacheOptimizer(**(sizes | {name: bad}))


def test_sizes_of_numpy_and_sizes_beyond_all_addresses():
    "numpy's integers make a cache that a model can fill; 10**15 tokens are refused by name."
    m = small_model()
    sizes = {k: np.int64(v) for k, v in cache_shape(m).items()}
    opt = HybridKVCacheOptimizer(**sizes, max_batch_size=np.int32(2), max_seq_len=np.uint16(100))
    with torch.no_grad():
        m(random_ids(5), past_key_values=opt.make_cache(m))
    with pytest.raises(ConfigError, match="max_seq_len"):
        HybridKVCacheOptimizer(**sizes, max_batch_size=2, max_seq_len=10**15)


def test_models_that_do_not_fit_are_refused():
    "Other heads when it is made, too many rows or tokens when it is filled; a policy without its budget, and no store."
    m, x = small_model(), random_ids(40).view(2, 20)
    shape = cache_shape(m)
    with pytest.raises(ConfigError, match="num_heads=3 but the model has 2"):
        HybridKVCacheOptimizer(**(shape | dict(num_heads=3)), max_batch_size=1, max_seq_len=10).make_cache(m)
    for sizes, text in ((1, 100), "max_batch_size=1"), ((2, 10), "max_seq_len"):
        opt = HybridKVCacheOptimizer(**shape, max_batch_size=sizes[0], max_seq_len=sizes[1])
        with torch.no_grad(), pytest.raises(ConfigError, match=text):
            m(x, past_key_values=opt.make_cache(m))
    with pytest.raises(ConfigError, match="with a budget"):
        HybridKVCacheOptimizer(**shape, max_batch_size=2, max_seq_len=100, policy="cake")
    with pytest.raises(ConfigError, match="has no store"):
        optimizer(m).prefill(m, x[:1])


def test_models_that_cannot_be_packed_are_refused():
    "Attention that is not looked up by name, and logits that are capped."
    bloom = T.BloomForCausalLM(T.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4))
    size = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    gemma = T.Gemma2ForCausalLM(T.Gemma2Config(**size, num_key_value_heads=2, head_dim=8))
    for model, why in (bloom, "does not look up"), (gemma, "caps its attention"):
        for kv, then in (KVCacheConfig(), "use attention='stock'"), (KVCacheConfig(budget=99), "cannot have a budget"):
            with pytest.raises(UnsupportedModelError, match=f"{why}.*{then}"), kv.attach(model):
                pass
        with KVCacheConfig(attention="stock").attach(model):
            pass


def test_a_stock_cache_that_does_not_fit_is_none_with_a_reason():
    "One for 2**33 tokens is never built."
    m = small_model()
    opt = optimizer(m, max_batch_size=1, max_seq_len=2**33)
    cache = opt.make_cache(m)
    with torch.no_grad():
        m(random_ids(7), past_key_values=cache)
    savings = opt.get_memory_savings()
    assert savings["static_longest"] is savings["saved_vs_static_longest"] is None and savings["unmeasured"]


@pytest.mark.parametrize(
    "bad", [False, 0, "", {}, "kv", True, 1, np.array([1, 2]), torch.tensor([1, 2])], ids=lambda x: type(x).__name__
)
def test_what_is_no_configuration(bad):
    "False ones are no default, and true ones are no dataclass."
    with pytest.raises(ConfigError, match="config must be a KVCacheConfig"):
        optimizer(small_model(), config=bad)


@pytest.mark.parametrize("bad", [np.array([1, 2]), torch.tensor([1, 2])], ids=["numpy", "torch"])
@pytest.mark.parametrize("field", ["max_seq_len", "page_tokens", "prefault", "attention", "budget"])
def test_fields_of_several_numbers(field, bad):
    "An array has no truth value; it is refused as any other wrong value."
    with pytest.raises(ConfigError, match=f"^{field} must be"):
        KVCacheConfig(**{field: bad})


def test_a_device_number_beyond_all():
    "torch overflows."
    with pytest.raises(ConfigError, match="device must be"):
        optimizer(small_model(), device=10**30)
