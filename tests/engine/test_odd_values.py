"Values of odd types where numbers, switches, texts and tokens belong: one line of error, or the right thing."

import copy
import threading

import numpy as np
import pytest
import torch

from helpers import small_model, tiny, tokenizer
from llmopt.core import LM
from llmopt.engine import ComprehensiveChatEngine, EnhancedFusedLLMEngine, Recipe, checkpoint_decoding
from llmopt.engine.recipe import named_recipes
from llmopt.errors import ConfigError, LlmoptError


def engine(lm=None, **kw):
    return EnhancedFusedLLMEngine(lm or tiny(), **{"max_new_tokens": 3} | kw)


def one_line(call, says, kind=ConfigError):
    "`call()` raises `kind` in one line that matches `says`."
    with pytest.raises(kind, match=says) as error:
        call()
    assert "\n" not in str(error.value)


# ## Keywords of the engine


@pytest.mark.parametrize(
    "keywords, recipe",
    [
        (dict(vattention_enabled=np.True_), "kv"),
        (dict(vattention_enabled=1), "kv"),
        (dict(vattention_enabled=None), "baseline"),
        (dict(larosa_sparsity=np.float32(0.4)), "larosa"),
        (dict(larosa_sparsity=np.float64(0)), "baseline"),
        (dict(larosa_sparsity=None), "baseline"),
        (dict(word_removal=np.True_), "words"),
        (dict(word_removal=np.int8(4)), "words:n=4"),
        (dict(word_removal=np.array(4)), "words:n=4"),
        (dict(word_removal=None), "baseline"),
        (dict(simple_adaptivocab=np.True_), "vocab"),
        (dict(simple_adaptivocab=None), "baseline"),
    ],
)
def test_numbers_of_numpy_and_none_in_keywords(keywords, recipe):
    "They mean what Python's own would; 0.4 in single precision is 0.4."
    assert engine(**keywords).recipe == Recipe.parse(recipe)


@pytest.mark.parametrize(
    "keywords",
    [
        dict(vattention_enabled="no"),
        dict(vattention_enabled=2),
        dict(word_removal=np.array([2, 3])),
        dict(word_removal="3"),
        dict(larosa_sparsity=np.array([0.4, 0.5])),
        dict(simple_adaptivocab=""),
        dict(simple_adaptivocab=np.array([1, 2])),
    ],
)
def test_keywords_that_say_neither_yes_nor_no(keywords):
    one_line(lambda: engine(**keywords), next(iter(keywords)) if "vatt" in str(keywords) else ".")


def test_a_model_object_is_named_in_one_line():
    "Its `repr` has hundreds."
    one_line(lambda: EnhancedFusedLLMEngine(tiny().model), "not as LlamaForCausalLM")


@pytest.mark.parametrize("keywords", [dict(device=None), dict(device=0), dict(dtype=None), dict(dtype=32)])
def test_places_that_are_no_names(keywords):
    one_line(lambda: EnhancedFusedLLMEngine("llmopt-tiny", **keywords), f"{next(iter(keywords))} is given by its name")


def test_places_of_torch_are_names():
    e = EnhancedFusedLLMEngine("llmopt-tiny", device=torch.device("cpu"), dtype=torch.bfloat16)
    assert e.lm.model.dtype == torch.bfloat16


@pytest.mark.parametrize("system", [0, False, {}, np.array([1, 2]), torch.tensor([1, 2])])
def test_system_messages_that_are_no_texts(system):
    "They are refused, false ones too; an empty text is none."
    one_line(lambda: engine(system=system), "the system message must be a text")
    assert engine(system="").system is None


# ## Options of an answer


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(on_token=3), "on_token is a function"),
        (dict(stop=True), "stop is a `threading.Event`"),
        (dict(fixed="no"), "fixed must be True or False"),
        (dict(temperature=True), "temperature"),
        (dict(temperature=np.True_), "temperature"),
        (dict(temperature="2"), "temperature"),
        (dict(temperature=torch.tensor([1.0, 2.0])), "temperature"),
    ],
)
def test_options_of_the_wrong_kind_are_no_fault_of_the_model(options, says):
    one_line(lambda: engine().run("What is rain?", **options), says)


def test_an_answer_that_is_stopped_before_it_begins():
    "One token, no time per token, and the chat goes on."
    flag = threading.Event()
    flag.set()
    m = engine().run("What is rain?", max_new_tokens=9, stop=flag)
    assert (m.completion_tokens, m.finish_reason, m.tpot_ms) == (1, "stopped", None)
    assert engine().run("What is rain?", max_new_tokens=1, stop=flag).finish_reason == "length"


def test_a_model_in_training_mode_is_refused():
    "Its dropout would make two greedy answers differ: before the engine, and on any request after."
    lm = LM(small_model("gpt2"), tokenizer(), "dropping")
    made = engine(lm)
    lm.model.transformer.h[0].attn.train()
    one_line(lambda: engine(lm), "training mode")
    lm.model.train()
    for ask in (lambda: made.run("What is rain?"), lambda: made.score("What is rain?", [1]), lambda: made.chat("Why?")):
        one_line(ask, "training mode")
    assert lm.model.training and made.history == []
    lm.model.eval()
    assert made.run("What is rain?").output_ids == made.run("What is rain?").output_ids


@pytest.mark.parametrize("role", [None, 3, b"user"])
def test_roles_that_are_no_texts(role):
    "The message is at fault, and not the template."
    one_line(lambda: engine().run([dict(role=role, content="What is rain?")]), "role of a message")


@pytest.mark.parametrize("ids", [None, 3, "ab", [None], [1.5], [-1], [4096], [[1, 2]], [True], np.array([[1]])])
def test_answers_that_are_no_tokens_are_not_scored(ids):
    "A number that is no token would be scored as another one."
    one_line(lambda: engine().score("What is rain?", ids), "token id")


def test_arrays_of_tokens_are_scored():
    want = engine().score("What is rain?", [5, 6])
    for ids in (np.array([5, 6]), torch.tensor([5, 6]), (np.int64(5), 6)):
        assert torch.equal(engine().score("What is rain?", ids), want)


# ## Streams


def test_a_stream_is_read_and_closed_by_other_threads():
    "A server hands it from one thread to another; closing it there ends the model and leaves the history."
    e, seen = engine(), []
    pieces = e.stream("Tell me a long story.", max_new_tokens=400)
    seen.append(next(pieces))
    for step in (lambda: seen.append(next(pieces)), pieces.close):
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()
    assert all(seen) and e.history == [] and not [t for t in threading.enumerate() if t.name == "llmopt-stream"]


def test_two_streams_of_one_engine_end_in_their_own_order():
    "Each is a turn of the conversation when it has ended."
    e = engine()
    first, second = e.stream("What is rain?"), e.stream("What is snow?")
    next(first, "")
    list(second)
    list(first)
    assert [m["content"] for m in e.history if m["role"] == "user"] == ["What is snow?", "What is rain?"]


def test_a_copy_of_an_engine_answers_the_same():
    assert copy.deepcopy(engine()).run("What is rain?").output_ids == engine().run("What is rain?").output_ids


# ## Lists of methods


def test_methods_in_any_list():
    for methods in (["kv"], ("kv",), {"kv"}, iter(["kv"]), np.array(["kv"]), "kv", {"kv": 1}):
        names = list(named_recipes(methods))
        assert names == ["kv"] and type(names[0]) is str


def test_one_method_under_two_names_is_one():
    assert list(named_recipes(["kv", "hybrid_kv_cache", " kv ", "kv:", "words+kv", "kv+words"])) == ["kv", "words+kv"]


@pytest.mark.parametrize("methods", [3, [None], [["kv"]], [3], [Recipe()], ["kv", None]])
def test_lists_that_hold_no_names(methods):
    one_line(lambda: ComprehensiveChatEngine(tiny(), methods), "method")


def test_no_method_is_nobody_to_ask():
    one_line(lambda: ComprehensiveChatEngine(tiny(), []), "no method to ask")


def test_options_for_several_engines_are_checked_once():
    one_line(lambda: ComprehensiveChatEngine(tiny(), ["kv"]).chat("What is rain?", bogus=1), "no option 'bogus'")


# ## Checkpoints


def with_generation_config(config):
    "The bundled model with another generation config."
    model = copy.copy(tiny().model)
    model.generation_config = config
    return LM(model, tiny().tokenizer, tiny().name, tiny().source)


def test_a_model_without_a_generation_config():
    "It asks for nothing, and answers end where the tokenizer and the template say."
    lm = with_generation_config(None)
    assert checkpoint_decoding(lm.model) == {}
    assert engine(lm).run("What is rain?").output_ids == engine().run("What is rain?").output_ids


@pytest.mark.parametrize("eos", ["3", [[3]], [1.5]])
def test_ends_of_an_answer_that_are_no_tokens(eos):
    config = copy.deepcopy(tiny().model.generation_config)
    config.eos_token_id = eos
    one_line(lambda: engine(with_generation_config(config)), "eos_token_id", LlmoptError)


@pytest.mark.filterwarnings("ignore:the text holds bytes")
def test_a_template_with_bytes_that_are_no_text():
    tok = copy.deepcopy(tiny().tokenizer)
    tok.chat_template = "\ud800{{ messages[0].content }}"
    assert engine(LM(tiny().model, tok, tiny().name)).run("What is rain?").prompt_text == "\ufffdWhat is rain?"
