"""Recipes on tasks of lm-evaluation-harness, where that is installed; what is asked wrongly, everywhere."""

import importlib.util

import pytest

from helpers import tiny
from llmopt.engine import EnhancedFusedLLMEngine
from llmopt.errors import ConfigError, LlmoptError
from llmopt.evaluation import harness
from llmopt.evaluation.harness import TextScorer, as_task, evaluate_recipe

installed = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")


def task(kind, **more):
    "A task of the harness with one document."
    document = dict(q="Rain falls from the", a=" sky", choices=[" sky", " table"])
    base = dict(task=f"one_{kind}", output_type=kind, test_split="test", doc_to_text="{{q}}", doc_to_target="{{a}}")
    return as_task(base | more, [document])


@installed
def test_the_task_that_ships_runs_with_any_recipe():
    """Four items with two recipes: an accuracy is a share, and it has a standard error."""
    for recipe in ("baseline", "words:n=2"):
        found = evaluate_recipe(recipe, tiny(), limit=4)["llmopt_everyday"]
        assert 0 <= found["acc,none"] <= 1 and "acc_stderr,none" in found


@installed
def test_generated_and_rolling_tasks_run():
    """Tasks that let the model write, and tasks that ask how likely a whole text is."""
    match = [dict(metric="exact_match", aggregation="mean", higher_is_better=True)]
    writes = task("generate_until", generation_kwargs=dict(until=["."], max_gen_toks=4), metric_list=match)
    bits = [dict(metric="bits_per_byte", aggregation="bits_per_byte", higher_is_better=False)]
    reads = task("loglikelihood_rolling", doc_to_text="", metric_list=bits)
    found = evaluate_recipe("baseline", tiny(), tasks=[writes, reads])
    assert found["one_generate_until"]["exact_match,none"] in (0, 1)
    assert found["one_loglikelihood_rolling"]["bits_per_byte,none"] > 0


@installed
@pytest.mark.parametrize("asked", [dict(tasks="no_such_task"), dict(tasks=[]), dict(limit=0), dict(recipe="wrods")])
def test_what_is_asked_wrongly_is_one_line(asked):
    """An unknown task, none at all, no items, an unknown recipe."""
    with pytest.raises(LlmoptError) as e:
        evaluate_recipe(model=tiny(), **asked)
    assert "\n" not in str(e.value)


def test_without_the_library_it_says_what_to_install(monkeypatch):
    """The extra has a name."""
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"llmopt\[harness\]"):
        evaluate_recipe(model=tiny())


def test_word_removal_shortens_a_context_and_never_a_continuation():
    """The likelihood of what was asked about is measured, after a shorter context."""
    context = "The very big and rather old house near the small river was painted in a bright red by"
    plain, short = (TextScorer(EnhancedFusedLLMEngine(tiny(), recipe=r)) for r in ("baseline", "words:n=2"))
    (ids, end), (fewer, same) = (s.split(context, " my own uncle") for s in (plain, short))
    assert len(fewer) < len(ids) and same == end


def test_a_continuation_that_melts_into_its_context():
    """Two texts that are one token together are two all the same: a context is never left without tokens."""
    scorer = TextScorer(EnhancedFusedLLMEngine(tiny()))
    context, continuation = "th", "e"
    assert len(scorer.encode(context + continuation)) == 1
    assert scorer.split(context, continuation) == (scorer.encode(context), scorer.encode(continuation))
    assert scorer.loglikelihood(context, continuation)[0] < 0


def test_a_blank_continuation_in_a_chat():
    """White space is dropped before an answer, unless there is nothing else."""
    scorer = TextScorer(EnhancedFusedLLMEngine(tiny()), chat=True)
    assert scorer.loglikelihood("What is rain?", "\n")[0] < 0


def test_a_context_that_does_not_fit_loses_its_beginning():
    """As with the harness's own models, and with a warning; a continuation that does not fit is refused."""
    scorer = TextScorer(EnhancedFusedLLMEngine(tiny()))
    most = scorer.lm.context
    assert scorer.fitting([*range(most + 5)], 3) == [*range(8, most + 5)]
    with pytest.raises(ConfigError, match="does not fit the context"):
        scorer.forced([1], [2] * most)


def test_a_chat_asks_the_context_as_a_question():
    """With `chat` the prompt is what the engine makes of a question, so it is longer than the text."""
    engine = EnhancedFusedLLMEngine(tiny())
    plain, chat = (TextScorer(engine, c).loglikelihood("What is rain?", " Water") for c in (False, True))
    ids = engine.lm.tokenizer("Water", add_special_tokens=False)["input_ids"]
    assert chat[0] != plain[0] and chat == TextScorer(engine, True).forced("What is rain?", ids)
