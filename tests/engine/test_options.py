"Options of an answer: what cannot be is refused at the call, whatever way you ask."

import copy

import pytest

from helpers import tiny
from llmopt.core import LM
from llmopt.engine import EnhancedFusedLLMEngine
from llmopt.errors import ConfigError


def engine(lm=None, **kw):
    return EnhancedFusedLLMEngine(lm or tiny(), **{"max_new_tokens": 4} | kw)


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(bogus=1), "no option 'bogus'; it has max_new_tokens"),
        (dict(on_token=print), "no option 'on_token'"),
        (dict(stop=None), "no option 'stop'"),
        (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(temperature=-1), "temperature"),
        (dict(seed="lucky"), "seed"),
    ],
)
def test_a_stream_refuses_at_the_call(options, says):
    "Not when it is read, which may be somewhere else, and later."
    with pytest.raises(ConfigError, match=says):
        engine().stream("What is rain?", **options)


def test_a_stream_refuses_what_is_no_text_at_the_call():
    with pytest.raises(ConfigError, match="must be a text"):
        engine().stream(None)


def test_chat_names_its_options():
    e = engine()
    with pytest.raises(ConfigError, match="no option 'tokens'; it has max_new_tokens"):
        e.chat("What is rain?", tokens=3)
    assert e.history == []


def test_options_of_a_stream_are_those_of_chat():
    "The same seed, the same answer; a fixed length is kept."
    options = dict(max_new_tokens=6, fixed=True, temperature=1.0, seed=3)
    a, b = engine(), engine()
    assert "".join(a.stream("What is rain?", **options)).strip() == b.chat("What is rain?", **options)
    assert a.last.completion_tokens == 6


def test_a_stream_takes_the_history_of_the_moment_it_is_read():
    "Made before a turn of the conversation and read after it, it follows that turn."
    a, b = engine(), engine()
    later = a.stream("Why is that?")
    a.chat("What is rain?")
    b.chat("What is rain?")
    assert "".join(later).strip() == b.chat("Why is that?") and a.history == b.history


def test_a_seed_is_checked_even_where_nothing_is_drawn():
    with pytest.raises(ConfigError, match="seed"):
        engine().run("What is rain?", seed="lucky")


@pytest.mark.parametrize("what", ["attentions", "hidden_states", "scores", "logits"])
def test_what_is_returned_is_no_decoding(what):
    "A checkpoint that asks for attentions beside the answer asks for no other answer."
    e = engine(asking(f"output_{what}"))
    assert e.checkpoint_decoding == {} and e.run("What is rain?").output_ids == engine().run("What is rain?").output_ids


def asking(option):
    "The bundled model with `option` on in its generation config."
    lm, model = tiny(), copy.copy(tiny().model)
    model.generation_config = copy.deepcopy(model.generation_config)
    setattr(model.generation_config, option, True)
    return LM(model, lm.tokenizer, lm.name, lm.source)
