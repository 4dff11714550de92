"Who is let in, how much of it, and what happens to the model when a client goes away."

import asyncio
import json
import socket
import threading
import time

import httpx
import pytest

from llmopt.server.run import running
from server.fakes import client_of, fake_app, hello

CHAT = "/v1/chat/completions"


def replies(app, *requests, **headers):
    "Replies to (method, path, options)."

    async def main():
        async with client_of(app, **headers) as client:
            return [await client.request(method, path, **options) for method, path, options in requests]

    return asyncio.run(main())


def test_a_key_is_asked_for_where_there_is_one():
    "The page and the health check are open; all else is not."
    asked = ("GET", "/v1/models", {}), ("POST", CHAT, dict(json=hello())), ("GET", "/metrics", {}), ("GET", "/x", {})
    app = fake_app(api_key="sesame")
    assert {r.status_code for r in replies(app, *asked)} == {401}
    assert {r.status_code for r in replies(app, *asked, authorization="Bearer sesam")} == {401}
    assert [r.status_code for r in replies(app, *asked, authorization="Bearer sesame")] == [200, 200, 200, 404]
    assert replies(app, ("GET", "/health", {}))[0].json() == dict(status="ok")


def test_without_a_key_other_host_names_are_refused():
    "A web page whose name leads to 127.0.0.1 bears that name in Host."
    reply = replies(fake_app(), ("GET", "/v1/models", {}), host="evil.example")[0]
    assert reply.status_code == 403 and "Host" in reply.json()["error"]["message"]
    assert replies(fake_app(api_key="k"), ("GET", "/health", {}), host="evil.example")[0].status_code == 200


def test_bodies_have_a_type_and_a_size():
    app = fake_app(max_body=1000)
    form = dict(content="x", headers={"Content-Type": "text/plain"})
    long = dict(json=hello(messages=[dict(role="user", content="x" * 2000)]))
    lied = dict(content=json.dumps(long["json"]), headers={"Content-Type": "application/json", "Content-Length": "10"})
    odd = dict(content="{}", headers={"Content-Type": "application/json", "Content-Length": "many"})
    loud = dict(content=json.dumps(hello()), headers={"Content-Type": "Application/JSON; Charset=UTF-8"})
    *found, read = replies(app, *(("POST", CHAT, options) for options in (form, long, lied, odd, loud)))
    assert [r.status_code for r in found] == [415, 413, 413, 413] and read.status_code == 200
    assert all(r.json()["error"]["message"] and r.headers["x-request-id"] for r in found)


def test_other_sites_may_call_only_if_they_were_named():
    asks = ("OPTIONS", CHAT, dict(headers={"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}))
    assert "access-control-allow-origin" not in replies(fake_app(), asks)[0].headers
    allowed = replies(fake_app(cors=("https://a.example",)), asks)[0]
    assert allowed.headers["access-control-allow-origin"] == "https://a.example"


def until(true, seconds=5.0):
    "Wait until `true()`; fail after `seconds`."
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.002)


def connected(url):
    "A socket to a server."
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=5)


def read_all(sock):
    "What comes until the server closes the connection."
    return b"".join(iter(lambda: sock.recv(65536), b""))


HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


LONG = dict(role="user", content="w " * 400)


def engine_of(app):
    "The fake engine of an app."
    return app.state.service.find("fake").engine


@pytest.mark.parametrize("stream", [True, False])
def test_the_model_is_free_within_a_token_when_the_client_leaves(stream):
    app = fake_app(pause=0.01)
    with running(app) as url:
        body = json.dumps(hello(messages=[LONG], stream=stream))
        with connected(url) as sock:
            sock.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            until(lambda: engine_of(app).tokens > 2)
        left, lane = engine_of(app).tokens, app.state.service.lanes["fake"]
        until(lambda: not lane.busy, 1)
        assert engine_of(app).tokens <= left + 5  # closing the socket takes a moment, too
        assert httpx.post(url + CHAT, json=hello(max_tokens=1)).status_code == 200
        assert "llmopt:requests_aborted_total" in httpx.get(f"{url}/metrics").text


def test_half_a_request_costs_nobody_else_anything():
    "Half a head, half a body, and nothing at all; one client goes, and one waits."
    with running(fake_app(body_timeout=0.1)) as url:
        head = f"{HEAD}Content-Length: 100\r\n\r\n".encode()
        with connected(url) as half, connected(url) as body, connected(url) as gone, connected(url) as silent:
            half.sendall(head[:30])
            body.sendall(head + b'{"model": ')
            gone.sendall(head + b"{")
            gone.close()
            assert httpx.post(url + CHAT, json=hello()).status_code == 200
            for reply in (read_all(half), read_all(body)):
                assert reply.startswith(b"HTTP/1.1 408") and json.loads(reply.partition(b"\r\n\r\n")[2])["error"]
            assert read_all(silent) == b""


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000,
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        HEAD.encode() + b"Content-Length: -5\r\n\r\n",
        HEAD.encode() + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_no_http_is_a_400_in_the_envelope(sent):
    with running(fake_app()) as url, connected(url) as sock:
        sock.sendall(sent)
        reply = read_all(sock)
        assert reply.startswith(b"HTTP/1.1 400 Bad Request")
        assert json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


def test_requests_sent_ahead_are_answered_in_order():
    "A client may send its second request before the first is answered (pipelining)."
    with running(fake_app()) as url, connected(url) as sock:
        for mark, close in (("first", ""), ("second", "Connection: close\r\n")):
            body = json.dumps(hello(messages=[dict(role="user", content=mark)]))
            sock.sendall(f"{HEAD}{close}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        reply = read_all(sock)
        assert reply.count(b"HTTP/1.1 200") == 2 and 0 < reply.index(b"said: first") < reply.index(b"said: second")


def test_a_full_queue_is_429_with_retry_after():
    app = fake_app(pause=0.02, queue=2)

    async def main():
        async with client_of(app) as client:
            return await asyncio.gather(*(client.post(CHAT, json=hello()) for _ in range(6)))

    found = asyncio.run(main())
    assert sorted(r.status_code for r in found) == [200] * 3 + [429] * 3
    refused = next(r for r in found if r.status_code == 429)
    assert int(refused.headers["Retry-After"]) >= 1 and refused.json()["error"]["type"] == "rate_limit_error"
    waited = [r.json()["usage"]["llmopt"]["queue_ms"] for r in found if r.status_code == 200]
    assert waited[0] < 20 < waited[1] < waited[2]


def test_an_answer_that_takes_too_long_is_408_and_a_stream_says_so():
    app = fake_app(pause=0.02, timeout=0.1)
    whole, stream = replies(
        app,
        ("POST", CHAT, dict(json=hello(messages=[LONG]))),
        ("POST", CHAT, dict(json=hello(messages=[LONG], stream=True))),
    )
    assert whole.status_code == 408 and whole.json()["error"]["code"] == "timeout"
    lines = [line for line in stream.text.split("\n\n") if line]
    assert stream.status_code == 200 and lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "timeout"


def test_a_server_that_stops_finishes_or_refuses():
    "One answer runs, one waits, one comes too late: each gets an answer or an error, none nothing."
    app, found = fake_app(pause=0.01, drain=5), {}

    def ask(name, url, words):
        message = dict(role="user", content="word " * words)
        found[name] = httpx.post(url + CHAT, json=hello(messages=[message]), timeout=20)

    with running(app) as url:
        threads = [threading.Thread(target=ask, args=(n, url, w)) for n, w in (("runs", 30), ("waits", 2))]
        threads[0].start()
        until(lambda: engine_of(app).tokens > 1)
        threads[1].start()
        until(lambda: app.state.service.lanes["fake"].waiting)
    for t in threads:
        t.join()
    assert {name: r.status_code for name, r in found.items()} == dict(runs=200, waits=200)
    assert found["runs"].json()["usage"]["completion_tokens"] == 32


def test_what_is_not_ready_when_the_time_is_over_gets_an_error():
    app, found = fake_app(pause=0.01, drain=0.1), []

    def ask(url):
        found.append(httpx.post(url + CHAT, json=hello(messages=[LONG]), timeout=20))

    with running(app) as url:
        threads = [threading.Thread(target=ask, args=(url,)) for _ in range(2)]
        for t in threads:
            t.start()
        until(lambda: app.state.service.lanes["fake"].waiting)
    for t in threads:
        t.join()
    assert [r.status_code for r in found] == [503, 503] and {r.json()["error"]["code"] for r in found} == {"stopping"}


def test_a_stream_that_is_cut_by_the_end_of_the_server_says_so():
    app, found = fake_app(pause=0.01, drain=0.05), []
    with running(app) as url:
        body = hello(messages=[LONG], stream=True)
        thread = threading.Thread(target=lambda: found.append(httpx.post(url + CHAT, json=body, timeout=20)))
        thread.start()
        until(lambda: engine_of(app).tokens > 2)
    thread.join()
    *pieces, error, done = [line.removeprefix("data: ") for line in found[0].text.split("\n\n") if line]
    assert len(pieces) > 2 and json.loads(error)["error"]["code"] == "stopping" and done == "[DONE]"
