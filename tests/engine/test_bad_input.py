"What cannot be answered is refused in one line of the family of errors; what can be is answered with right numbers."

import copy
import json
import math

import numpy as np
import pytest
import torch
import transformers as T

from helpers import tiny
from llmopt.adaptivocab import SimpleAdaptiVocab
from llmopt.core import LM, user
from llmopt.engine import ComprehensiveChatEngine, EnhancedFusedLLMEngine, Recipe
from llmopt.errors import ConfigError, ContextError, LlmoptError, ModelError, UnsupportedModelError


def engine(recipe=None, lm=None, **kw):
    return EnhancedFusedLLMEngine(lm or tiny(), recipe=recipe, **{"max_new_tokens": 6} | kw)


def with_template(template):
    "The bundled model with another chat template."
    lm, tok = tiny(), copy.deepcopy(tiny().tokenizer)
    tok.chat_template = template
    return LM(lm.model, tok, lm.name, lm.source)


def saying(ids):
    "A model that is sure of one of `ids` at every step, the first most."
    lm, model = tiny(), copy.deepcopy(tiny().model)
    model.lm_head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()
        for i, token in enumerate(ids):
            model.lm_head.bias[token] = 99.0 - i
    return LM(model, lm.tokenizer, "saying")


def ways(e):
    "The three ways to ask `e`: each raises, or gives a text."
    return [lambda q: e.run(q).output_text, e.chat, lambda q: "".join(e.stream(q))]


def refused(e, question, kind=LlmoptError, says=None):
    for ask in ways(e):
        with pytest.raises(kind, match=says) as error:
            ask(question)
        assert "\n" not in str(error.value)
    assert e.history == EnhancedFusedLLMEngine(e.lm, system=e.system).history


# ## Texts


@pytest.mark.parametrize("text", ["", "  \n", "\u2028", None, 3, b"bytes", [], {}, ["text"], [{"role": "user"}]])
def test_no_question(text):
    refused(engine(), text, ConfigError)


def test_a_text_that_is_too_long():
    refused(engine(), "why " * 2000, ContextError, "context of 1,024")
    refused(engine(max_new_tokens=5000), "why", ContextError, "5,000")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lone_surrogates():
    "Bytes of a terminal that are no UTF-8 are read as U+FFFD, in every way to ask, and nothing unwritable is returned."
    for recipe in ("baseline", "words", "vocab"):
        e = engine(recipe)
        m = e.run("Why is the caf\udce9 closed to us on this long and rainy Sunday?")
        assert "caf\ufffd" in m.input_text
        e.chat("The caf\udce9")
        list(e.stream("The caf\udce9 and the \ud800 bar"))
        (str(e.history) + m.prompt_text + m.output_text).encode()
    assert engine(system="Be \udce9 brief.").chat("hi")


def test_a_message_of_a_conversation_must_be_text():
    with pytest.raises(ConfigError, match="must be a text"):
        engine().run([dict(role="user", content=None)])


# ## Templates

NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}"
)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_template_without_system_role():
    "The system text goes into the first turn of the user."
    for ask in ways(engine(lm=with_template(NO_SYSTEM), system="Be brief.")):
        ask("hi")
    e = engine(lm=with_template(NO_SYSTEM), system="Be brief.")
    assert "Be brief." in e.run("hi").prompt_text


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{% if %}", "", "{{ messages.none.none }}", " "])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_template_that_fails(template):
    "A template that raises, does not parse or writes nothing is a `ModelError`; an empty one means there is none."
    e = engine(lm=with_template(template))
    if template == "":
        assert e.chat("hi") is not None
    else:
        refused(e, "hi", ModelError, "chat template")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_token_without_an_embedding():
    "A tokenizer with more tokens than the embedding has rows: the question that needs them is refused, others are not."
    lm = tiny()
    tok = copy.deepcopy(lm.tokenizer)
    tok.add_tokens(["<tool>"])
    e = engine(lm=LM(lm.model, tok, lm.name, lm.source))
    refused(e, "use <tool> now", ModelError, "embeddings")
    assert e.chat("What is rain?")


# ## Parameters


@pytest.mark.parametrize("n", [0, -1, 2.5, "3", True, math.nan])
def test_lengths_that_cannot_be(n):
    with pytest.raises(ConfigError, match="max_new_tokens"):
        engine().run("hi", max_new_tokens=n)
    with pytest.raises(ConfigError, match="max_new_tokens"):
        engine(max_new_tokens=n)


def test_integers_of_numpy():
    assert engine().run("hi", max_new_tokens=np.int64(2), fixed=True).completion_tokens == 2
    assert engine(word_removal=np.int64(4)).recipe == Recipe.parse("words:n=4")
    assert engine(max_new_tokens=np.int32(3)).run("hi", fixed=True, seed=np.int64(1)).completion_tokens == 3


@pytest.mark.parametrize("t", [-1, math.nan, math.inf, "hot", None])
def test_temperatures_that_cannot_be(t):
    with pytest.raises(ConfigError, match="temperature"):
        engine().run("hi", temperature=t)


@pytest.mark.parametrize("seed", [2**70, -(2**70), 1.5, "x"])
def test_seeds_that_cannot_be(seed):
    with pytest.raises(ConfigError, match="seed"):
        engine().run("hi", temperature=1.0, seed=seed)


@pytest.mark.parametrize(
    "keywords",
    [
        dict(larosa_sparsity=1.0),
        dict(larosa_sparsity=-0.1),
        dict(larosa_sparsity=math.nan),
        dict(larosa_sparsity="much"),
        dict(word_removal=-1),
        dict(word_removal=1),
        dict(word_removal=2.5),
        dict(system=7),
        dict(recipe="words:n=1"),
        dict(recipe="turbo"),
        dict(recipe=3),
        dict(recipe=["words"]),
    ],
)
def test_engines_that_cannot_be(keywords):
    with pytest.raises(ConfigError):
        EnhancedFusedLLMEngine(tiny(), **keywords)


def test_recipe_by_name_and_not_beside_keywords():
    assert engine("words+kv").recipe == Recipe.parse("words+kv")
    for keyword in (dict(word_removal=3), dict(simple_adaptivocab=True), dict(larosa_sparsity=0.4)):
        with pytest.raises(ConfigError, match="not both"):
            engine("kv", **keyword)


def test_phrases_in_memory_are_used():
    "A vocabulary object is read with its own phrases, and is another recipe than the default phrases."
    lm, question = tiny(), "The old mill by the river grinds corn, the old mill by the river is closed."
    v = SimpleAdaptiVocab(lm.tokenizer, [" old mill by the river"])
    own, usual = engine(simple_adaptivocab=v), engine(simple_adaptivocab=True)
    assert own.run(question).prompt_tokens < usual.run(question).prompt_tokens
    assert own.recipe != usual.recipe
    assert "-phrases-" in own.run(question).method
    again = SimpleAdaptiVocab(lm.tokenizer, [" old mill by the river"])
    assert engine(simple_adaptivocab=again).recipe == own.recipe
    stored = Recipe.from_dict(json.loads(json.dumps(own.recipe.to_dict())))
    assert stored == own.recipe
    assert engine(stored).run(question).output_ids == own.run(question).output_ids


def test_phrases_of_another_tokenizer():
    tok = copy.deepcopy(tiny().tokenizer)
    tok.add_tokens(["<tool>"])
    with pytest.raises(ConfigError, match="another tokenizer"):
        engine(simple_adaptivocab=SimpleAdaptiVocab(tok, [" of the"]))


# ## Numbers


def test_an_answer_of_line_breaks_only():
    "No text: no rate of tokens or characters of text, and none that is negative."
    newline = tiny().tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    m = engine(lm=saying([newline])).run("hi", max_new_tokens=20, fixed=True)
    assert m.output_text == "" and m.completion_tokens == 20 and m.completion_tokens_base == 0
    assert m.decode_base_tok_per_s is None and m.decode_char_per_s is None and m.decode_tok_per_s > 0


def test_an_empty_answer():
    "The first token ends the answer: one token, no text, no time per token; the chat goes on."
    e = engine(lm=saying(tiny().stop_ids))
    m = e.run("hi")
    assert (m.output_text, m.finish_reason, m.completion_tokens) == ("", "stop", 1)
    assert m.tpot_ms is None and m.decode_tok_per_s is None and m.decode_char_per_s is None and m.itl_ms == []
    assert e.chat("hi") == "" and list(e.stream("hi")) == [] and len(e.history) == 4


def test_one_token():
    m = engine().run("hi", max_new_tokens=1)
    assert m.completion_tokens == 1 and m.tpot_ms is None and m.decode_tok_per_s is None and m.ttft_ms > 0


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_numbers(broken):
    "A model whose scores are not numbers is stopped with the reason; its first token again and again is no answer."
    lm = saying([7])
    with torch.no_grad():
        lm.model.lm_head.bias.fill_(broken)
    refused(engine(lm=lm), "hi", ModelError, "not numbers")


def test_a_model_that_fails_inside():
    "An error of the model is one line, and its cause is kept."
    lm = saying([7])
    lm.model.lm_head = torch.nn.Linear(3, 4)
    with pytest.raises(ModelError, match="failed while answering") as error:
        engine(lm=lm).run("hi")
    assert isinstance(error.value.__cause__, RuntimeError)
    with pytest.raises(ModelError):
        engine(lm=lm).score("hi", [1, 2])


# ## Several methods


def test_a_method_that_breaks_costs_itself_alone(monkeypatch):
    "An unforeseen error while one engine is made becomes the reason that this engine gives."

    def broken(self, lm, notes=None):
        raise RuntimeError("no memory left")

    config = Recipe.parse("larosa").larosa
    monkeypatch.setattr(type(config), "prepare", broken)
    bench = ComprehensiveChatEngine(tiny(), ["baseline", "larosa"], max_new_tokens=2)
    assert bench.engines["baseline"].run("hi").completion_tokens
    for ask in (bench.engines["larosa"].run, bench.engines["larosa"].score):
        with pytest.raises(UnsupportedModelError, match="no memory left"):
            ask("hi")


@pytest.mark.parametrize("artifact", ["none", "/"])
def test_an_artifact_that_cannot_be_read_ends_it_before_it_begins(artifact):
    "You named it, so it is no property of the model."
    with pytest.raises(LlmoptError, match="LaRoSA artifact"):
        ComprehensiveChatEngine(tiny(), ["baseline", f"larosa:artifact={artifact}"])


# ## Words


def test_a_budget_of_words_that_cannot_be_met():
    "The text is sent whole, and the answer carries a note."
    with pytest.warns(UserWarning, match="sent whole"):
        m = engine("words:target_tokens=1").run("What is the difference between rain and snow?")
    assert m.prompt_tokens == m.prompt_tokens_base and "sent whole" in m.notes[0]


def test_the_short_question_of_a_turn_is_never_shortened():
    e = engine("words:n=2")
    messages = [user("My name is Ann and I like to walk in the hills."), dict(role="assistant", content="Nice.")]
    assert "What is my name?" in e.run([*messages, user("What is my name?")]).prompt_text
    e.chat("What is my name?")
    assert "What is my name?" in e.last.prompt_text
    assert "What is my name?" not in e.run("What is my name?").prompt_text


@pytest.mark.parametrize("config", [T.RwkvConfig, T.MambaConfig, T.OpenAIGPTConfig], ids=lambda c: c.model_type)
def test_models_that_take_no_cache_are_refused(config):
    "RWKV ignores a cache without a word: its steps forgot the prompt, and every method agreed with that."
    sizes = dict(hidden_size=16, num_hidden_layers=2, n_embd=16, n_layer=1, n_head=2)
    model = T.AutoModelForCausalLM.from_config(config(vocab_size=4096, **sizes))
    with pytest.raises(UnsupportedModelError, match="takes no KV cache"):
        engine(lm=LM(model, tiny().tokenizer, "stateful"))
