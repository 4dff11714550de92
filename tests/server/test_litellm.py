"""A second client: litellm, which many programs use to speak to any server. Skipped where it is not installed: it is as
large as the rest of the tools together (`pip install litellm`)."""

import asyncio
import os

import pytest

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network for prices when imported
litellm = pytest.importorskip("litellm", reason="a second client, not installed: pip install litellm")

from llmopt.server.run import running  # noqa: E402
from server.fakes import fake_app  # noqa: E402

HELLO = dict(model="openai/fake:words", messages=[dict(role="user", content="Hello there")], api_key="none", timeout=30)


@pytest.fixture(scope="module")
def hello():
    "A request to a server that runs."
    with running(fake_app()) as url:
        yield HELLO | dict(api_base=f"{url}/v1", max_retries=0)


def test_answer(hello):
    answer = litellm.completion(**hello, max_tokens=3, seed=1, temperature=0.5, stop=["x"], logprobs=True)
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason) == ("You said: Hello", "length")
    assert choice.logprobs.content[0].token == "You"
    assert answer.usage.prompt_tokens_details.cached_tokens == 1 and answer.usage.llmopt["prompt_tokens_saved"] == 2


def test_stream(hello):
    chunks = [*litellm.completion(**hello, stream=True, stream_options=dict(include_usage=True))]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "You said: Hello there"
    assert litellm.stream_chunk_builder(chunks).usage.completion_tokens == 4


def test_async_text_and_responses(hello):
    given = {k: v for k, v in hello.items() if k not in ("messages", "model")}

    async def three():
        chat = await litellm.acompletion(**hello, n=2)
        text = await litellm.atext_completion(**given, model="text-completion-openai/fake", prompt="one two")
        return chat, text, await litellm.aresponses(**given, model="openai/fake", input="one two", max_output_tokens=9)

    chat, text, response = asyncio.run(three())
    assert [c.message.content for c in chat.choices] == ["You said: Hello there"] * 2
    assert text.choices[0].text == "You said: one two"
    assert response.output[0].content[0].text == "You said: one two" and response.usage.output_tokens == 4


@pytest.mark.parametrize(
    "change, error",
    [
        (dict(model="openai/gpt-4"), "NotFoundError"),
        (dict(max_tokens=-1), "BadRequestError"),
        (dict(messages=[dict(role="user", content="x" * 2000)]), "ContextWindowExceededError"),
        (dict(messages=[dict(role="user", content="fail")]), "InternalServerError"),
    ],
)
def test_errors_have_the_client_s_own_types(hello, change, error):
    with pytest.raises(getattr(litellm, error)):
        litellm.completion(**hello | change)
