"Chat completions: what comes back, whole and in pieces, and what is refused."

import asyncio
import json

import pytest

from server.fakes import client_of, fake_app, hello


def ask(body, app=None, path="/v1/chat/completions", **kw):
    "The reply to a request."

    async def main():
        async with client_of(app or fake_app()) as client:
            kind = dict(content=body) if isinstance(body, (bytes, str)) else dict(json=body)
            return await client.post(path, **kind | kw)

    return asyncio.run(main())


def events(reply):
    "The objects of a stream; it must end with [DONE]."
    lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_an_answer_at_once():
    reply = ask(hello(model="fake:words", max_tokens=3)).json()
    choice = reply["choices"][0]
    assert choice["message"] == dict(role="assistant", content="You said: Hello", refusal=None)
    assert (choice["finish_reason"], reply["model"], reply["object"]) == ("length", "fake:words", "chat.completion")
    usage = reply["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (2, 3, 5)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 1
    assert usage["llmopt"]["recipe"] == "word_removal" and usage["llmopt"]["prompt_tokens_saved"] == 2


def test_a_stream_has_the_text_of_an_answer_at_once():
    "The first chunk has content, the last says why it ended, and no usage comes unasked."
    chunks = events(ask(hello(stream=True)))
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert deltas[0] == dict(role="assistant", content="You") and deltas[-1] == {}
    assert "".join(d.get("content", "") for d in deltas) == "You said: Hello there"
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * 4 + ["stop"]
    assert len({c["id"] for c in chunks}) == 1 and "usage" not in chunks[0]


def test_usage_of_a_stream_comes_last_and_without_choices():
    chunks = events(ask(hello(stream=True, stream_options=dict(include_usage=True))))
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 4
    assert {c["usage"] for c in chunks[:-1]} == {None}


def test_several_choices_have_seeds_of_their_own():
    app = fake_app()
    reply = ask(hello(n=3, seed=5, temperature=0.5), app).json()
    assert [c["index"] for c in reply["choices"]] == [0, 1, 2]
    asked = app.state.service.find("fake").engine.asked
    assert [options["seed"] for _, options in asked] == [5, 6, 7]
    assert reply["usage"]["completion_tokens"] == 12 and len(reply["usage"]["llmopt"]["choices"]) == 3
    chunks = events(ask(hello(n=2, stream=True), app))
    assert {c["choices"][0]["index"] for c in chunks} == {0, 1}


def test_logprobs_stand_beside_their_tokens():
    reply = ask(hello(logprobs=True, top_logprobs=2)).json()
    content = reply["choices"][0]["logprobs"]["content"]
    assert [c["token"] for c in content] == ["You", "said:", "Hello", "there"] and len(content[0]["top_logprobs"]) == 2
    chunk = events(ask(hello(logprobs=True, stream=True)))[0]
    assert chunk["choices"][0]["logprobs"]["content"][0]["bytes"] == [*b"You"]


def test_options_reach_the_engine_and_others_do_not():
    app = fake_app()
    options = dict(temperature=0.5, top_p=0.9, top_k=3, repetition_penalty=1.1, stop=["there"], logit_bias={"1": 2.0})
    reply = ask(hello(**options, max_completion_tokens=9, user="me", frequency_penalty=0), app).json()
    assert reply["choices"][0]["message"]["content"] == "You said: Hello"
    expected = dict(temperature=0.5, top_p=0.9, top_k=3, repetition_penalty=1.1, stop_strings=["there"])
    assert app.state.service.find("fake").engine.asked[0][1] == expected | dict(logit_bias={1: 2.0}, max_new_tokens=9)


def test_parts_of_text_and_old_turns_are_read():
    app = fake_app()
    messages = [
        dict(role="developer", content="Be brief."),
        dict(role="user", content=[dict(type="text", text="One"), dict(type="text", text="two")]),
        dict(role="assistant", content="Yes.", refusal=None, annotations=[]),
        dict(role="user", content="Go on", name="me"),
    ]
    assert ask(hello(messages=messages), app).status_code == 200
    assert app.state.service.find("fake").engine.asked[0][0] == [
        dict(role="system", content="Be brief."),
        dict(role="user", content="Onetwo"),
        dict(role="assistant", content="Yes."),
        dict(role="user", content="Go on"),
    ]


SAID = dict(role="assistant", content="x")
ASKED = dict(role="user", content="x")
SYSTEM = dict(role="system", content="x")
WRONG = {  # what is wrong -> (body, what the message names)
    "no JSON": (b"{", "JSON"),
    "nothing": (b"", "missing"),
    "no UTF-8": (b'{"model": "\xff\xfe"}', "UTF-8"),
    "a list": ([], "dictionary"),
    "half a character": (b'{"model": "fake", "messages": [{"role": "user", "content": "\\ud800"}]}', "lone surrogate"),
    "deep": (b'{"model":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "JSON"),
    "no number": (
        b'{"model": "fake", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        "NaN",
    ),
    "a name twice": (b'{"model": "x", "messages": [], "model": "fake"}', "'model' stands there twice"),
    "NaN inside": (b'{"model": "fake", "messages": [], "metadata": {"a": NaN}}', "NaN"),
    "two limits": (hello(max_tokens=1, max_completion_tokens=2), "give one of the two"),
    "bias of letters": (hello(logit_bias={"1_0": 1}), "token ids"),
    "no model": (dict(messages=[ASKED]), "model"),
    "no messages": (hello(messages=[]), "messages"),
    "unknown field": (hello(max_token=5), "max_tokens"),
    "text as number": (hello(max_tokens="5"), "max_tokens"),
    "true as number": (hello(n=True), "n:"),
    "negative": (hello(max_tokens=-1), "max_tokens"),
    "absurd": (hello(max_tokens=10**9), "at most"),
    "huge number": (hello(max_tokens=10**400), "max_tokens"),
    "many choices": (hello(n=1000), "at most"),
    "hot": (hello(temperature=3), "temperature"),
    "top_p": (hello(top_p=0), "top_p"),
    "penalty": (hello(presence_penalty=1.0), "repetition_penalty"),
    "empty stop": (hello(stop=""), "stop"),
    "bias": (hello(logit_bias={"the": 1}), "token ids"),
    "engine's error": (hello(logit_bias={"999": 1}), "no token 999"),
    "picture": (hello(messages=[dict(role="user", content=[dict(type="image_url", image_url=dict(url="x"))])]), "text"),
    "sound": (hello(messages=[dict(role="user", content=[dict(type="input_audio")])]), "text"),
    "no text": (hello(messages=[dict(role="user", content=5)]), "content"),
    "empty text": (hello(messages=[dict(role="user", content="  ")]), "empty"),
    "unknown role": (hello(messages=[dict(role="wizard", content="x")]), "role"),
    "no role": (hello(messages=[dict(content="x")]), "role"),
    "system in the middle": (hello(messages=[ASKED, SYSTEM, ASKED]), "put it first"),
    "system alone": (hello(messages=[SYSTEM]), "must be the user's"),
    "assistant first": (hello(messages=[SAID, ASKED]), "must follow"),
    "assistant twice": (hello(messages=[ASKED, SAID, SAID, ASKED]), "must follow"),
    "assistant last": (hello(messages=[ASKED, SAID]), "must be the user's"),
    "tool first": (hello(messages=[dict(role="tool", content="x"), ASKED]), "call"),
    "too long": (hello(messages=[dict(role="user", content="x" * 2000)]), "shorten"),
    "much too long": (hello(messages=[dict(role="user", content="x" * 300_000)]), "shorten"),
    "top_logprobs alone": (hello(top_logprobs=2), "logprobs"),
    "tools missing": (hello(tool_choice="auto"), "tools"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_a_400_that_says_what_to_change(name):
    "For streams as well: the status is sent when it is known."
    body, says = WRONG[name]
    for stream in (False, True):
        body = body | dict(stream=stream) if isinstance(body, dict) else body
        reply = ask(body, headers={"Content-Type": "application/json"})
        assert reply.status_code == 400, reply.text
        error = reply.json()["error"]
        assert says in error["message"] and len(error["message"]) < 500 and error["type"] == "invalid_request_error"


@pytest.mark.parametrize("model", ["gpt-4", "fake:kv", "fake:", "fake:words:n=2", "other:words", "", "x" * 5000])
def test_unknown_models_are_404_with_what_there_is(model):
    error = ask(hello(model=model)).json()["error"]
    assert error["code"] == "model_not_found" and "fake:words" in error["message"] and len(error["message"]) < 300


def test_a_bug_is_a_500_without_its_secrets():
    reply = ask(hello(messages=[dict(role="user", content="fail")]))
    assert reply.status_code == 500 and "a bug" not in reply.text and reply.json()["error"]["type"] == "server_error"


def test_other_urls_and_methods_have_the_same_envelope():
    assert ask(hello(), path="/v1/nothing").status_code == 404
    assert ask({}, path="/v1/models").json()["error"]["type"] == "invalid_request_error"
    assert "embeddings" in ask(dict(model="fake", input="x"), path="/v1/embeddings").json()["error"]["message"]
