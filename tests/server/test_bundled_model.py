"The whole way, over a socket and with OpenAI's client, on the bundled model."

import asyncio
import json
import time

import httpx
import pytest
from pydantic import BaseModel

from helpers import tiny
from llmopt.core import LM
from llmopt.engine import EnhancedFusedLLMEngine
from llmopt.server import Registry, create_app, running
from server.fakes import client_of

openai = pytest.importorskip("openai", reason='needs the development tools: pip install -e ".[dev]"')
pytest.importorskip("llguidance", reason="needs the extra server: pip install 'llmopt[server]'")
ASKED = [dict(role="user", content="What is a volcano?")]
TOOLS_TEMPLATE = (
    "{% if tools %}<|user|>\nWrite <tool_call> for: {{ tools | tojson }}<|end|>\n{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}<|assistant|>\n"
)
WEATHER = dict(
    name="weather",
    parameters=dict(
        type="object",
        properties=dict(city=dict(type="string", maxLength=8), unit=dict(enum=["C", "F"])),
        required=["city", "unit"],
        additionalProperties=False,
    ),
)


@pytest.fixture(scope="module")
def url():
    with running(create_app(Registry([tiny()], ["baseline", "words", "kv"]))) as url:
        yield url + "/v1"


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def chat(client, **options):
    "A chat completion."
    return client.chat.completions.create(**dict(model="llmopt-tiny", messages=ASKED, max_tokens=12) | options)


def test_answers_are_those_of_the_engine(client):
    "At once and as a stream, greedy and with a seed."
    engine = EnhancedFusedLLMEngine(tiny())
    for options in ({}, dict(temperature=1.0, seed=3)):
        wanted = engine.run(ASKED, max_new_tokens=12, **options).output_text
        streamed = chat(client, stream=True, **options)
        assert chat(client, **options).choices[0].message.content.strip() == wanted
        assert "".join(c.choices[0].delta.content or "" for c in streamed).strip() == wanted


def test_usage_says_what_a_recipe_did(client):
    text = "The ice of a glacier is very slowly flowing down from the mountains into the wide and green valley. " * 4
    asked = [dict(role="user", content=f"Summarize the following text: {text}")]
    plain, short = (chat(client, model=m, messages=asked) for m in ("llmopt-tiny", "llmopt-tiny:words"))
    assert short.usage.prompt_tokens + short.usage.llmopt["prompt_tokens_saved"] == plain.usage.prompt_tokens
    assert short.usage.llmopt["kv_bytes_live"] < plain.usage.llmopt["kv_bytes_live"]


def test_logprobs_and_stop_strings(client):
    answer = chat(client, logprobs=True, top_logprobs=2, max_tokens=4).choices[0]
    assert "".join(t.token for t in answer.logprobs.content) == answer.message.content
    assert all(t.logprob <= 0 and t.top_logprobs[0].token == t.token for t in answer.logprobs.content)
    text = chat(client).choices[0].message.content
    cut = chat(client, stop=text[5:8]).choices[0]
    assert (cut.message.content, cut.finish_reason) == (text[:5], "stop")


class City(BaseModel):
    "What a client asks for."

    name: str
    large: bool


def test_structured_output(client):
    "A schema, by the client's own helper; a JSON object; and a schema for a stream."
    parsed = client.chat.completions.parse(model="llmopt-tiny", messages=ASKED, response_format=City, max_tokens=200)
    if parsed.choices[0].finish_reason == "stop":
        assert isinstance(parsed.choices[0].message.parsed, City)
    small = dict(type="object", properties=dict(a=dict(enum=["x", "y"])), required=["a"], additionalProperties=False)
    form = dict(type="json_schema", json_schema=dict(name="small", schema=small))
    for model in ("llmopt-tiny", "llmopt-tiny:kv"):
        streamed = chat(client, model=model, response_format=form, stream=True, temperature=1.0, seed=1)
        assert json.loads("".join(c.choices[0].delta.content or "" for c in streamed))["a"] in "xy"
    text = chat(client, response_format=dict(type="json_object")).choices[0].message.content
    assert text.startswith("{")


def test_wrong_schemas_are_400(client):
    for schema in (dict(type="wizard"), {"$ref": "http://example.org/x"}, dict(type="string", pattern="(")):
        with pytest.raises(openai.BadRequestError, match="cannot be enforced"):
            chat(client, response_format=dict(type="json_schema", json_schema=dict(name="x", schema=schema)))


def test_text_completions_and_responses(client):
    whole = client.completions.create(model="llmopt-tiny", prompt="The sea is", max_tokens=6)
    pieces = client.completions.create(model="llmopt-tiny", prompt="The sea is", max_tokens=6, stream=True)
    assert "".join(p.choices[0].text for p in pieces) == whole.choices[0].text and whole.usage.completion_tokens == 6
    answer = client.responses.create(model="llmopt-tiny:kv", input="What is rain?", max_output_tokens=200)
    with client.responses.stream(model="llmopt-tiny:kv", input="What is rain?", max_output_tokens=200) as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        assert stream.get_final_response().output_text == text == answer.output_text


def test_a_prompt_beyond_the_context_is_a_400(client):
    for options in (dict(messages=[dict(role="user", content="why " * 2000)]), dict(max_tokens=1024)):
        with pytest.raises(openai.BadRequestError, match="context of 1,024") as e:
            chat(client, **options)
        assert e.value.code == "context_length_exceeded"


def tools_app():
    "The bundled model with a template that has tools."
    import copy

    tokenizer = copy.deepcopy(tiny().tokenizer)
    tokenizer.chat_template = TOOLS_TEMPLATE
    return create_app(Registry([LM(tiny().model, tokenizer, "tools")], ["baseline"]))


def test_tools():
    "A call that is demanded is made, at once and as a stream, its name once; its result can be sent back."
    tools = [dict(type="function", function=WEATHER)]
    body = dict(model="tools", messages=ASKED, tools=tools, tool_choice="required", max_tokens=60)

    async def replies():
        async with client_of(tools_app()) as client:
            whole = (await client.post("/v1/chat/completions", json=body)).json()
            stream = await client.post("/v1/chat/completions", json=body | dict(stream=True))
            call = whole["choices"][0]["message"]
            after = [*ASKED, call, dict(role="tool", tool_call_id=call["tool_calls"][0]["id"], content="20")]
            named = dict(tool_choice=dict(type="function", function=dict(name="other")))
            more = [body | dict(messages=after, tool_choice="none"), body | named]
            return whole, stream.text, *[await client.post("/v1/chat/completions", json=b) for b in more]

    whole, stream, after, wrong = asyncio.run(replies())
    (call,) = whole["choices"][0]["message"]["tool_calls"]
    assert whole["choices"][0]["finish_reason"] == "tool_calls" and call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"])["unit"] in "CF"
    assert stream.count('"name":"weather"') == 1 and '"finish_reason":"tool_calls"' in stream
    assert after.status_code == 200 and wrong.status_code == 400


def test_a_turn_reads_only_what_is_new(client):
    "What a conversation has read is kept, for each recipe by itself, and counted as OpenAI does."
    said = chat(client, model="llmopt-tiny:kv").choices[0].message.content
    turn = [*ASKED, dict(role="assistant", content=said), dict(role="user", content="Why?")]
    usage = chat(client, model="llmopt-tiny:kv", messages=turn).usage
    assert usage.prompt_tokens_details.cached_tokens == usage.llmopt["cached_prompt_tokens"] >= 14
    assert usage.prompt_tokens > usage.prompt_tokens_details.cached_tokens


def test_an_answer_without_text_ends_when_its_client_goes():
    """The padding token again and again: no piece is ever sent, and a server that looks only between pieces does not
    stop."""
    app = create_app(Registry([tiny()], ["baseline"]))
    with running(app) as url:
        body = dict(model="llmopt-tiny", messages=ASKED, max_tokens=900, logit_bias={"5": 100})
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/chat/completions", json=body, timeout=0.2)
        end = time.monotonic() + 1
        while app.state.service.lanes["llmopt-tiny"].busy:
            assert time.monotonic() < end
            time.sleep(0.002)
