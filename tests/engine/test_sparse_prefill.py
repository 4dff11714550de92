"Sparse prefill in the engine: what stays, what is kept for the next turn, and what is said where it does not act."

import pytest
import torch

from helpers import small_model, tiny, tokenizer
from llmopt.core import LM, load
from llmopt.core.compilation import numba
from llmopt.engine import EnhancedFusedLLMEngine
from llmopt.engine.decode_step import DecodeStep
from llmopt.engine.step_model import with_step, without_step
from llmopt.errors import ConfigError, UnsupportedModelError
from llmopt.kv_cache import PrefixStore
from llmopt.word_removal.sparse_reading import sparse_view

TEXT = "The heart pumps blood through the body. The tide rises twice a day. A boat has a mast. " * 8
QUESTION = f"{TEXT}\n\nWhat does the heart pump?"
SPARSE = "words:method=prefill,rate=0.5,floor=0"


def engine(recipe=SPARSE, **kw):
    "An engine around the bundled model"
    return EnhancedFusedLLMEngine(tiny(), recipe=recipe, max_new_tokens=6, **kw)


@pytest.mark.parametrize("more", ["", "+kv", "+vocab", "+kv:bits=8", "+kv:budget=50%", "+vocab+kv", "+larosa"])
def test_answers_are_what_is_scored_in_every_combination(more):
    e = engine(SPARSE + more)
    answer = e.run(QUESTION)
    assert answer.prompt_tokens < 0.8 * answer.prompt_tokens_base and not [n for n in answer.notes if "whole" in n]
    same = e.score(QUESTION, answer.output_ids).argmax(-1).tolist()
    assert same == answer.output_ids
    assert "".join(e.stream(QUESTION)).strip() == answer.output_text


@pytest.mark.skipif(numba is None, reason="needs numba")
@pytest.mark.parametrize("more", ["", "+kv", "+kv:budget=50%"])
def test_the_compiled_step_decodes_what_layers_have_read_in_part(more, monkeypatch):
    "Layers hold different numbers of tokens, and modules give the same answer."
    e, read, several = engine(SPARSE + "+larosa:sparsity=0,bits=8,when=always" + more), [], DecodeStep.several
    with_step(e.lm.model)
    monkeypatch.setattr(DecodeStep, "several", lambda *args, **kw: read.append(1) or several(*args, **kw))
    answer = e.run(QUESTION, fixed=True).output_ids
    assert len(read) == 5
    without_step(e.lm.model)
    assert e.run(QUESTION, fixed=True).output_ids == answer and len(read) == 5


@pytest.mark.parametrize("more", ["", "+kv", "+vocab"])
def test_a_rate_of_one_is_the_model_without_it(more):
    sparse, plain = engine("words:method=prefill,rate=1,floor=0" + more), engine((more or "+baseline")[1:])
    a, b = sparse.run(QUESTION), plain.run(QUESTION)
    assert (a.output_ids, a.prompt_tokens) == (b.output_ids, b.prompt_tokens)
    assert torch.equal(sparse.score(QUESTION, a.output_ids), plain.score(QUESTION, a.output_ids))


def test_the_budget_is_exact_in_the_last_layers():
    for rate in (0.3, 0.5, 0.77):
        e = engine(f"words:method=prefill,rate={rate},floor=0")
        prompt = e.prompt(QUESTION)
        reading = e.reading(prompt, e.inputs(prompt.ids))
        assert reading.read_by()[-1] == reading.budget == -int(-rate * len(prompt.ids) // 1)
        cache, inputs = e.make_cache(), e.inputs(prompt.ids).inputs
        with torch.inference_mode():
            sparse_view(reading)(**inputs, past_key_values=cache)
        assert [layer.get_seq_length() for layer in cache.layers] == reading.read_by()


def test_each_question_of_a_chat_chooses_anew_and_short_turns_are_kept():
    e = engine()
    e.chat(QUESTION)
    assert [bool(k.how) for k in e.kept.entries] == [True]  # for this very prompt; nothing to go on from
    e.chat("And the tide?")
    assert e.last.cached_prompt_tokens == 0
    prompt = e.prompt([*e.history, dict(role="user", content="And the boat?")])
    assert e.reading(prompt, e.inputs(prompt.ids)).asked < 64
    e.reset()
    e.chat("What is rain?")
    e.chat("And snow?")
    assert e.last.cached_prompt_tokens > 0


def test_going_on_from_a_kept_passage_is_no_sparse_reading():
    "A passage that was read whole stays: the next question about it reads its own tokens only."
    e = engine("words:method=prefill,rate=0.5,floor=100000")
    e.chat(QUESTION)
    assert any("pays from 100,000 tokens on" in n for n in e.last.notes)
    object.__setattr__(e.sparse.config, "floor", 0)
    e.chat("And the tide?")
    assert e.last.cached_prompt_tokens > 200 and any("are new" in n for n in e.last.notes)


@pytest.mark.parametrize("more", ["", "+kv"])
def test_the_same_prompt_comes_back_and_is_never_taken_for_a_whole_one(tmp_path, more):
    """From memory, and from the store in another engine: the same answer, though nothing but the end is read. A plain
    engine at the same store does not see it, nor does another rate."""
    store = PrefixStore(tmp_path, chunk=32)

    def asked(recipe, n=0, e=None):
        e = e or engine(recipe, prefix_store=store)
        e.history.clear()
        e.chat(QUESTION)
        assert e.last.cached_prompt_tokens == n
        return e

    first = asked(SPARSE + more)
    want, read, files = first.last.output_ids, first.last.prompt_tokens, store.stats()["files"]
    assert files == 1
    for e in (first, None):
        assert asked(SPARSE + more, read - 1, e).last.output_ids == want
    asked(SPARSE.replace("0.5", "0.6") + more)
    plain = engine("baseline", prefix_store=store)
    plain.chat(QUESTION)
    before = engine("baseline").answer([dict(role="user", content=QUESTION)])
    assert plain.last.output_ids == [i for piece in before for i in piece.ids] and plain.last.cached_prompt_tokens == 0
    assert asked(SPARSE + more, read - 1).last.output_ids == want


def test_a_prompt_in_few_bits_is_not_kept_in_the_store(tmp_path):
    store = PrefixStore(tmp_path)
    e = engine(SPARSE + "+kv:bits=8", prefix_store=store)
    e.chat(QUESTION)
    assert any("the prefix store was not used: keys and values in few bits" in n for n in e.last.notes)
    assert store.stats()["files"] == 0


def test_what_cannot_be_read_sparsely_says_so():
    short = engine("words:method=prefill,target_tokens=5,floor=0").run(QUESTION)
    assert any("below the" in n and "always read" in n for n in short.notes)
    assert short.prompt_tokens == short.prompt_tokens_base
    e = engine("words:method=prefill,rate=0.5,floor=4000")
    assert any("read whole: sparse prefill pays from 4,000 tokens on" in n for n in e.run(QUESTION).notes)
    ids = tiny().tokenizer(QUESTION)["input_ids"]
    assert engine().run(ids).prompt_tokens == len(ids)  # token ids are read as they are
    with pytest.raises(UnsupportedModelError, match="say its prompt again"):
        engine(SPARSE + "+kv:budget=50%,policy=kvzip")
    for family, said in (("gpt2", "built as Llama"), ("mistral", "sliding windows"), ("llama", "at least 4 layers")):
        lm = LM(small_model(family), tokenizer(), family)
        with pytest.raises(UnsupportedModelError, match=said):
            EnhancedFusedLLMEngine(lm, recipe=SPARSE)
    lm = LM(small_model("llama", num_hidden_layers=4), tokenizer(), "unwatched")
    lm.model._can_set_attn_implementation = lambda: False
    with pytest.raises(UnsupportedModelError, match="does not let its attention be watched"):
        EnhancedFusedLLMEngine(lm, recipe=SPARSE)
    with pytest.raises(ConfigError, match="needs a rate"):
        engine("words:method=prefill")


def test_other_families_read_sparsely():
    for family in ("llama", "qwen2", "qwen3", "smollm"):
        lm = LM(small_model(family, num_hidden_layers=5), tokenizer(), family)
        e = EnhancedFusedLLMEngine(lm, recipe=SPARSE, max_new_tokens=4)
        a = e.run(QUESTION, fixed=True)
        assert a.prompt_tokens < a.prompt_tokens_base
        assert e.score(QUESTION, a.output_ids).argmax(-1).tolist() == a.output_ids


def test_the_model_is_left_as_it_was():
    lm = load("llmopt-tiny", "cpu")
    x = dict(input_ids=torch.tensor([lm.encode_chat([dict(role="user", content=QUESTION)])]))
    before = lm.model(**x).logits
    EnhancedFusedLLMEngine(lm, recipe=SPARSE, max_new_tokens=4).run(QUESTION)
    assert torch.equal(lm.model(**x).logits, before) and lm.model.config._attn_implementation == "sdpa"
    assert not any(m._forward_pre_hooks for m in lm.model.modules())
