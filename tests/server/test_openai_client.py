"OpenAI's own client, over a socket: what it sends we read, what we send it reads."

import asyncio

import pytest

from llmopt.server.run import running
from server.fakes import fake_app

openai = pytest.importorskip("openai", reason='needs the development tools: pip install -e ".[dev]"')
HELLO = dict(model="fake:words", messages=[dict(role="user", content="Hello there")])


@pytest.fixture(scope="module")
def url():
    with running(fake_app()) as url:
        yield url + "/v1"


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def test_models(client):
    assert [m.id for m in client.models.list()] == ["fake", "fake:words"]
    assert client.models.retrieve("fake:words").max_model_len == 1000


def test_answer(client):
    answer = client.chat.completions.create(**HELLO, max_tokens=3, seed=1, stop=["x"], logprobs=True, top_logprobs=1)
    assert answer.choices[0].message.content == "You said: Hello" and answer.choices[0].finish_reason == "length"
    assert answer.usage.llmopt["prompt_tokens_saved"] == 2 and answer.usage.prompt_tokens_details.cached_tokens == 1
    assert answer.choices[0].logprobs.content[0].token == "You"


def test_stream(client):
    chunks = [*client.chat.completions.create(**HELLO, stream=True, stream_options=dict(include_usage=True))]
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == "You said: Hello there"
    assert chunks[0].choices[0].delta.content and chunks[-1].usage.completion_tokens == 4


def test_stream_helper(client):
    "The client's own accumulation of a stream finds the whole message."
    with client.chat.completions.stream(**HELLO) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "You said: Hello there"


def test_async_clients_at_once(url):
    async def one(client, i):
        stream = await client.chat.completions.create(
            model="fake", messages=[dict(role="user", content=f"mark-{i}")], stream=True
        )
        return "".join([c.choices[0].delta.content or "" async for c in stream])

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:
            return await asyncio.gather(*(one(client, i) for i in range(8)))

    assert asyncio.run(all_of_them()) == [f"You said: mark-{i}" for i in range(8)]


def test_errors_have_the_client_s_own_types(client):
    with pytest.raises(openai.NotFoundError, match="not served"):
        client.chat.completions.create(model="gpt-4", messages=HELLO["messages"])
    with pytest.raises(openai.BadRequestError, match="max_tokens") as wrong:
        client.chat.completions.create(**HELLO, max_tokens=-1)
    assert wrong.value.param == "max_tokens" and wrong.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="embeddings"):
        client.embeddings.create(model="fake", input="x")


def test_a_second_client(url, monkeypatch):
    "Hugging Face's own: at once and as a stream."
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)  # it asks our server, and no other
    client = hub.InferenceClient(base_url=url, api_key="none")
    asked = dict(model="fake", messages=HELLO["messages"], max_tokens=3)
    assert client.chat_completion(**asked).choices[0].message.content == "You said: Hello"
    chunks = client.chat_completion(**asked, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "You said: Hello"
