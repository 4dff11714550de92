"""Two nodes on this machine, a replica on each, and one of them is killed while it answers.

The models are fakes that repeat what they are told, so an answer carries the mark of its question; each notes in a
file which question it began to answer, and in which process.
"""

import asyncio
import json
import os
import socket
import time
from collections import Counter
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest

from server.fakes import FakeEngine, fake_lm

ray = pytest.importorskip("ray", reason="needs the extra ray: pip install 'llmopt[ray]'")
pytestmark = pytest.mark.slow
CLIENTS, TURNS, PAUSE = 12, 8, 0.02


class Noting(FakeEngine):
    "A fake that notes what it is asked."

    def __init__(self, lm, recipe, notes):
        super().__init__(lm, recipe, PAUSE)
        self.notes = notes

    def answer(self, prompt, **options):
        "As any engine."
        with open(self.notes, "a", encoding="utf-8") as f:
            f.write(f"{os.getpid()} {prompt[-1]['content'].split()[0]}\n")
        return super().answer(prompt, **options)


def noting_app(notes):
    "The server with one fake model."
    from llmopt.server import Registry, Settings, create_app

    registry = Registry([fake_lm(context=10**6)], ["baseline"], make=lambda lm, recipe: Noting(lm, recipe, notes))
    return create_app(registry, settings=Settings())


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    return tmp_path_factory.mktemp("notes") / "begun.txt"


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def served(notes, monkeypatch_module):
    "The URL of two replicas, and a function that kills the node of one of them."
    from ray import serve
    from ray.cluster_utils import Cluster

    from llmopt.server.replicas import application

    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch_module.setenv("PYTHONPATH", os.pathsep.join(paths))  # the replicas import the fakes
    monkeypatch_module.setenv("RAY_USAGE_STATS_ENABLED", "0")
    small = dict(num_cpus=1, object_store_memory=80 * 2**20)
    cluster = Cluster(initialize_head=True, head_node_args=small | dict(include_dashboard=False))
    node = cluster.add_node(**small)
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        serve.start(proxy_location="HeadOnly", http_options=dict(host="127.0.0.1", port=port))
        serve.run(application(partial(noting_app, notes), busy=64))  # so that no conversation has to move
        yield f"http://127.0.0.1:{port}", partial(cluster.remove_node, node, allow_graceful=False)
        serve.shutdown()
    finally:
        ray.shutdown()
        cluster.shutdown()


def asked(*said, **more):
    "A chat request: what the user and the assistant said in turn."
    messages = [dict(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(said)]
    return dict(model="fake", messages=messages) | more


def test_a_conversation_stays_where_it_is(served):
    "All its turns have one replica, and of many conversations both have some."
    homes = []
    with httpx.Client(base_url=served[0], timeout=60) as client:
        for i in range(12):
            turns = [asked(f"subject {i}"), asked(f"subject {i}", "Well?", "go on")]
            replies = [client.post("/v1/chat/completions", json=body) for body in turns]
            first, second = (r.headers["x-llmopt-replica"] for r in replies)
            assert first == second
            homes.append(first)
        assert len({*homes}) == 2
        lines = client.get("/metrics").text.splitlines()
    served_by = {l.split('replica="')[1].split('"')[0] for l in lines if l.startswith("vllm:request_success_total")}
    assert served_by == {*homes}


def test_errors_are_those_of_one_server(served):
    with httpx.Client(base_url=served[0], timeout=60) as client:
        unknown = client.post("/v1/chat/completions", json=asked("Hi", model="gpt"))
        assert unknown.status_code == 404 and unknown.json()["error"]["code"] == "model_not_found"
        broken = client.post("/v1/chat/completions", content=b"{", headers={"content-type": "application/json"})
        assert broken.status_code == 400 and "JSON" in broken.json()["error"]["message"]
        assert client.get("/v1/models").json()["data"][0]["id"] == "fake"


def test_a_client_that_goes_away_frees_the_replica(served):
    "A stream of 500 words would take 10 seconds."
    with httpx.Client(base_url=served[0], timeout=60) as client:
        with client.stream("POST", "/v1/chat/completions", json=asked("word " * 500, stream=True)) as reply:
            lines = reply.iter_lines()
            assert next(lines).startswith("data: ")
        start = time.monotonic()
        home = client.post("/v1/chat/completions", json=asked("word " * 500, max_tokens=1)).headers["x-llmopt-replica"]
        assert home == reply.headers["x-llmopt-replica"] and time.monotonic() - start < 5


class Talk:
    "A conversation of a client, every other turn of which is a stream."

    def __init__(self, client, i):
        self.client, self.said, self.cut, self.homes, self.i = client, [], 0, [], i

    async def turn(self, k):
        "Ask, and ask again only where a stream was cut off."
        mark = f"mark-{self.i}-{k}"
        body = asked(*self.said, mark + " and more words" * 5, stream=bool(k % 2))
        while True:
            reply = await self.client.post("/v1/chat/completions", json=body)
            assert reply.status_code == 200, reply.text
            text = whole(reply.text) if k % 2 else reply.json()["choices"][0]["message"]["content"]
            if text is not None:
                break
            self.cut += 1
        assert text == f"You said: {mark}" + " and more words" * 5
        self.homes.append(reply.headers["x-llmopt-replica"])
        self.said += [body["messages"][-1]["content"], text]


def whole(stream):
    "The text of a stream; None if it ends with the error that it may end with."
    *events, done = [l.removeprefix("data: ") for l in stream.splitlines() if l]
    assert done == "[DONE]"
    chunks = [json.loads(e) for e in events]
    if "error" in chunks[-1]:
        assert chunks[-1]["error"]["code"] == "replica_lost"
        return None
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    return "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)


async def witness(client, session, begun):
    "(replica, text) of a long stream; `begun` is set when its first line is there."
    body, lines = asked("word " * 200, stream=True), []
    async with client.stream("POST", "/v1/chat/completions", json=body, headers={"x-session-id": session}) as reply:
        async for line in reply.aiter_lines():
            lines.append(line)
            begun.set()
    return reply.headers["x-llmopt-replica"], "\n".join(lines)


async def one_session_each(client):
    "A session of each replica."
    homes = {}
    for i in range(20):
        head = {"x-session-id": f"witness {i}"}
        reply = await client.post("/v1/chat/completions", json=asked("Hi", max_tokens=1), headers=head)
        homes.setdefault(reply.headers["x-llmopt-replica"], head["x-session-id"])
    return [*homes.values()]


async def killed(client, kill, sessions):
    "What two long streams, one of each replica, become when one of the nodes is killed in the middle."
    begun = [asyncio.Event() for _ in sessions]
    streams = [asyncio.ensure_future(witness(client, s, b)) for s, b in zip(sessions, begun)]
    await asyncio.gather(*(b.wait() for b in begun))
    await asyncio.to_thread(kill)
    return dict(await asyncio.gather(*streams))


async def all_talks(url, kill):
    "Conversations at the same time; the node is killed when an eighth of the turns are over."
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        sessions = await one_session_each(client)
        talks, soon = [Talk(client, i) for i in range(CLIENTS)], asyncio.Event()

        async def one(talk):
            for k in range(TURNS):
                await talk.turn(k)
                if sum(len(t.homes) for t in talks) >= CLIENTS * TURNS // 8:
                    soon.set()

        async def killer():
            await soon.wait()
            return await killed(client, kill, sessions)

        streams, *_ = await asyncio.gather(killer(), *map(one, talks))
    return talks, streams


def test_a_node_dies_under_load(served, notes):
    "Every question is answered once: no live replica began an answer twice, and no client saw two."
    url, kill = served
    talks, streams = asyncio.run(all_talks(url, kill))
    assert [len(t.homes) for t in talks] == [TURNS] * CLIENTS
    (dead,) = [home for home, stream in streams.items() if whole(stream) is None]  # and the other one is whole
    assert len(streams) == 2 and any(t.homes[0] == dead != t.homes[-1] for t in talks)
    for t in talks:  # once a conversation has moved it stays
        assert [h == dead for h in t.homes] == sorted([h == dead for h in t.homes], reverse=True)
    begun = Counter(tuple(line.split()) for line in Path(notes).read_text().splitlines() if " mark-" in line)
    twice = [mark for (pid, mark), n in begun.items() if n > 1 and psutil.pid_exists(int(pid))]
    assert not twice, "a live replica answered a question twice"
    marks = Counter(mark for _, mark in begun)
    assert len(marks) == CLIENTS * TURNS and max(marks.values()) <= 2
    homes = Counter(h for t in talks for h in t.homes)
    print(
        f"\nturns: {dict(homes)}; streams cut: {sum(t.cut for t in talks)}; begun twice: {marks.total() - len(marks)}"
    )
