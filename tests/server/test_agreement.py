"What a stream, the counters and the offsets of tokens say agrees with the reply at once."

import asyncio
from types import SimpleNamespace

import pytest

from llmopt.core import load
from llmopt.engine.answer import PieceMaker
from llmopt.engine.sampling import TokenLogprob
from llmopt.engine.streaming import AnswerText
from llmopt.server.chat import ChatJob
from llmopt.server.jobs import Finished
from llmopt.server.replies import text_logprobs
from server.fakes import client_of, fake_app, hello

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


def job_of(pieces):
    "A job with the tool `f` whose answer comes in `pieces`."
    job = ChatJob.__new__(ChatJob)  # the request does not matter here
    job.tools, finished = ["f"], Finished(SimpleNamespace(finish_reason="stop"), 0.0)

    async def answer(i):
        for item in [*pieces, finished]:
            yield item

    job.answer = answer
    return job, job.choice(0, pieces, finished)


async def deltas(job):
    "The deltas of a stream, and how it ended."
    found = [c async for c in job.choices(0, [])]
    return [c["delta"] for c in found], found[-1]["finish_reason"]


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("text", [
    f"if a < b then {CALL}", f"ok <b>bold</b>\n{CALL}", f"hi {CALL} bye", f"{{not a call}} {CALL}", f"  {CALL}",
    f'{CALL}\n{{"x": 1}}', f"  Well. {CALL} {CALL}", "plain < text ", CALL.replace('"f"', '"g"') + " tail",
    '{"name": "f", "arguments": {}}', " a <tool_call> b",
])  # fmt: skip
def test_a_stream_with_tools_has_the_text_and_the_calls_of_the_reply(text, size):
    "Whatever stands before, between and behind calls, and however the pieces are cut."
    pieces = [SimpleNamespace(text=text[i : i + size], ids=[1], logprobs=None) for i in range(0, len(text), size)]
    job, whole = job_of(pieces)
    parts, reason = asyncio.run(deltas(job))
    names = [c["function"]["name"] for d in parts for c in d.get("tool_calls", ()) if "name" in c["function"]]
    assert "".join(d.get("content") or "" for d in parts) == (whole["message"]["content"] or "")
    assert names == [c["function"]["name"] for c in whole["message"].get("tool_calls", ())]
    assert reason == whole["finish_reason"]


def test_offsets_count_characters_made_of_several_tokens():
    "A token begins in the text where its offset says, in a stream as well."
    served = SimpleNamespace(lm=load("llmopt-tiny", "cpu"))
    said = "a 🙂 你好 end of it"
    text, pieces, meter = AnswerText(served.lm.tokenizer), [], SimpleNamespace(logprobs=[])
    maker = PieceMaker(text, pieces.append)
    for id in served.lm.tokenizer(said, add_special_tokens=False)["input_ids"]:
        meter.logprobs.append(TokenLogprob(id, -1.0, []))
        text.add([id])
        maker.token([id], meter)
    whole, streamed, at = text_logprobs(served, pieces), [], 0
    for piece in pieces:
        streamed += text_logprobs(served, [piece], at)["text_offset"]
        at += len(piece.text)
    found = dict(zip(whole["tokens"], whole["text_offset"]))
    assert whole["text_offset"] == streamed and at == len(said)
    assert {w: found[w] for w in (" end", " of", " it")} == {" end": 6, " of": 10, " it": 13}
    emoji = whole["text_offset"][whole["tokens"].index("\ufffd") :]
    assert emoji[0] == emoji[1] == 2


async def counted(path, body):
    "Tokens of prompts by `usage`, by the metrics of a new server, and answers that came to an end."
    async with client_of(fake_app()) as client:
        usage = (await client.post(path, json=body)).json()["usage"]
        lines = dict(line.rsplit(" ", 1) for line in (await client.get("/metrics")).text.splitlines())
    read = lines['vllm:prompt_tokens_total{model_name="fake"}']
    ended = lines['vllm:request_success_total{finished_reason="stop",model_name="fake"}']
    return usage["prompt_tokens"], float(read), float(ended)


def test_a_prompt_is_counted_once_however_many_answers_it_has():
    "Chats with one prompt, and texts with several."
    assert asyncio.run(counted("/v1/chat/completions", hello(n=3))) == (2, 2, 3)
    texts = dict(model="fake", prompt=["one two", "three"], n=2)
    assert asyncio.run(counted("/v1/completions", texts)) == (3, 3, 4)


def test_a_prompt_of_emoji_gets_what_room_there_is():
    "Each takes up to four tokens, so without max_tokens the server counts before it promises the default."
    app = fake_app()

    async def main():
        async with client_of(app) as client:
            for text in ("🙂" * 170, "Hello"):
                await client.post("/v1/chat/completions", json=hello(messages=[dict(role="user", content=text)]))

    asyncio.run(main())
    emoji, short = (options for _, options in app.state.service.find("fake").engine.asked)
    assert "max_new_tokens" in emoji and "max_new_tokens" not in short
