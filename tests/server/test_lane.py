"The way to a model, where one event loop ends and another one begins."

import asyncio
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest

from llmopt.server import jobs
from llmopt.server.jobs import Finished, Lane, generate


@pytest.fixture
def slow(monkeypatch):
    "Every answer ends a little before the thread that made it."
    work = jobs._work  # private: what runs in the thread of the model

    def slowly(*args):
        work(*args)
        time.sleep(0.05)

    monkeypatch.setattr(jobs, "_work", slowly)


def failing(put, stop):
    "An answer that is none."
    raise KeyError("a bug")


@pytest.mark.parametrize("work", [lambda put, stop: SimpleNamespace(finish_reason="stop"), failing])
def test_the_way_is_free_when_an_answer_is_at_its_end(slow, work):
    "Whoever has it all may end the event loop, and with it what would pass the turn on."
    lane = Lane()

    async def busy_after():
        with suppress(KeyError):
            async for _ in generate(lane, work, 5):
                assert lane.busy
        return lane.busy

    assert asyncio.run(busy_after()) is False


def test_a_loop_that_ends_early_leaves_the_way_free(slow):
    "The thread of the model is done only after the loop that asked is gone; the next loop is answered all the same."
    lane = Lane()

    async def answer():
        kinds = [type(i) async for i in generate(lane, lambda put, stop: SimpleNamespace(finish_reason="stop"), 5)]
        return kinds

    assert [asyncio.run(answer()) for _ in range(2)] == [[Finished], [Finished]]
