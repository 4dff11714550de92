"Many clients at once, over a socket: none is lost, and none gets the answer of another."

import asyncio
import json

import httpx
import pytest

from helpers import tiny
from llmopt.server.run import running
from server.fakes import fake_app

CLIENTS, REQUESTS = 32, 10


def asked(mark):
    "A request with a mark."
    return dict(messages=[dict(role="user", content=mark)])


def schema(mark):
    "The form of an answer that carries a mark, and a word of the model's own."
    parts = dict(mark=dict(const=mark), word=dict(type="string", maxLength=6))
    return dict(type="object", properties=parts, required=[*parts], additionalProperties=False)


def asked_for_json(mark):
    "A request whose answer must carry its mark."
    form = dict(type="json_schema", json_schema=dict(name="marked", schema=schema(mark)))
    return dict(messages=[dict(role="user", content=f"Write {mark} and a word.")], response_format=form, max_tokens=60)


def content(reply):
    "The text of an answer, of a stream too."
    if not reply.headers["content-type"].startswith("text/event-stream"):
        return reply.json()["choices"][0]["message"]["content"]
    chunks = [json.loads(line[6:]) for line in reply.text.split("\n\n") if line.startswith("data: {")]
    return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks)


async def client(url, i, model, body):
    "The marks that client `i` sent and the answers that it got; every other request is a stream."
    async with httpx.AsyncClient(base_url=url, timeout=300) as http:
        for k in range(REQUESTS):
            mark = f"mark-{i}-{k}"
            reply = await http.post("/v1/chat/completions", json=body(mark) | dict(model=model, stream=bool(k % 2)))
            reply.raise_for_status()
            yield mark, content(reply)


async def all_clients(url, models, body):
    "What all clients found; they take turns with the models."

    async def one(i):
        return [found async for found in client(url, i, models[i % len(models)], body)]

    return [f for found in await asyncio.gather(*(one(i) for i in range(CLIENTS))) for f in found]


def test_32_clients_with_10_requests_each():
    app = fake_app(queue=CLIENTS)
    with running(app) as url:
        found = asyncio.run(all_clients(url, ["fake", "fake:words"], asked))
    assert len(found) == CLIENTS * REQUESTS and [mark for mark, text in found if text != f"You said: {mark}"] == []
    made = sum(len(app.state.service.find(m).engine.asked) for m in ("fake", "fake:words"))
    assert made == CLIENTS * REQUESTS and not app.state.service.lanes["fake"].busy


@pytest.mark.slow
def test_32_clients_with_10_requests_each_on_the_bundled_model():
    "A grammar of each request makes its answer carry its mark; and it is the answer that an engine gives alone."
    pytest.importorskip("llguidance", reason="needs the extra server: pip install 'llmopt[server]'")
    from llmopt.engine import EnhancedFusedLLMEngine
    from llmopt.server import Registry, Settings, create_app
    from llmopt.server.structured import Grammars

    app = create_app(Registry([tiny()], ["baseline", "kv"]), settings=Settings(queue=CLIENTS))
    with running(app) as url:
        found = asyncio.run(all_clients(url, ["llmopt-tiny", "llmopt-tiny:kv"], asked_for_json))
    assert len(found) == CLIENTS * REQUESTS and [m for m, text in found if json.loads(text)["mark"] != m] == []
    engine, grammars = EnhancedFusedLLMEngine(tiny()), Grammars(tiny())
    for mark, text in found[::9]:
        one = dict(max_new_tokens=60, constraint=grammars.of_schema(schema(mark)))
        assert engine.run(asked_for_json(mark)["messages"], **one).output_text == text, mark
    print(f"\n{len(found)} answers, {len({text for _, text in found})} different ones")


@pytest.mark.slow
def test_memory_is_flat_over_1000_requests():
    """On the bundled model, two recipes, every other request a stream: `-s` shows the figures.

    Caches of allocators fill in the first hundreds; after that nothing may grow with the number of requests. Prompts
    come again, because the tokenizer keeps each word that is new, up to 10,000 of them."""
    import psutil

    from llmopt.server import create_app

    grown = []
    with (
        running(create_app(["llmopt-tiny"], ["baseline", "kv"])) as url,
        httpx.Client(base_url=url, timeout=60) as http,
    ):
        for i in range(1000):
            body = asked(f"What is {i % 40}?") | dict(max_tokens=2, stream=bool(i % 4 > 1))
            body["model"] = "llmopt-tiny:kv" if i % 2 else "llmopt-tiny"
            http.post("/v1/chat/completions", json=body).raise_for_status()
            if i % 100 == 99:
                grown.append(psutil.Process().memory_info().rss / 2**20)
                print(f"{i + 1:>6} requests: {grown[-1]:.1f} MiB")
    assert grown[-1] - grown[4] < 1
