"Drafts: the text of plain decoding, in every family, for several answers at once, and an honest account."

import random
import sys
import threading

import numpy as np
import pytest
import torch
import transformers as T

from helpers import FAMILIES, random_ids, small_model, tiny
from llmopt.adaptivocab import Drafts
from llmopt.adaptivocab.drafts import DraftSession
from llmopt.adaptivocab.reader import VocabConfig
from llmopt.core import LM, load, speculative_decode, user
from llmopt.core.pass_costs import costs_of
from llmopt.errors import ConfigError, UnsupportedModelError
from llmopt.kv_cache import KVCacheConfig

PROMPTS = [
    "What is machine learning?",
    "Why is the sky blue?",
    "What causes high blood pressure?",
    "Tell me a story.",
]
FREE = costs_of(0, 0)


def plain(model, ids, **kw):
    "Greedy decoding by transformers alone"
    x, kw = torch.tensor([ids]), dict(max_new_tokens=16, do_sample=False) | kw
    return model.generate(x, attention_mask=torch.ones_like(x), **kw)[0, len(ids) :].tolist()


def right_and_wrong(model, prompts, seed=0, share=0.2, **kw):
    "Drafts that are often right and often wrong: from what the model writes, with a `share` of the tokens changed"
    rng, size = random.Random(seed), model.get_input_embeddings().weight.shape[0]
    told = [p + plain(model, p, **kw) for p in prompts]
    return Drafts([[rng.randrange(size) if rng.random() < share else t for t in s] for s in told], costs=FREE)


def knows(prompt, said, **kw):
    "Drafts that know that `said` follows `prompt`"
    return Drafts([prompt[-2:] + said], **dict(costs=FREE) | kw)


def test_the_same_text_with_every_cache_and_reading_phrases():
    lm = tiny()
    prompts = [lm.encode_chat([user(p)]) for p in PROMPTS]
    d, kv, reader = right_and_wrong(lm.model, prompts), KVCacheConfig(), VocabConfig().reader(lm)
    for p in prompts:
        want = plain(lm.model, p)
        assert d.generate(lm, p, 16).ids == want
        assert plain(lm.model, p, **d.using()) == want
        assert plain(lm.model, p, past_key_values=(c := T.DynamicCache(config=lm.model.config)), **d.using()) == want
        assert c.get_seq_length() == len(p) + len(want) - 1  # all but the last token, as without drafts
        with kv.attach(lm):
            slab = plain(lm.model, p, past_key_values=kv.make_cache(lm))
            assert plain(lm.model, p, past_key_values=kv.make_cache(lm), **d.using()) == slab
        kw = dict(max_new_tokens=24, do_sample=False)
        assert reader.generate(p, **kw, **d.using()) == reader.generate(p, **kw)
    assert d.stats.tokens / 20 < d.stats.accepted < d.stats.drafted - 20
    assert d.stats.forwards == d.stats.tokens - d.stats.accepted


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_same_text_in_every_family(family):
    "Mistral's sliding window is shorter than the text, and a crop must not damage it."
    model = small_model(family)
    prompts = [random_ids(n, seed=n)[0].tolist() for n in (1, 7, 20)]
    kw = dict(pad_token_id=0, eos_token_id=None, max_new_tokens=40)
    d = right_and_wrong(model, prompts, share=0.4, **kw)
    for p in prompts:
        assert plain(model, p, **kw, **d.using()) == plain(model, p, **kw)
    assert 0 < d.stats.accepted < d.stats.drafted


def test_in_bfloat16_texts_differ_at_ties_only():
    lm = load("llmopt-tiny", "cpu", dtype="bfloat16")
    for text in PROMPTS[:2]:
        p = lm.encode_chat([user(text)])
        want, got = plain(lm.model, p, max_new_tokens=24), Drafts(costs=FREE).generate(lm, p, 24).ids
        if want != got:
            n = next(i for i, (a, b) in enumerate(zip(want, got)) if a != b)
            with torch.inference_mode():
                logits = lm.model(torch.tensor([p + want[:n]])).logits[0, -1].float()
            assert abs(logits[want[n]] - logits[got[n]]) <= 2**-6 * logits[want[n]].abs()


def test_the_account_when_every_draft_is_wrong():
    "Each pass still writes one token, and drafts cost no more than their limit and what they spared."
    lm = tiny()
    prompt, kw = lm.encode_chat([user(PROMPTS[1])]), dict(max_new_tokens=40, min_new_tokens=40)
    out = plain(lm.model, prompt, **kw)
    wrong = [(t, (n + 1) % lm.rows) for t, n in zip(out, out[1:])]
    for cost in (0, 0.1, 0.02):
        d = Drafts(wrong, [w for w in wrong for _ in range(50)], costs=costs_of(0, cost), limit=0.1)
        assert plain(lm.model, prompt, **kw, **d.using()) == out
        assert d.stats.drafted > 0 and d.stats.forwards == 40 - d.stats.accepted
        assert d.stats.drafted * cost <= d.limit * d.stats.forwards + d.stats.accepted + 1e-9


def test_the_account_when_every_draft_is_right():
    lm = tiny()
    prompt, kw = lm.encode_chat([user(PROMPTS[1])]), dict(max_new_tokens=40, min_new_tokens=40)
    out, passes = plain(lm.model, prompt, **kw), []
    d = knows(prompt, out)
    hook = lm.model.register_forward_hook(lambda *_: passes.append(1))
    assert plain(lm.model, prompt, **kw, **d.using()) == out
    hook.remove()
    assert len(passes) == d.stats.forwards == 40 - d.stats.accepted <= 5
    assert d.spared == 1 - d.stats.forwards / 40
    d.reset()
    assert (d.credit, d.spared, vars(d.stats)) == (0, 0, dict(forwards=0, tokens=0, drafted=0, accepted=0))


def test_where_the_text_repeats_itself_it_is_foreseen_beyond_its_end():
    session = DraftSession(Drafts(costs=FREE), [5, 6, 7] * 4)
    assert session.propose(None, None, 10) == [5, 6, 7, 5, 6, 7, 5, 6, 7, 5]
    assert session.text.text == [5, 6, 7] * 4  # what was looked ahead is forgotten


def test_guesses_that_are_wrong_are_not_trusted_again():
    d = Drafts([(1, 2)], costs=costs_of(0, 0.2))
    d.credit, session = 99.0, DraftSession(d, [1])
    assert session.propose(None, None, 4) == [2]
    for _ in range(9):
        for guess, kind, _ in d.guesses(session.text.text, session.text.match, session.place):
            d.acceptance.learn(kind, guess == 3)
    assert session.propose(None, None, 4) == []


def test_nothing_that_costs_is_drafted_without_credit():
    lm = tiny()
    prompt = lm.encode_chat([user(PROMPTS[0])])
    out = plain(lm.model, prompt)
    d = knows(prompt, out, limit=0, costs=costs_of(0, 0.1))
    assert d.generate(lm, prompt, 16).ids == out
    assert plain(lm.model, prompt, **d.using()) == out
    assert (d.stats.drafted, d.stats.forwards, d.spared) == (0, 2 * len(out), 0)


def test_the_ways_to_stop():
    lm = tiny()
    p = lm.encode_chat([user(PROMPTS[0])])
    out = plain(lm.model, p, max_new_tokens=30, min_new_tokens=30)
    stops = (
        dict(eos_token_id=[out[1], 0]),
        dict(max_new_tokens=1),
        dict(max_length=len(p) + 9, max_new_tokens=None),
        dict(no_repeat_ngram_size=2),
        dict(min_new_tokens=20, max_new_tokens=30, eos_token_id=out[2]),
        dict(bad_words_ids=[[out[3]]]),
    )
    for kw in stops:
        d = knows(p, out)
        assert plain(lm.model, p, **kw, **d.using()) == plain(lm.model, p, **kw)
        assert d.stats.forwards == d.stats.tokens - d.stats.accepted


def test_greedy_is_greedy_whatever_the_checkpoint_asks_for():
    lm = load("llmopt-tiny", "cpu")
    prompt = lm.encode_chat([user(PROMPTS[2])])
    want = speculative_decode(lm.model, prompt, lambda *_: [], 40, lm.stop_ids).ids
    config = lm.model.generation_config
    config.repetition_penalty, config.do_sample, config.temperature, config.max_length = 1.3, True, 0.7, 20
    d = knows(prompt, want)
    assert d.generate(lm, prompt, 40).ids == want
    assert d.stats.accepted > 2


def test_an_answer_ends_at_every_stop_token_of_the_model():
    lm = load("llmopt-tiny", "cpu")
    prompt = lm.encode_chat([user(PROMPTS[0])])
    lm.model.generation_config.eos_token_id = 0  # the template's <|end|> is still one of `stop_ids`
    got = Drafts().generate(lm, prompt, 200)
    assert got.ids[-1] in lm.stop_ids and len(got.ids) < 200


def test_what_drafts_are_not_for_is_refused():
    lm = tiny()
    p = lm.encode_chat([user(PROMPTS[0])])
    d = Drafts()
    for kw in (dict(num_beams=2), dict(use_cache=False), dict(return_dict_in_generate=True)):
        with pytest.raises(ConfigError):
            plain(lm.model, p, **kw, **d.using())
    with pytest.raises(UnsupportedModelError, match="cannot be cropped"):
        plain(lm.model, p, cache_implementation="static", **d.using())
    with pytest.raises(ConfigError, match="one prompt at a time"):
        lm.model.generate(torch.tensor([p, p]), attention_mask=torch.ones(2, len(p)), do_sample=False, **d.using())
    with pytest.raises(ConfigError, match="without padding"):
        mask = torch.tensor([[0] + [1] * (len(p) - 1)])
        lm.model.generate(torch.tensor([p]), attention_mask=mask, do_sample=False, **d.using())
    with pytest.raises(ConfigError, match="one list of token ids"):
        d.generate(lm, None)
    for bad in (-1, float("nan"), 2, "much"):
        with pytest.raises(ConfigError, match="limit of drafts"):
            Drafts(limit=bad)
    for bad in (dict(drafts="yes"), dict(drafts=1), dict(fold="no")):
        with pytest.raises(ConfigError, match="true or false"):
            VocabConfig(**bad)


def test_nothing_one_token_and_numpy_numbers():
    lm = tiny()
    prompt = lm.encode_chat([user(PROMPTS[0])])
    out = plain(lm.model, prompt, max_new_tokens=4)
    d = knows(prompt, out)
    assert d.generate(lm, prompt, 0).ids == [] and d.stats.tokens == 0
    assert d.generate(lm, prompt, np.int64(1)).ids == out[:1]
    assert d.generate(lm, np.array(prompt), 4).ids == out


def test_phrases_of_tokens_that_the_model_has_no_rows_for():
    model = small_model(vocab_size=64)
    tok = type("Tok", (), dict(eos_token_id=None, chat_template=None))
    lm, p = LM(model, tok, "small"), [5, 6, 7]
    want = speculative_decode(model, p, lambda *_: [], 12, lm.stop_ids).ids
    d = Drafts([(t, 4000) for t in {*want, *p}], costs=FREE)
    assert d.generate(lm, p, 12).ids == want
    kw = dict(max_new_tokens=12, pad_token_id=0)
    assert plain(model, p, **kw, **d.using()) == plain(model, p, **kw)


def test_two_answers_in_turn_and_threads_share_one_object():
    lm = tiny()
    prompts = [lm.encode_chat([user(p)]) for p in PROMPTS]
    want = [plain(lm.model, p) for p in prompts]
    d = right_and_wrong(lm.model, prompts)
    inner = []

    def in_between(step):
        inner.append(d.generate(lm, prompts[1], 16).ids)

    assert d.generate(lm, prompts[0], 16, on_step=in_between).ids == want[0]
    assert inner and all(ids == want[1] for ids in inner)
    d.reset()
    got = {}
    threads = [
        threading.Thread(target=lambda i=i: got.update({i: d.generate(lm, prompts[i], 16).ids}))
        for i in range(len(prompts))
    ]
    was = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        [t.start() for t in threads]
        [t.join() for t in threads]
    finally:
        sys.setswitchinterval(was)
    assert [got[i] for i in range(len(prompts))] == want
    assert d.stats.tokens == sum(map(len, want))
    assert d.stats.forwards == d.stats.tokens - d.stats.accepted


def test_an_exception_in_the_middle_leaves_drafts_usable():
    lm = tiny()
    prompt = lm.encode_chat([user(PROMPTS[0])])
    want = plain(lm.model, prompt)
    d = knows(prompt, want)

    def stop(step):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        d.generate(lm, prompt, 16, on_step=stop)
    assert d.generate(lm, prompt, 16).ids == want
