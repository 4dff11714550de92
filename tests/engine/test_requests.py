"Nothing of a request lives on a shared model: threads, streams in turn, errors in the middle, a fork."

import multiprocessing
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch
from forked import Process

from helpers import tiny
from llmopt.core import load, weights_hash
from llmopt.engine import EnhancedFusedLLMEngine
from llmopt.errors import ConfigError, ModelError

QUESTIONS = ["What is rain?", "What is a glacier?", "How do vaccines work?", "What is ice?"]
LAROSA = "larosa:when=always"
RECIPES = ["baseline", "vocab", "kv", "kv:budget=40", LAROSA, f"words:n=3+vocab+{LAROSA}+kv"]


def engine(recipe="baseline", **kw):
    "An engine around the one bundled model of this process."
    return EnhancedFusedLLMEngine(tiny(), recipe=recipe, **{"max_new_tokens": 8} | kw)


@cache
def alone(recipe, question):
    "The answers of an engine that nobody disturbs: tokens outside a conversation, text in one."
    e = engine(recipe)
    return e.run(question).output_ids, e.chat(question)


def state(model):
    "What must be the same after a request."
    return weights_hash(model), model.generation_config.to_dict(), model.config._attn_implementation


@pytest.fixture
def unchanged():
    "Fails if a test leaves the shared model, or the random numbers of the process, other than they were."
    before, random = state(tiny().model), torch.get_rng_state()
    yield
    assert state(tiny().model) == before and torch.equal(random, torch.get_rng_state())


@pytest.fixture
def switching():
    "Threads take turns a hundred times more often than usual."
    usual = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    yield
    sys.setswitchinterval(usual)


@pytest.mark.parametrize("recipe", RECIPES)
def test_threads_answer_as_one_alone_does(recipe, unchanged, switching):
    questions = QUESTIONS * 2
    want = [alone(recipe, q)[0] for q in questions]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda q: engine(recipe).run(q).output_ids, questions))
    assert together == want


def test_engines_made_at_once():
    "Four threads make the first sparse engines of a model at the same moment: they share one conversion."
    lm = load("llmopt-tiny", "cpu")
    with ThreadPoolExecutor(4) as pool:
        engines = list(pool.map(lambda _: EnhancedFusedLLMEngine(lm, recipe=LAROSA), range(4)))
    assert len({id(e.lm.model) for e in engines}) == 1


def test_samples_in_threads_keep_to_their_seeds(unchanged, switching):
    def sampled(seed):
        return engine().run("Tell me a story.", temperature=1.0, seed=seed).output_ids

    alone = [sampled(s) for s in range(6)]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(sampled, range(6))) == alone


PAIRS = [(r, r) for r in RECIPES] + [(r, "baseline") for r in ("kv:budget=40", LAROSA, RECIPES[-1])]


@pytest.mark.parametrize("recipes", PAIRS, ids=" beside ".join)
def test_streams_read_in_turn(recipes, unchanged):
    "Two iterators, a piece of the one and a piece of the other: each text is what it would be alone."
    questions = ["What is rain?", "What is ice?"]
    want = [alone(r, q)[1] for r, q in zip(recipes, questions)]
    streams = [engine(r).stream(q) for r, q in zip(recipes, questions)]
    texts = ["", ""]
    while any(pieces := [next(s, "") for s in streams]):
        texts = [t + p for t, p in zip(texts, pieces)]
    assert [t.strip() for t in texts] == want


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_error_in_the_middle_leaves_all_as_it_was(recipe, unchanged):
    e = engine(recipe)
    e.chat("What is water?")
    before, asked = list(e.history), []

    def break_at_third(ids):
        asked.append(ids)
        if len(asked) == 3:
            raise RuntimeError("broken pipe")

    with pytest.raises(ModelError, match="broken pipe"):
        e.chat("And what is ice?", on_token=break_at_third)
    assert e.history == before
    with pytest.raises(ConfigError):
        list(e.stream("And what is ice?", max_new_tokens=0))
    assert e.history == before
    other = engine(recipe)
    other.chat("What is water?")
    assert e.chat("And what is ice?") == other.chat("And what is ice?")


def test_a_stream_that_nobody_reads_on_ends(unchanged):
    e = engine(max_new_tokens=400)
    first = next(e.stream("Tell me a long story."))  # the iterator is dropped right away
    assert first and e.history == []
    assert e.chat("What is ice?", max_new_tokens=4)


def answer_and_fork(*recipes):
    "Answer in this process, fork, and compare what the child answers: exit code 0 if it is the same, 2 if it hangs."
    engines = [EnhancedFusedLLMEngine("llmopt-tiny", recipe=r, max_new_tokens=6) for r in recipes]
    want = [e.run("What is ice?").output_ids for e in engines]

    def ask():
        streamed = all("".join(e.stream("What is ice?")).strip() for e in engines)
        sys.exit(0 if [e.run("What is ice?").output_ids for e in engines] == want and streamed else 1)

    child = multiprocessing.get_context("fork").Process(target=ask)
    child.start()
    child.join(60)
    sys.exit(2 if child.is_alive() and not child.kill() else child.exitcode)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_child_process_can_ask():
    "As in servers and data loaders: the parent has answered, forks, and the child answers the same."
    parent = Process(target=answer_and_fork, args=("baseline", "kv", LAROSA))  # a new one, with no threads yet
    parent.start()
    parent.join(120)
    assert parent.exitcode == 0
