"Several threads want one model: one at a time, in their order, and whoever waits can give up."

import threading
import time

import pytest

from helpers import tiny
from llmopt.engine import EnhancedFusedLLMEngine
from llmopt.engine.queue import queue_of


def engine(recipe="baseline", **kw):
    return EnhancedFusedLLMEngine(tiny(), recipe=recipe, **{"max_new_tokens": 4} | kw)


def line_up(queue, calls):
    "Start a thread for each call, one after the other, while the model is taken; the threads."
    threads = []
    for call in calls:
        threads.append(threading.Thread(target=call))
        waiting = queue.waiting
        threads[-1].start()
        while queue.waiting == waiting:
            time.sleep(0.001)
    return threads


def test_answers_come_in_the_order_of_the_questions():
    "Of engines with different recipes, too: the model is one, and the wait is part of the time to the first token."
    done, queue = [], engine().queue
    engines = [engine(r) for r in ("baseline", "words:n=2", "kv", "vocab")]
    assert all(e.queue is queue for e in engines)
    with queue.turn():
        threads = line_up(queue, [lambda e=e: done.append(e.run("What is ice?")) for e in engines])
    for t in threads:
        t.join()
    assert [m.method for m in done] == [e.recipe.id for e in engines]
    waits = [m.queue_ms for m in done]
    assert waits == sorted(waits) and all(m.ttft_ms > m.queue_ms > 0 for m in done)
    assert all(abs(m.queue_ms + m.preprocess_ms + m.prefill_ms - m.ttft_ms) < 1e-6 for m in done)


def test_who_waits_can_give_up():
    "The answer has no token, the others go on, and nothing of the turn is in the history."
    e, stop, done = engine(), threading.Event(), []
    with e.queue.turn():
        threads = line_up(
            e.queue, [lambda: done.append(e.chat("What is ice?", stop=stop)), lambda: e.chat("What is rain?")]
        )
        stop.set()
        threads[0].join()
        assert e.queue.waiting == 1 and e.history == [] and done == [""]
        assert (e.last.finish_reason, e.last.completion_tokens, e.last.prompt_tokens, e.last.ttft_ms) == (
            "stopped",
            0,
            0,
            None,
        )
    threads[1].join()
    assert [m["content"] for m in e.history][0] == "What is rain?" and e.last.finish_reason == "length"


def test_an_answer_that_waits_can_be_closed():
    e = engine()
    answer = e.answer("What is ice?")
    with e.queue.turn():
        (reader,) = line_up(e.queue, [lambda: list(answer)])
        assert e.queue.waiting == 1
        dropped = e.answer("What is rain?")
        (other,) = line_up(e.queue, [lambda: next(dropped, None)])
        closing = [t for t in threading.enumerate() if t.name == "llmopt-stream"]
        assert len(closing) == 2
    reader.join()
    other.join()
    dropped.close()
    assert answer.metrics.completion_tokens == 4 and e.queue.waiting == 0 and e.queue.owner is None


def test_a_callback_may_ask_the_same_model():
    "It runs in the thread that has the model."
    e, inside = engine(), []
    e.run("What is ice?", on_token=lambda ids: inside or inside.append(engine("kv").run("What is rain?").output_ids))
    assert inside == [engine("kv").run("What is rain?").output_ids]


def test_an_error_leaves_the_model_free():
    e = engine()
    with pytest.raises(Exception, match="broken"):
        e.run("What is ice?", on_token=lambda ids: exec("raise RuntimeError('broken')"))
    assert e.queue.owner is None and e.run("What is ice?").completion_tokens == 4


def test_a_converted_model_is_a_model_of_its_own():
    sparse, plain = engine("larosa:when=always"), engine()
    assert sparse.queue is not plain.queue and sparse.queue is engine("larosa:when=always").queue is queue_of(
        sparse.lm.model
    )
    assert plain.lm.model is tiny().model
