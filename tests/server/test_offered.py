"Which recipes a server offers, and what becomes of those that cannot be prepared."

import pytest

from helpers import tiny
from llmopt.errors import ConfigError, UnsupportedModelError
from llmopt.server.registry import Registry
from server.fakes import FakeEngine, fake_lm


def make(lm, recipe):
    "An engine for a model that LaRoSA does not know."
    if recipe.larosa:
        raise UnsupportedModelError("LaRoSA does not know this model")
    return FakeEngine(lm, recipe)


def test_a_named_recipe_that_a_model_cannot_do_is_refused_at_the_start():
    with pytest.raises(UnsupportedModelError, match="LaRoSA"):
        Registry([fake_lm()], ["baseline", "larosa"], make=make)


def test_of_the_recipes_that_come_by_themselves_the_others_are_offered():
    with pytest.warns(UserWarning, match="is not offered: LaRoSA does not know"):
        ids = [m.id for m in Registry([fake_lm()], make=make)]
    assert ids == ["fake", "fake:words", "fake:vocab", "fake:kv", "fake:words+kv"]


def test_a_recipe_that_fails_otherwise_fails_at_the_start():
    with pytest.raises(ConfigError, match="none.json"):
        Registry([tiny()], ["vocab:phrases=./none.json"])
