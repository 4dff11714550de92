"Nothing of a request lives on a shared model: blocks overlap, threads and engines differ, processes fork."

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers as T

from helpers import random_ids, small_model
from llmopt.engine import EnhancedFusedLLMEngine, Recipe
from llmopt.errors import LlmoptError, UnsupportedModelError
from llmopt.kv_cache import EvictingCache, EvictionConfig, KVCacheConfig, SlabCache
from llmopt.kv_cache.attention import NAMES, PACKED, packed, packed_attention


def used(model):
    return model.config._attn_implementation


@torch.no_grad()
def decode(model, cache, n=6):
    "Logits of a prompt and of `n` tokens after it, one by one."
    ids = random_ids(30 + n)
    rows = [model(ids[:, :30], past_key_values=cache).logits]
    for i in range(30, 30 + n):
        rows.append(model(ids[:, i : i + 1], past_key_values=cache).logits)
    return torch.cat(rows, 1)


@pytest.fixture
def calls(monkeypatch):
    "How often attention is packed."
    found = []

    def count(*args):
        found.append(args)
        return packed_attention(*args)

    monkeypatch.setattr("llmopt.kv_cache.attention.packed_attention", count)
    return found


@pytest.mark.parametrize("order", ["abAB", "abBA", "aAbB", "abcBAC", "abcCAB"])
@pytest.mark.parametrize("own", ["sdpa", "eager"])
def test_blocks_begin_and_end_in_any_order(order, own):
    "A small letter begins a block, a capital ends it; the name stands as long as one is open."
    m, blocks, is_open = small_model(), {}, set()
    m.set_attn_implementation(own)
    for c in order:
        if c.islower():
            blocks[c] = packed(m)
            blocks[c].__enter__()
            is_open.add(c)
        else:
            blocks[c.lower()].__exit__(None, None, None)
            is_open.remove(c.lower())
        assert used(m) == (NAMES[own] if is_open else own)


def test_a_block_on_a_part_of_the_model_counts_as_well():
    "The whole and the base model share a configuration, so the inner block must not end the outer one."
    m = small_model()
    with packed(m):
        with packed(m.base_model):
            assert used(m) == PACKED
        assert used(m) == PACKED
    assert used(m) == used(m.base_model) == "sdpa"


def test_an_exception_in_the_middle_ends_the_block():
    "Only the block that it left: the one around it goes on."
    m = small_model()
    with packed(m):
        with pytest.raises(ZeroDivisionError), packed(m):
            raise ZeroDivisionError
        assert used(m) == PACKED
    assert used(m) == "sdpa"


def test_a_choice_made_inside_a_block_stays():
    "What the user sets while a block is open is not undone at its end, and the next block packs that."
    m = small_model()
    with packed(m):
        m.set_attn_implementation("eager")
    assert used(m) == "eager"
    with packed(m):
        assert used(m) == NAMES["eager"]
    assert used(m) == "eager"


@pytest.mark.parametrize("own", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "qwen3"])
def test_others_keep_their_attention_inside_a_block(family, own, calls):
    "A stock cache, no cache, padding, and a slab cache that asks for stock attention: bit-identical, and never packed."
    m = small_model(family)
    m.set_attn_implementation(own)
    ids, mask = random_ids(40).view(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[1, :7] = 0

    @torch.no_grad()
    def others():
        yield decode(m, T.DynamicCache(config=m.config))
        yield decode(m, SlabCache(m.config, attention="stock"))
        yield decode(m, KVCacheConfig(attention="stock").make_cache(m))
        yield m(ids, attention_mask=mask).logits
        yield m(ids, attention_mask=mask, use_cache=False).logits

    want = list(others())
    with packed(m):
        got = list(others())
    assert not calls and all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("own", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "qwen3"])
def test_marked_keys_are_packed_whatever_the_model_had(family, own, calls):
    "Four families with two attentions of their own: the logits agree within rounding, by the packed function."
    m = small_model(family)
    m.set_attn_implementation(own)
    want = decode(m, T.DynamicCache(config=m.config))
    with packed(m):
        got = decode(m, SlabCache(m.config))
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert calls


def test_outside_a_block_a_slab_cache_is_stock(calls):
    "Bit-identical logits, and the packed function is never called."
    m = small_model()
    assert torch.equal(decode(m, SlabCache(m.config)), decode(m, T.DynamicCache(config=m.config))) and not calls


def test_a_model_that_is_packed_for_good_stays_so(calls):
    "As the twin of the benchmark: its own name is ours."
    m = small_model()
    m.set_attn_implementation(PACKED)
    with packed(m):
        pass
    assert used(m) == PACKED
    decode(m, SlabCache(m.config))
    assert calls


@pytest.mark.parametrize("name", ["flex_attention", "flash_attention_2"])
def test_attention_that_cannot_be_replaced_is_refused(name):
    "Kernels that have no packed form here are named in the error."
    m = small_model()
    m.config._attn_implementation_internal = name
    with pytest.raises(UnsupportedModelError, match=f"not '{name}'"), packed(m):
        pass


def test_threads_with_different_attention_share_a_model():
    "Each gets what it gets alone: stock requests bit-identically, packed ones and those under a budget, too."
    m = small_model()
    configs = [KVCacheConfig(), KVCacheConfig(attention="stock"), None, KVCacheConfig(budget=36)]

    def answer(kv):
        if kv is None:
            return decode(m, T.DynamicCache(config=m.config), 8)
        with kv.attach(m):
            return decode(m, kv.make_cache(m), 8)

    want = [answer(kv) for kv in configs]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(answer, configs * 12))
    assert all(torch.equal(g, want[i % len(configs)]) for i, g in enumerate(got))
    assert used(m) == "sdpa"


def test_a_budget_outside_its_block_is_refused():
    "Stock attention knows nothing of evicted tokens; the error names the block to open."
    m = small_model()
    with pytest.raises(LlmoptError, match="kv.attach"):
        decode(m, EvictingCache(m.config, EvictionConfig(36)))


def engine(recipe):
    return EnhancedFusedLLMEngine("llmopt-tiny", device="cpu", recipe=Recipe.parse(recipe))


def test_streams_of_two_engines_on_one_model():
    "Read in turn, one closed in the middle: both say what they say alone, and the model is as it was."
    a = engine("kv")
    b = EnhancedFusedLLMEngine(a.lm, recipe=Recipe.parse("kv:attention=stock"))
    questions = "Tell me about a dog.", "Tell me about the sea."
    want = [e.run(q, max_new_tokens=12).output_text for e, q in zip((a, b), questions)]
    streams = [e.stream(q, max_new_tokens=12) for e, q in zip((a, b), questions)]
    other = a.stream("And a cat?", max_new_tokens=30)
    next(other)
    texts = ["", ""]
    for _ in range(40):
        for i, s in enumerate(streams):
            texts[i] += next(s, "")
        other.close()
    assert [t.strip() for t in texts] == want and used(a.lm.model) == "sdpa"


def ask(e, queue):
    queue.put(e.run("Tell me about a dog.", max_new_tokens=6).output_text)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
@pytest.mark.parametrize("recipe", ["kv", "kv:budget=64"])
def test_a_forked_child_answers(recipe):
    "After an engine has answered once, a child says the same, and does not wait for a thread that it does not have."
    e = engine(recipe)
    want = e.run("Tell me about a dog.", max_new_tokens=6).output_text
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the threads of OpenMP do not survive a fork either, and that is not ours
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=ask, args=(e, queue), daemon=True)
    child.start()
    try:
        assert queue.get(timeout=60) == want
    finally:
        child.kill()
        torch.set_num_threads(threads)
    assert e.run("Tell me about a dog.", max_new_tokens=6).output_text == want


def test_a_child_forked_while_the_switch_is_held_goes_on():
    "The lock of the switch is made anew in a child."
    from llmopt.kv_cache import attention

    m, context = small_model(), multiprocessing.get_context("fork")
    done = context.Event()

    def work():
        with packed(m):
            done.set()

    with attention._lock:  # private: what a thread holds for a moment, at the moment of the fork
        child = context.Process(target=work, daemon=True)
        child.start()
        assert done.wait(30)
    child.join(30)
    assert child.exitcode == 0
