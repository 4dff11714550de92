"Many clients at once, over a socket: none is lost, and none gets the answer of another."

import asyncio

import httpx
import pytest

from llmopt.server.run import running
from server.fakes import fake_app

CLIENTS, REQUESTS = 32, 10


async def client(url, i, model):
    "The marks that client `i` sent and the answers that it got; every other request is a stream."
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        for k in range(REQUESTS):
            mark = f"mark-{i}-{k}"
            body = dict(model=model, messages=[dict(role="user", content=mark)], stream=bool(k % 2))
            reply = await http.post("/v1/chat/completions", json=body)
            yield mark, reply.status_code, reply.text


async def all_clients(url):
    "What all clients found."

    async def one(i):
        return [found async for found in client(url, i, "fake:words" if i % 2 else "fake")]

    return [f for found in await asyncio.gather(*(one(i) for i in range(CLIENTS))) for f in found]


def test_32_clients_with_10_requests_each():
    app = fake_app(queue=CLIENTS)
    with running(app) as url:
        found = asyncio.run(all_clients(url))
    assert len(found) == CLIENTS * REQUESTS and {status for _, status, _ in found} == {200}
    mixed = [mark for mark, _, text in found if f'{mark}"' not in text or text.count("mark-") != 1]
    assert mixed == []
    asked = sum(len(app.state.service.find(m).engine.asked) for m in ("fake", "fake:words"))
    assert asked == CLIENTS * REQUESTS and not app.state.service.lanes["fake"].busy


@pytest.mark.slow
def test_memory_is_flat_over_1000_requests():
    """On the bundled model, two recipes, every other request a stream: `-s` shows the figures.

    Caches of allocators fill in the first hundreds; after that nothing may grow with the number of requests."""
    import psutil

    from llmopt.server import create_app

    grown = []
    with (
        running(create_app(["llmopt-tiny"], ["baseline", "kv"])) as url,
        httpx.Client(base_url=url, timeout=60) as http,
    ):
        for i in range(1000):
            asked, model = [dict(role="user", content=f"What is {i}?")], "llmopt-tiny:kv" if i % 2 else "llmopt-tiny"
            body = dict(model=model, messages=asked, max_tokens=2, stream=bool(i % 4 > 1))
            http.post("/v1/chat/completions", json=body).raise_for_status()
            if i % 100 == 99:
                grown.append(psutil.Process().memory_info().rss / 2**20)
                print(f"{i + 1:>6} requests: {grown[-1]:.1f} MiB")
    assert grown[-1] - grown[2] < 8
