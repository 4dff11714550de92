"Text completions, responses, metrics, the page: with fake models, in this process."

import asyncio
import json

import pytest

from server.fakes import client_of, fake_app, hello


def ask(method, path, body=None, app=None, **kw):
    "The reply to a request."

    async def main():
        async with client_of(app or fake_app()) as client:
            return await client.request(method, path, **(dict(json=body) if body is not None else {}) | kw)

    return asyncio.run(main())


def objects(reply):
    "The JSON objects of a stream."
    lines = [line.rpartition("data: ")[2] for line in reply.text.split("\n\n") if line]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def text(**change):
    "A request for a completion."
    return dict(model="fake", prompt="one two") | change


def test_completions_of_several_prompts():
    reply = ask("POST", "/v1/completions", text(prompt=["one two", "three"], n=2, logprobs=1)).json()
    assert [c["text"] for c in reply["choices"]] == ["You said: one two"] * 2 + ["You said: three"] * 2
    assert [c["index"] for c in reply["choices"]] == [0, 1, 2, 3] and reply["object"] == "text_completion"
    assert reply["usage"]["prompt_tokens"] == 3 and reply["usage"]["completion_tokens"] == 14
    logprobs = reply["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["You", "said:", "one", "two"] and logprobs["top_logprobs"][0] == {"You": -0.1}


def test_a_completion_as_a_stream():
    chunks = objects(ask("POST", "/v1/completions", text(stream=True, stream_options=dict(include_usage=True))))
    assert "".join(c["choices"][0]["text"] for c in chunks[:-1]) == "You said: one two"
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop" and chunks[-1]["usage"]["prompt_tokens"] == 2


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(prompt=""), "prompt"),
        (dict(prompt=[]), "prompt"),
        (dict(prompt=[1, "two"]), "prompt"),
        (dict(prompt=[-1]), "prompt"),
        (dict(prompt=[10_000]), "no token"),
        (dict(prompt=["x"] * 9), "at most"),
        (dict(logprobs=6), "logprobs"),
        (dict(echo=True), "echo: this is not implemented"),
        (dict(best_of=3), "best_of"),
        (dict(suffix="end"), "suffix"),
        (dict(messages=[]), "messages"),
    ],
)
def test_wrong_completions_are_400(change, says):
    reply = ask("POST", "/v1/completions", text(**change))
    assert reply.status_code == 400 and says in reply.json()["error"]["message"]


def response(**change):
    "A request for a response."
    return dict(model="fake", input="one two") | change


def test_a_response_at_once():
    asked = [dict(role="user", content=[dict(type="input_text", text="Hello")])]
    reply = ask("POST", "/v1/responses", response(input=asked, instructions="Be kind.", max_output_tokens=2)).json()
    assert (reply["status"], reply["incomplete_details"]) == ("incomplete", dict(reason="max_output_tokens"))
    assert reply["output"][0]["content"][0]["text"] == "You said:" and reply["usage"]["input_tokens"] == 3
    assert reply["usage"]["llmopt"]["recipe"] == "baseline"


def test_a_response_as_numbered_events():
    events = objects(ask("POST", "/v1/responses", response(stream=True)))
    names = [e["type"] for e in events]
    assert names[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert names[-1] == "response.completed" and [e["sequence_number"] for e in events] == [*range(len(events))]
    deltas = "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta")
    assert deltas == "You said: one two" == events[-1]["response"]["output"][0]["content"][0]["text"]


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(input=""), "input"),
        (dict(input=[]), "input"),
        (dict(previous_response_id="resp_1"), "send the conversation"),
        (dict(tools=[dict(type="web_search")]), "/v1/chat/completions"),
        (dict(input=[dict(role="assistant", content="x")]), "must follow"),
        (dict(input=[dict(type="function_call_output", call_id="1", output="x")]), "input"),
        (dict(text=dict(format=dict(type="json_schema"))), "schema"),
        (dict(background=True), "background"),
        (dict(previous_response_id=""), "send the conversation"),
        (dict(n=2), "n:"),
        (dict(max_tokens=2), "max_output_tokens"),
        (dict(include=["message.output_text.logprobs"]), "include"),
        (dict(max_output_tokens=10**8), "at most"),
        (dict(input="x" * 2000), "shorten"),
    ],
)
def test_wrong_responses_are_400(change, says):
    for stream in (False, True):
        reply = ask("POST", "/v1/responses", response(**change, stream=stream))
        assert reply.status_code == 400 and says in reply.json()["error"]["message"], reply.text


@pytest.mark.parametrize(
    "path, says",
    [
        ("/v1/responses/resp_1", "not stored here"),
        ("/v1/responses/resp_1/input_items", "not stored here"),
        ("/v1/files", "/openapi.json lists"),
        ("/chat/completions", "begins with /v1"),
    ],
)
def test_a_url_that_there_is_not(path, says):
    "Each is told what fits it."
    reply = ask("GET", path)
    assert reply.status_code == 404 and says in reply.json()["error"]["message"]


def test_metrics_count_what_was_answered():
    app = fake_app()
    ask("POST", "/v1/chat/completions", hello(), app)
    ask("POST", "/v1/chat/completions", hello(messages=[dict(role="user", content="fail")]), app)
    text = ask("GET", "/metrics", app=app).text
    for line in (
        'vllm:generation_tokens_total{model_name="fake"} 4.0',
        'vllm:request_success_total{finished_reason="stop",model_name="fake"} 1.0',
        'llmopt:requests_aborted_total{model_name="fake"} 1.0',
        'vllm:num_requests_waiting{model_name="fake"} 0.0',
        'vllm:prefix_cache_hits_total{model_name="fake"} 1.0',
    ):
        assert line in text, line


def test_the_page_names_no_other_site():
    app = fake_app(api_key="sesame")
    for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
        reply = ask("GET", path, app=app)
        assert reply.status_code == 200 and reply.headers["content-type"].startswith(kind)
        assert "default-src 'self'" in reply.headers["content-security-policy"] and "http" not in reply.text


def test_tools_are_refused_where_the_template_has_none():
    tool = dict(type="function", function=dict(name="weather", parameters=dict(type="object")))
    reply = ask("POST", "/v1/chat/completions", hello(tools=[tool]))
    assert reply.status_code == 400 and reply.json()["error"]["code"] == "tools_unsupported"
