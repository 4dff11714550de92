"What cannot be is refused in one line that says what to do; what can be odd is kept right."

import math

import pytest
import torch

from helpers import random_ids, small_model, tiny
from llmopt.engine import EnhancedFusedLLMEngine
from llmopt.engine.fused import Recipe
from llmopt.errors import ConfigError, LlmoptError, ModelError, UnsupportedModelError
from llmopt.kv_cache import EvictingCache, EvictionConfig, KVCacheConfig, PrefixStore, SlabCache
from llmopt.kv_cache.attention import packed
from llmopt.kv_cache.fit_foreseen import fit_map
from llmopt.kv_cache.foreseen import find_map, load_map
from llmopt.kv_cache.kvzip import repeats
from llmopt.kv_cache.query_moments import rotation_of
from llmopt.kv_cache.second_pass import AROUND, chunk_that_fits, compress, reconstruct

LONG = "Please summarize: " + "The river runs from the hills to the sea, and the town drinks its water. " * 12


@pytest.fixture(scope="module")
def model():
    return small_model()


def read(model, policy, n=200, **kw):
    "A cache that has read `n` tokens."
    cache = EvictingCache(model.config, EvictionConfig("25%", policy, window=8, unit=1, **kw))
    with torch.no_grad(), packed(model):
        model(random_ids(n), past_key_values=cache)
    return cache


@pytest.mark.parametrize("text", ["kv:budget=25%,policy=expected,share=heads", "kv:budget=1MiB,policy=kvzip"])
def test_a_recipe_says_who_competes(text):
    "It has a name and is read back; who competes is a part of it."
    r = Recipe.parse(text)
    assert Recipe.parse(r.id) == r and r.cache.eviction.competes in ("heads", "model")


@pytest.mark.parametrize(
    "text",
    [
        "kv:share=heads",
        "kv:budget=25%,share=rows",
        "kv:budget=mass=0.9,share=heads",
        "kv:budget=25%,policy=kvpress",
    ],
)
def test_what_is_no_way_to_share_is_refused(text):
    with pytest.raises(LlmoptError) as e:
        Recipe.parse(text)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("bad", [0, 1, True, "", "Heads", ["heads"], b"heads"])
def test_shares_of_wrong_types(bad):
    with pytest.raises(ConfigError, match="share must be one of layers, heads, model"):
        EvictionConfig("25%", share=bad)


def test_models_without_turns_and_with_several(model):
    "GPT-2 turns nothing, and expected attention works; a model whose layers turn in two ways is refused."
    gpt2 = small_model("gpt2")
    assert rotation_of(gpt2.transformer.h[0].attn).rotary is None
    assert read(gpt2, "expected", share="heads").evictor.rounds == 1
    phi = small_model("phi2")  # turns a part of each head
    assert 0 < rotation_of(phi.model.layers[0].self_attn).tables(torch.zeros(1, 1, dtype=torch.long))[0].shape[-1] < 8
    assert read(phi, "expected").evictor.rounds == 1

    class Odd(type(model.model.layers[0].self_attn)):
        pass

    module = Odd(model.config, 0)
    Odd.__module__ = __name__
    globals().update(OneRotaryEmbedding=type("OneRotaryEmbedding", (), {}), OtherRotaryEmbedding=type("X", (), {}))
    try:
        with pytest.raises(UnsupportedModelError, match="keydiff"):
            rotation_of(module)
    finally:
        del globals()["OneRotaryEmbedding"], globals()["OtherRotaryEmbedding"]


def test_a_store_refuses_policies_that_must_see_all_queries(model, tmp_path):
    "Tokens that are loaded come without their queries."
    store = PrefixStore(tmp_path, chunk=16)
    with pytest.raises(ConfigError, match="queries of all tokens"):
        store.prefill(model, EvictingCache(model.config, EvictionConfig(64, "expected")), random_ids(100))
    with packed(model):
        for _ in range(2):
            cache = EvictingCache(model.config, EvictionConfig(64, "keydiff", share="model", unit=1))
            report = store.prefill(model, cache, random_ids(100))
    assert report.loaded > 0


def test_a_second_pass_wants_a_whole_cache_of_one_sequence(model):
    "No cache without a budget, no batch, nothing that was cut, no sliding layers."
    ids = random_ids(50)
    with pytest.raises(ConfigError, match="EvictingCache"):
        reconstruct(model, SlabCache(model.config), iter(()), 0)
    two = EvictingCache(model.config, EvictionConfig("100%", "kvzip"))
    with torch.no_grad(), packed(model), two.paused():
        model(ids.repeat(2, 1), past_key_values=two)
    with pytest.raises(ConfigError, match="one sequence"):
        reconstruct(model, two, iter(()), 50)
    mixed = small_model("qwen3", sliding_window=16, use_sliding_window=True, max_window_layers=1)
    cache = EvictingCache(mixed.config, EvictionConfig("100%", "kvzip"))
    with pytest.raises(UnsupportedModelError, match="sliding"):
        reconstruct(mixed, cache, iter(()), 0)
    with pytest.raises(ConfigError, match="one sequence of tokens"):
        [*repeats(ids, *[torch.tensor([1])] * 3)]
    with pytest.raises(ConfigError, match="chunk must be"):
        [*repeats(ids[0], *[torch.tensor([1])] * 3, chunk=0)]


def test_a_beginning_that_was_restored_is_not_read_again(tmp_path):
    "A store fills the cache with whole chunks, `compress` reads the rest; the choice is that of reading all of it."
    lm, kept = tiny(), []
    ids, store = torch.tensor(lm.tokenizer(LONG).input_ids), PrefixStore(tmp_path, chunk=32)
    for _ in range(3):
        cache = EvictingCache(lm.model.config, EvictionConfig("40%", "kvzip", window=8, unit=1))
        with packed(lm.model):
            report = store.prefill(lm.model, cache, ids)
        compress(lm, cache, ids)
        kept.append([s.positions[s.filled].tolist() for s in cache.slabs])
    assert report.loaded > 0 and kept[0] == kept[1] == kept[2]


def test_a_second_pass_needs_room():
    "Few positions left: short chunks, the same scores to keep what must stay; none left: an error that says so."
    lm = tiny()
    ids = torch.tensor(lm.tokenizer(LONG * 8).input_ids)
    n = lm.context - AROUND - 20
    assert chunk_that_fits(lm, EvictingCache(lm.model.config, EvictionConfig("30%")), n, 2048) == 20
    cache = EvictingCache(lm.model.config, EvictionConfig("30%", "kvzip", window=8, unit=1), max_seq_len=300)
    compress(lm, cache, ids[:190])
    assert cache.evictor.rounds == 1 and cache.get_seq_length() == 190
    with pytest.raises(ConfigError, match="needs room"):
        compress(lm, EvictingCache(lm.model.config, EvictionConfig("30%", "kvzip"), max_seq_len=200), ids[:190])


def test_a_second_pass_that_fails_leaves_the_cache_usable(model):
    "An error within a piece ends the repetition; what the model reads next is no part of it."
    cache, ids = EvictingCache(model.config, EvictionConfig("50%", "kvzip", window=8, unit=1)), random_ids(60)
    with torch.no_grad(), packed(model), cache.paused():
        model(ids, past_key_values=cache)

    def broken():
        raise KeyError("no more")
        yield

    with pytest.raises(KeyError):
        reconstruct(model, cache, broken(), 60)
    assert cache.evictor.repeating is None and cache.get_seq_length() == 60


def test_maps_that_are_none(model, tmp_path):
    "Missing, damaged, of another model, or fitted to nothing."
    with pytest.raises(ConfigError, match="fit_map"):
        find_map(model, tmp_path / "none")
    (tmp_path / "foreseen.json").write_text("{}")
    with pytest.raises(ModelError, match="no score map"):
        load_map(tmp_path)
    with pytest.raises(ConfigError, match="hundred tokens"):
        fit_map(tiny(), ["Too short."], keep=False)


def test_the_map_that_comes_with_the_bundled_model(tmp_path, monkeypatch):
    "It is found by weights, where none was made here."
    monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path))
    found = find_map(tiny().model)
    assert found.info["model"] == "llmopt-tiny" and len(found.layers) == 6 and min(found.info["explained"]) > 0.2


def test_a_policy_with_a_map_asks_for_it(model, tmp_path, monkeypatch):
    "The configuration looks for the map of the model, and says how to make one."
    monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="fit_map"):
        KVCacheConfig(budget="25%", policy="foreseen").make_cache(model)


def test_keys_that_are_no_numbers(model):
    "Scores of broken keys are no numbers; what must stay stays, and no more than the budget."
    broken = small_model()
    broken.model.layers[1].self_attn.k_proj.weight.data[0, 0] = math.nan
    for policy in "expected", "keydiff":
        for share in "heads", "model":
            cache = read(broken, policy, share=share)
            assert sum(int(s.lengths.sum()) for s in cache.slabs) <= 2 * 2 * 50
            for s in cache.slabs:
                for h in range(2):
                    assert {0, 1, 2, 3, *range(192, 200)} <= {*s.positions[0, h, : s.lengths[0, h]].tolist()}


def test_copies_and_reorderings_keep_what_is_known(model):
    "A copy goes on alone; beams take scores and moments with them."
    cache = EvictingCache(model.config, EvictionConfig(40, "expected", window=8, slack=4, unit=1, share="heads"))
    with torch.no_grad(), packed(model):
        model(random_ids(60).repeat(2, 1), past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 1]))
        cache.batch_repeat_interleave(2)
        for token in random_ids(20)[0]:
            model(token.view(1, 1).expand(4, 1), past_key_values=cache)
    for s in cache.slabs:
        assert all(torch.equal(s.lengths[0], row) for row in s.lengths[1:])
    assert len(cache.slab_layers[0].moments.count) == 4 and cache.evictor.rounds > 1


def test_an_engine_reads_twice_where_the_policy_wants_it():
    "The answer comes from a cache that was cut after a second pass; a score goes the same way."
    engine = EnhancedFusedLLMEngine("llmopt-tiny", device="cpu", recipe=Recipe.parse("kv:budget=40%,policy=kvzip"))
    full = EnhancedFusedLLMEngine("llmopt-tiny", device="cpu", recipe=Recipe.parse("kv"))
    m, whole = (e.run(LONG, max_new_tokens=8, fixed=True) for e in (engine, full))
    assert m.kv_bytes_live < 0.6 * whole.kv_bytes_live and len(m.output_ids) == 8
    assert engine.score(LONG, whole.output_ids).shape == full.score(LONG, whole.output_ids).shape


def test_a_prompt_of_one_token_is_not_said_again():
    "There is nothing to judge it by; the answer, longer than what always stays, is whole."
    engine = EnhancedFusedLLMEngine("llmopt-tiny", device="cpu", recipe=Recipe.parse("kv:budget=10%,policy=kvzip"))
    assert len(engine.run([400], max_new_tokens=60, fixed=True).output_ids) == 60
    assert len(engine.run([400, 401], max_new_tokens=60, fixed=True).output_ids) == 60


def test_compress_takes_any_policy():
    "Read and cut in one call."
    lm = tiny()
    ids = torch.tensor(lm.tokenizer(LONG).input_ids)
    for policy in "kvzip", "expected", "snapkv":
        cache = EvictingCache(lm.model.config, EvictionConfig("30%", policy, window=8, unit=1))
        compress(lm, cache, ids)
        assert cache.get_seq_length() == len(ids)
        held = sum(int(s.lengths.sum()) for s in cache.slabs) / sum(s.lengths.numel() for s in cache.slabs)
        assert abs(held - 0.3 * len(ids)) <= 1
