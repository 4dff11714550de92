"A budget through the recipe and the engine: named, exact when it is off or large, within bounds when it is on."

import json

import pytest

from llmopt.engine.fused import EnhancedFusedLLMEngine, Recipe
from llmopt.errors import LlmoptError
from llmopt.kv_cache import KVCacheConfig

QUERY = (
    "Please summarize the following text: "
    + "The river runs from the hills to the sea, and the people of the town drink its water. " * 12
)


@pytest.mark.parametrize(
    "text",
    [
        "kv:budget=25%",
        "kv:budget=512",
        "kv:budget=2MiB,policy=h2o",
        "kv:budget=mass=0.95",
        "words:n=3+kv:budget=25%,policy=random",
    ],
)
def test_a_recipe_with_a_budget_has_a_name_and_survives_json(text):
    "The id of the recipe and its JSON are read back as the same recipe, in every unit of a budget."
    r = Recipe.parse(text)
    assert Recipe.parse(r.id) == r == Recipe.from_dict(json.loads(json.dumps(r.to_dict()))) and "budget=" in r.id


@pytest.mark.parametrize(
    "text",
    [
        "kv:budget=0",
        "kv:budget=-5%",
        "kv:budget=much",
        "kv:policy=cake",
        "kv:budget=25%,policy=lru",
        "kv:budget=25%,attention=stock",
        "kv:budget=8",
    ],
)
def test_what_is_no_budget_is_refused_in_one_line(text):
    "Nothing, no number, less than is always kept; an unknown policy or one without a budget; stock attention."
    with pytest.raises(LlmoptError, match="bad parameters") as e:
        Recipe.parse(text)
    assert "\n" not in str(e.value)


def test_the_named_methods_stay_exact():
    "No method keeps to a budget unless it is asked to."
    for m in "hybrid_kv_cache", "kv":
        assert Recipe.parse(m).cache == KVCacheConfig() and KVCacheConfig().budget is None


def test_an_answer_under_a_budget():
    "A large budget changes no bit of the answer and its probabilities; a small one takes fewer bytes, end and peak."
    exact, large, small = (
        EnhancedFusedLLMEngine("llmopt-tiny", device="cpu", recipe=Recipe.parse(r))
        for r in ("kv", "kv:budget=1000", "kv:budget=25%")
    )
    m, n, s = (e.run(QUERY, max_new_tokens=12, fixed=True) for e in (exact, large, small))
    assert m.output_ids == n.output_ids and m.kv_bytes_live == n.kv_bytes_live == n.kv_bytes_peak
    assert (exact.score(QUERY, m.output_ids) == large.score(QUERY, m.output_ids)).all()
    assert s.kv_bytes_live < 0.45 * m.kv_bytes_live and s.kv_bytes_live < s.kv_bytes_peak < m.kv_bytes_peak
    assert s.prompt_tokens == m.prompt_tokens > 200


def test_a_budget_in_bytes_that_cannot_hold_what_is_always_kept_is_an_error():
    "How many bytes a token takes is known with the model, so this shows at the first answer."
    e = EnhancedFusedLLMEngine("llmopt-tiny", device="cpu", recipe=Recipe.parse("kv:budget=8KiB"))
    with pytest.raises((LlmoptError, ValueError), match="always kept"):
        e.run(QUERY, max_new_tokens=2)
