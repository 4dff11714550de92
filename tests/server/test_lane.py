"The way to a model, where one event loop ends and another one begins."

import asyncio
import time
from types import SimpleNamespace

from llmopt.server import jobs
from llmopt.server.jobs import Finished, Lane, generate


def test_a_loop_that_ends_early_leaves_the_way_free(monkeypatch):
    "The thread of the model is done only after the loop that asked is gone; the next loop is answered all the same."
    work = jobs._work  # private: what runs in the thread of the model

    def slowly(*args):
        work(*args)
        time.sleep(0.05)  # the answer has ended, the thread has not

    monkeypatch.setattr(jobs, "_work", slowly)
    lane = Lane()

    async def answer():
        kinds = [type(i) async for i in generate(lane, lambda put, stop: SimpleNamespace(finish_reason="stop"), 5)]
        return kinds

    assert [asyncio.run(answer()) for _ in range(2)] == [[Finished], [Finished]]
