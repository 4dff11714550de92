"What is decided before the model works elsewhere: a shortened prompt at any endpoint, a model folder in any process."

import asyncio
import json
import subprocess
import sys

from helpers import tiny
from llmopt.adaptivocab import expand, save_model
from llmopt.core import assistant, user
from llmopt.engine import EnhancedFusedLLMEngine
from llmopt.server import Registry, create_app
from server.fakes import client_of

DOCS = ["The risk of high blood pressure is high.", "A heart attack is a disease of the heart."] * 3
TEXT = "Summarize this in one sentence.\n\n" + (
    "A glacier is a large body of ice that forms where more snow falls in winter than melts in summer. Over many years "
    "the snow is pressed into ice by its own weight. When the ice is thick enough, it flows slowly downhill. "
)


async def ask(app, conversations, n):
    "The replies of a server to several conversations."
    bodies = [dict(model="llmopt-tiny", messages=messages, max_tokens=n) for messages in conversations]
    async with client_of(app) as client:
        return [(await client.post("/v1/chat/completions", json=body)).json() for body in bodies]


def test_a_shortened_prompt_is_answered_elsewhere_as_here():
    "In a first turn and in a later one, the plain model reads and writes what the recipe does."
    engine, app = EnhancedFusedLLMEngine(tiny(), recipe="words:rate=0.5"), create_app(Registry([tiny()], ["baseline"]))
    said = [[user(TEXT)], [user(TEXT), assistant("Glaciers are ice."), user("Explain it.\n\n" + TEXT * 2)]]
    short = [engine.shorten(s, conversation=True)[0] for s in said]
    assert all(len(a[-1]["content"]) < len(b[-1]["content"]) for a, b in zip(short, said))
    for asked, there in zip(said, asyncio.run(ask(app, short, 8))):
        here = engine.run(asked, max_new_tokens=8)
        assert there["usage"]["prompt_tokens"] == here.prompt_tokens < here.prompt_tokens_base
        assert there["choices"][0]["message"]["content"].strip() == here.output_text != ""


ELSEWHERE = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer

found = []
for folder in sys.argv[2:]:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    said = [dict(role="user", content=sys.argv[1])]
    asked = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    wrote = model.generate(**asked, max_new_tokens=12, do_sample=False)[0].tolist()
    found.append([asked["input_ids"][0].tolist(), wrote])
assert not any(name.partition(".")[0] == "llmopt" for name in sys.modules)
print(json.dumps(found))
"""


def test_a_folder_with_phrases_is_an_ordinary_model(tmp_path):
    "A process without llmopt reads and writes the same tokens, whether new ones were appended or replace old ones."
    question, folders, wanted = "Is the risk of high blood pressure high?", [], []
    for replace in (False, True):
        lm = expand(tiny(), DOCS, 12, replace=replace)
        folders.append(str(tmp_path / f"replace {replace}"))
        save_model(lm, folders[-1])
        read = lm.encode_chat([user(question)])
        assert len(read) < len(tiny().encode_chat([user(question)]))
        wanted.append([read, read + EnhancedFusedLLMEngine(lm).run(question, max_new_tokens=12).output_ids])
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, question, *folders], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == wanted
