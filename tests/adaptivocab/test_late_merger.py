"Late merging: what the layers see, in several families, and that a request leaves nothing on the shared model."

import threading

import numpy as np
import pytest
import torch
import transformers as T

from helpers import random_ids, small_model, tiny
from llmopt.adaptivocab import LateMerger, PhraseReader, SimpleAdaptiVocab, VocabConfig
from llmopt.adaptivocab.late_merge import late_merged
from llmopt.core import load, user
from llmopt.errors import ConfigError, UnsupportedModelError

TEXT = "Is machine learning a part of the work in the United States?"
KW = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)


def a_prompt(lm):
    "Ids of a chat prompt with phrases in it"
    return lm.encode_chat([user(TEXT)])


def hooks(model):
    "Hooks on any module of `model`"
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_the_last_layer_merges_nothing_and_the_first_deletes():
    lm = tiny()
    v, n, ids = SimpleAdaptiVocab(lm.tokenizer), lm.model.config.num_hidden_layers, a_prompt(tiny())
    plain = PhraseReader(lm.model, SimpleAdaptiVocab(lm.tokenizer, []))
    assert LateMerger(lm.model, v, n).generate(ids, **KW) == plain.generate(ids, **KW)
    last = PhraseReader(lm.model, v, VocabConfig(embed="last"))
    torch.testing.assert_close(
        LateMerger(lm.model, v, 0).score(ids, [5, 6]), last.score(ids, [5, 6]), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_is_generated_is_what_is_scored(attention):
    lm = load("llmopt-tiny", "cpu")
    lm.model.set_attn_implementation(attention)
    ids, late = a_prompt(lm), LateMerger(lm.model, SimpleAdaptiVocab(lm.tokenizer), 2)
    cache = T.DynamicCache(config=lm.model.config)
    out = late.generate(ids, past_key_values=cache, **KW)
    assert late.score(ids, out).argmax(-1).tolist() == out
    assert len(late.keep(ids)) < len(ids)
    lengths = [len(ids) + 5] * 2 + [len(late.keep(ids)) + 5] * 4
    assert [layer.get_seq_length() for layer in cache.layers] == lengths


@pytest.mark.parametrize("family", ["llama", "smollm", "qwen2", "qwen3", "phi3"])
def test_families_that_are_built_as_llama_is(family):
    "Greedy choices while generating are those of one pass over prompt and answer."
    model, ids = small_model(family), random_ids(24)[0].tolist()
    keep = [*range(0, 24, 3), 23]
    out = (
        late_merged(model, keep, 24, 1)
        .generate(torch.tensor([ids]), attention_mask=torch.ones(1, 24), eos_token_id=None, **KW)[0, 24:]
        .tolist()
    )
    x = torch.tensor([ids + out])
    with torch.no_grad():
        logits = late_merged(model, [*keep, *range(24, 30)], 30, 1)(x, use_cache=False).logits[0]
    assert logits[-7:-1].argmax(-1).tolist() == out


def test_a_request_leaves_nothing_on_the_model_even_if_it_fails():
    lm = tiny()
    ids, late, before = a_prompt(lm), LateMerger(lm.model, SimpleAdaptiVocab(lm.tokenizer), 2), hooks(tiny().model)
    late.generate(ids, **KW)
    late.score(ids, [5, 6])

    def fail(input_ids, scores, **kw):
        assert hooks(lm.model) == before
        raise KeyError("in the middle")

    with pytest.raises(KeyError):
        late.generate(ids, stopping_criteria=[fail], **KW)
    assert hooks(lm.model) == before


def test_other_requests_read_the_same_model_meanwhile():
    "A plain answer in the middle of a late-merged one, and late-merged ones in threads"
    lm = tiny()
    ids, late = a_prompt(lm), LateMerger(lm.model, SimpleAdaptiVocab(lm.tokenizer), 2)
    x = torch.tensor([ids])
    plain, want = lm.model.generate(x, attention_mask=torch.ones_like(x), **KW), late.generate(ids, **KW)
    seen = []

    def ask(input_ids, scores, **kw):
        seen.append(torch.equal(lm.model.generate(x, attention_mask=torch.ones_like(x), **KW), plain))
        return False

    assert late.generate(ids, stopping_criteria=[ask], **KW) == want
    assert seen and all(seen)
    got = []
    work = [lambda: got.append(late.generate(ids, **KW) == want)] * 3
    work.append(lambda: got.append(torch.equal(lm.model.generate(x, attention_mask=torch.ones_like(x), **KW), plain)))
    threads = [threading.Thread(target=w) for w in work]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert got == [True] * 4


def test_a_view_sees_later_changes_of_the_weights():
    model, ids = small_model(), random_ids(9)
    view = late_merged(model, range(9), 9, 0)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(0)
        assert torch.equal(view(ids).logits, model(ids).logits)


def test_empty_prompts_empty_answers_one_token_and_numpy():
    lm = tiny()
    late, ids = LateMerger(lm.model, SimpleAdaptiVocab(lm.tokenizer), 2), a_prompt(tiny())
    with pytest.raises(ConfigError, match="nothing to read"):
        late.generate([])
    with pytest.raises(ConfigError, match="empty answer"):
        late.score(ids, [])
    assert late.generate(ids, max_new_tokens=0) == []
    assert late.score(ids[:1], [5]).shape == (1, 4096)
    assert late.generate(np.array(ids), **KW) == late.generate(ids, **KW)
    assert torch.equal(late.score(np.array(ids), np.array([5, 6])), late.score(ids, [5, 6]))


def test_what_cannot_be_merged_is_refused():
    lm = tiny()
    v, ids = SimpleAdaptiVocab(lm.tokenizer), a_prompt(tiny())
    for layer in (-1, 7):
        with pytest.raises(ConfigError, match="layer is from 0 to 6"):
            LateMerger(lm.model, v, layer).generate(ids)
    for keep in ([], [0, 1], [3, 1, 8], [1, 1, 8], [-1, 8], [8, 9]):
        with pytest.raises(ConfigError, match="positions that go on"):
            late_merged(lm.model, keep, 9, 2)
    with pytest.raises(UnsupportedModelError, match="cache that grows, not StaticCache"):
        LateMerger(lm.model, v, 2).generate(ids, cache_implementation="static", **KW)
    for family in ("gpt2", "mistral"):
        with pytest.raises(UnsupportedModelError):
            LateMerger(small_model(family), v, 1).generate(ids)
