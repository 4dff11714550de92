"Options of sampling in whole answers: seeds, penalties, stop strings across tokens, log-probabilities."

import itertools
import threading
import time

import pytest
import torch

from helpers import tiny
from llmopt.core import user
from llmopt.engine import EnhancedFusedLLMEngine, Sampling
from llmopt.errors import ConfigError, ContextError

QUESTION = "What is the difference between weather and climate?"


def engine(recipe="baseline", **kw):
    return EnhancedFusedLLMEngine(tiny(), recipe=recipe, **{"max_new_tokens": 12} | kw)


def test_greedy_is_greedy_whatever_is_said_about_draws():
    want = engine().run(QUESTION).output_ids
    assert engine().run(QUESTION, top_p=0.1, top_k=3, seed=5).output_ids == want
    assert engine().run(QUESTION, temperature=2.0, top_k=1, seed=5).output_ids == want
    assert engine().run(QUESTION, temperature=2.0, top_p=0.0, seed=5).output_ids == want


@pytest.mark.parametrize("options", [dict(top_k=20, top_p=0.8), dict(repetition_penalty=1.2)])
def test_a_seed_gives_the_same_answer_again(options):
    options |= dict(temperature=1.3, fixed=True)
    a, b, c = (engine().run(QUESTION, seed=s, **options).output_ids for s in (3, 3, 4))
    assert a == b != c


@pytest.mark.parametrize("recipe", ["baseline", "vocab"])
def test_the_penalty_is_that_of_transformers(recipe):
    "It sees prompt and answer, also where the model reads phrases, which have no ids."
    e = engine(recipe)
    ids = e.lm.encode_chat([user(QUESTION)])
    kw = dict(max_new_tokens=12, do_sample=False, repetition_penalty=1.4)
    if e.reader:
        want = e.reader.generate(ids, **kw)
    else:
        x = torch.tensor([ids])
        want = e.lm.model.generate(x, attention_mask=torch.ones_like(x), **kw)[0, len(ids) :].tolist()
    assert e.run(QUESTION, repetition_penalty=1.4).output_ids == want


def test_a_bias_rules_tokens_out():
    first = engine().run(QUESTION).output_ids[0]
    assert first not in engine().run(QUESTION, logit_bias={first: -100}).output_ids


def test_log_probabilities_are_those_of_teacher_forcing():
    "Of the model's own distribution, though the tokens are drawn at another temperature."
    m = engine().run(QUESTION, temperature=1.5, seed=1, logprobs=2)
    rows = engine().score(QUESTION, m.output_ids)
    assert [t.id for t in m.logprobs] == m.output_ids
    for t, row in zip(m.logprobs, rows):
        assert abs(t.logprob - row[t.id].item()) < 1e-4
        assert [i for i, _ in t.top] == row.topk(2).indices.tolist()


def test_stop_strings_end_an_answer_wherever_tokens_begin():
    "Any five characters of the answer: what comes is the text before them, at once and in pieces."
    e = engine(max_new_tokens=16)
    whole = "".join(p.text for p in e.answer(QUESTION))
    for at in range(1, len(whole) - 5, 11):
        stop = whole[at : at + 5]
        want = whole[: whole.find(stop)]
        answer = e.answer(QUESTION, stop_strings=["\0 never", stop])
        pieces = [p.text for p in answer]
        assert "".join(pieces) == want and answer.metrics.finish_reason == "stop"
        assert all(p for p in pieces[:-1])
    m = e.run(QUESTION, stop_strings=stop)
    assert m.output_text == want.strip() and m.completion_tokens == answer.metrics.completion_tokens <= 16


def test_what_begins_like_a_stop_string_and_is_none_comes_in_the_end():
    whole = engine().run(QUESTION).output_text
    answer = engine().answer(QUESTION, stop_strings=whole[-3:] + " and never this")
    assert "".join(p.text for p in answer).strip() == whole and answer.metrics.finish_reason == "length"


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(top_p=-0.1), "top_p must be a probability"),
        (dict(top_k=1.5), "top_k must be a whole number"),
        (dict(repetition_penalty=float("inf")), "repetition_penalty must be a positive number"),
        (dict(stop_strings=3), "stop_strings are a text or a list"),
        (dict(stop_strings="a", fixed=True), "fixed length has no stop_strings"),
        (dict(logit_bias={4096: 1}), "logit_bias names token 4096, but llmopt-tiny has 4,096"),
        (dict(logit_bias={"a": 1}), "a token id of logit_bias"),
        (dict(logit_bias=[1]), "logit_bias is token ids"),
        (dict(logprobs=-1), "logprobs must be a whole number"),
        (dict(n=2), "no option 'n'; it has max_new_tokens, fixed, temperature"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(options, says):
    for ask in (engine().run, engine().answer, engine().chat, engine().stream):
        with pytest.raises(ConfigError, match=says) as error:
            ask(QUESTION, **options)
        assert "\n" not in str(error.value)


def test_sampling_is_hashable_and_plain():
    a = Sampling(stop_strings="x", logit_bias={2: 1, 1: 0.5})
    assert a == Sampling(stop_strings=("x",), logit_bias={1: 0.5, 2: 1}) and len({a, a}) == 1


@pytest.mark.parametrize("recipe", ["baseline", "vocab", "words:n=3+vocab+kv"])
def test_the_pieces_of_an_answer(recipe):
    "Texts join to the answer, ids to its tokens, log-probabilities to those of its metrics."
    answer = engine(recipe).answer([user(QUESTION)], logprobs=0)
    pieces, alone = list(answer), engine(recipe).run([user(QUESTION)], logprobs=0)
    m = answer.metrics
    assert "".join(p.text for p in pieces).strip() == m.output_text == alone.output_text
    assert [*itertools.chain(*(p.ids for p in pieces))] == m.output_ids == alone.output_ids
    assert [*itertools.chain(*(p.logprobs for p in pieces))] == m.logprobs
    assert len(pieces) > 5 and m.kv_bytes_live == alone.kv_bytes_live


def test_an_answer_that_is_closed():
    "It ends with what was made so far, the model is free, and the next answer is a whole one."
    e = engine(max_new_tokens=400)
    with e.answer("Tell me a long story.") as answer:
        first = next(answer)
        assert answer.metrics is None and not e.last
    m = answer.metrics
    assert m.finish_reason == "stopped" and m.output_ids[: len(first.ids)] == first.ids and m.completion_tokens < 400
    answer.close()
    assert list(answer) == [] and e.queue.owner is None
    never = e.answer("Tell me a long story.")
    never.close()
    assert never.metrics is None


def test_an_answer_is_closed_by_one_thread_while_another_reads():
    "As a server does when a client has gone: both end, without an error, and the model is free."
    e, seen = engine(max_new_tokens=400), []
    answer = e.answer("Tell me a long story.")
    reader = threading.Thread(target=lambda: seen.extend(answer))
    reader.start()
    while not answer.pieces.begun:
        time.sleep(0.001)
    answer.close()
    reader.join(10)
    assert not reader.is_alive() and e.queue.owner is None and list(answer) == []
    assert answer.metrics.completion_tokens < 400


def test_an_error_is_raised_once_to_the_reader():
    answer = engine().answer("why " * 2000)
    with pytest.raises(ContextError):
        next(answer)
    assert list(answer) == [] and answer.metrics is None
