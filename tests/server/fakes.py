"""A model that needs no weights: it repeats the last message, word by word, as an engine would answer.

It has the interface of `EnhancedFusedLLMEngine` that the server uses, and counts what is asked of it.
"""

import time
from contextlib import asynccontextmanager
from types import SimpleNamespace

import httpx

from llmopt.errors import ConfigError, ContextError
from llmopt.server.app import create_app
from llmopt.server.registry import Registry
from llmopt.server.settings import Settings


class Words:
    "A tokenizer whose tokens are the words that it has seen."

    chat_template = None

    def __init__(self):
        self.words = []

    def __call__(self, text, **kw):
        "As tokenizers of transformers."
        return dict(input_ids=self.encode(text))

    def encode(self, text):
        "Token ids of `text`."
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
        return [self.words.index(w) for w in text.split()]

    def decode(self, ids):
        "The text of `ids`."
        return " ".join(self.words[i] for i in ids)


def fake_lm(name="fake", context=1000):
    "What stands for a loaded model."
    return SimpleNamespace(name=name, context=context, tokenizer=Words(), rows=10_000, stop_ids=[9_999])


class FakeAnswer:
    "An answer of a piece for each word."

    def __init__(self, engine, prompt, options):
        self.engine, self.prompt, self.options = engine, prompt, options

    def words(self):
        "What the answer is made of."
        last = self.prompt[-1]
        text = self.engine.lm.tokenizer.decode(self.prompt) if isinstance(last, int) else last["content"]
        if text == "fail":
            raise KeyError("a bug")
        return ["You", "said:", *text.split()]

    def work(self, put, stop):
        "Make it, in the thread that calls."
        words = self.words()
        most = self.options.get("max_new_tokens", 256)
        for made, word in enumerate(words):
            if stop.is_set():
                return self._metrics(made, "stopped")
            if made == most:
                return self._metrics(made, "length")
            if word in self.options.get("stop_strings", ()):
                return self._metrics(made, "stop")
            self.engine.tokens += 1
            time.sleep(self.engine.pause)
            put(self._piece(word, made))
        return self._metrics(len(words), "stop")

    def _piece(self, word, made):
        "A piece of one word."
        (id,) = self.engine.lm.tokenizer.encode(word)
        top = [(id, -0.1)] * self.options["logprobs"] if self.options.get("logprobs") is not None else None
        logprobs = None if top is None else [SimpleNamespace(id=id, logprob=-0.1, top=top)]
        return SimpleNamespace(text=" " * bool(made) + word, ids=[id], logprobs=logprobs)

    def _metrics(self, made, reason):
        "Metrics, all of them made up."
        read = sum(1 if isinstance(m, int) else len(m["content"].split()) for m in self.prompt)
        times = dict(
            ttft_ms=1.0, preprocess_ms=0.1, prefill_ms=0.9, tpot_ms=1.0, e2el_ms=2.0, itl_ms=[1.0], queue_ms=0.0
        )
        kv = dict(kv_bytes_live=8, kv_bytes_peak=16, kv_bytes_reserved=32, kv_bytes_resident=None)
        return SimpleNamespace(
            method=self.engine.recipe.id,
            finish_reason=reason,
            prompt_tokens=read,
            prompt_tokens_base=read + 2,
            completion_tokens=made,
            completion_tokens_base=made,
            cached_prompt_tokens=1,
            weight_bytes=64,
            skipped_weight_bytes=None,
            decode_tok_per_s=9.0,
            notes=[],
            **times,
            **kv,
        )


class FakeEngine:
    "An engine that repeats what it is told."

    def __init__(self, lm, recipe, pause=0.0):
        self.lm, self.recipe, self.pause = lm, recipe, pause
        self.asked, self.tokens = [], 0

    def prompt(self, prompt):
        "The prompt as the model reads it; too long by the rule of `answer`."
        self._check(prompt)
        return SimpleNamespace(ids=[0] * 10)

    def _check(self, prompt):
        "Refuse a prompt of more characters than there is context."
        if isinstance(prompt[-1], dict) and len(prompt[-1]["content"]) > self.lm.context:
            raise ContextError("the prompt has too many tokens; shorten it")

    def answer(self, prompt, **options):
        "An answer; raises what an engine would raise."
        self.asked.append((prompt, options))
        if options.get("logit_bias", {}).get(999):
            raise ConfigError("logit_bias: there is no token 999")
        self._check(prompt)
        return FakeAnswer(self, prompt, options)


def fake_app(recipes=("baseline", "words"), pause=0.0, models=1, **settings):
    "The server with fake models: `fake`, `fake1` and so on; `pause` seconds a token."

    def make(lm, recipe):
        return FakeEngine(lm, recipe, pause)

    settings = Settings(**settings)
    lms = [fake_lm(f"fake{i or ''}") for i in range(models)]
    return create_app(Registry(lms, recipes, settings=settings, make=make), settings=settings)


@asynccontextmanager
async def client_of(app, **headers):
    "An HTTP client that talks to `app` in this process."
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://127.0.0.1", headers=headers, timeout=30
    ) as client:
        yield client


def hello(**change):
    "A chat request."
    return dict(model="fake", messages=[dict(role="user", content="Hello there")]) | change
