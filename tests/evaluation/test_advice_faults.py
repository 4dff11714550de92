"""What `llmopt advise` says when things go wrong: made-up recordings, so that no model is asked."""

import math
import random

import pytest

from helpers import tiny
from llmopt.core.recipe_file import read_recipe
from llmopt.errors import ConfigError, LlmoptError, ResultsError
from llmopt.evaluation.advice import _commands, advice_text, advise
from llmopt.evaluation.advice_file import Advice, advice_of, read_advice
from llmopt.evaluation.candidates import Candidate, candidate, combinations
from llmopt.evaluation.goals import read_limits
from llmopt.evaluation.recording import RecordedBench, Recording, Timed, read_recording
from llmopt.evaluation.search import Search
from llmopt.evaluation.trial import mean_interval

LOOK = dict(preprocess_ms=1, prefill_ms=300, decode_ms=700, steps=20, weight_bytes=9e8, cache_bytes=1e8, seconds=1)
LOOK |= dict(prompt_tokens=100)


def reading(gain, scatter, rng):
    "A reading of something that is `gain` times as fast."
    base = 1000 * math.exp(rng.gauss(0, scatter))
    took = base / gain * math.exp(rng.gauss(0, scatter))
    return Timed(method=dict(total=took), base=dict(total=base), seconds=2)


def recording(truth, n=20, scatter=0.01, seed=0):
    "A recording of `n` prompts; `truth`: recipe -> (gain, mean KL)."
    rng, queries = random.Random(seed), [f"q{i}" for i in range(n)]
    out = Recording(
        queries=queries,
        probe=dict(context=100, step_ms=35, empty_ms=30, linear_ms=25),
        looks=dict.fromkeys(queries, LOOK),
    )
    for recipe, (gain, loss) in truth.items():
        lost = {q: loss * rng.uniform(0.5, 1.5) for q in queries}
        out.losses[recipe] = {q: dict(kl=x, top1=max(0, 1 - x), bits=x, seconds=1) for q, x in lost.items()}
        out.kept[recipe] = dict.fromkeys(queries, 0.5)
        out.times[recipe] = {q: [reading(gain, scatter, rng)] for q in queries}
    return out


def candidates(truth):
    "The single settings of `truth`; names that are no recipe are alternatives."
    found = [Candidate(r, alternative=True) if r.startswith("plain:") else candidate(r) for r in truth]
    return [c for c in found if len(c.parts) < 2]


def search(truth, floor="kl=0.05", minutes=60, bench=RecordedBench, seed=0, **kw):
    "A search that has run."
    return Search(bench(recording(truth, **kw)), candidates(truth), "total", read_limits(floor), minutes, seed).run()


def said(found):
    "The advice of a search, which is told in lines of at most 100 characters."
    advice = advice_of(found, "made-up", {})
    assert all(len(line) <= 100 for line in advice_text(advice).splitlines())
    assert Advice.model_validate_json(advice.model_dump_json()) == advice
    return advice


def test_nobody_meets_the_floor():
    "Change nothing, and how many lose too much"
    advice = said(search({"larosa": (1.4, 0.2), "words:rate=0.5": (1.3, 0.4)}, "kl=0"))
    assert advice.decision == "nothing" and advice.recipe == "baseline"
    assert "2 lost more than the floor allows" in advice.sentence


def test_a_loss_that_shows_on_new_prompts_only():
    "What was inside the floor on the search's prompts and is not on new ones is refused"
    made = recording({"larosa": (1.3, 0.02)})
    first = Search(RecordedBench(made), [candidate("larosa")], "total", read_limits("kl=0.05"))
    for q in first.confirm:
        made.losses["larosa"][q]["kl"] = 0.3
    found = first.run()
    assert found.chosen is None and found.trials["larosa"].state == "rejected"
    assert "new prompts" in said(found).sentence


def test_an_equal_but_simpler_recipe_is_preferred():
    "A tie goes to the recipe with fewer methods, and names the other"
    truth = {"larosa": (1.3, 0.01), "kv": (1.08, 0.0), "larosa+kv": (1.3, 0.01)}
    advice = said(search(truth, scatter=0.03))
    assert (advice.recipe, advice.tied) == ("larosa", ["larosa+kv"])
    assert "ties with larosa+kv" in advice.sentence


def test_a_combination_that_is_really_faster_is_taken():
    "Two gains that multiply beat the simpler recipe"
    truth = {"larosa": (1.2, 0.01), "kv": (1.2, 0.0)}
    truth[combinations([candidate(r) for r in truth])[0].id] = (1.44, 0.01)
    assert said(search(truth)).recipe == "larosa+kv"


def test_a_plain_alternative_that_wins_is_named():
    "The advice is to use it, and the recipe is the best one of llmopt"
    truth = {"plain:int8": (1.8, 0.01), "larosa": (1.3, 0.01)}
    advice = said(search(truth))
    assert (advice.decision, advice.chosen) == ("alternative", "plain:int8")
    advice.config = dict(device="cpu", asked_dtype="auto")
    assert _commands(advice, {"plain:int8": "how"}, "r.json") == [
        "how",
        f"# r.json holds {advice.recipe}, the best of llmopt itself",
    ]
    assert advice.recipe == "larosa" and "no method of llmopt" in advice.sentence


def test_no_interval_of_divergences_reaches_below_zero():
    "Two values are far apart for their mean, and still none of them can be negative; bits can"
    assert mean_interval([0.0, 0.05]).low == 0.0 and mean_interval([-0.01, 0.05]).low < 0


def test_both_limits_must_hold():
    "A recipe inside one limit and outside the other is refused"
    truth = {"larosa": (1.3, 0.03)}
    assert said(search(truth, "kl=0.05,top1=0.9")).recipe == "larosa"
    assert said(search(truth, "kl=0.05,top1=0.99")).recipe == "baseline"


def test_the_same_twice():
    "The same recording and seed give the same advice; another seed, another split and the same recipe"
    truth = {"larosa": (1.2, 0.02), "words:rate=0.5": (1.5, 0.5), "kv": (1.0, 0.0)}
    first, second, other = (said(search(truth, seed=s)) for s in (0, 0, 1))
    assert first == second
    assert first.confirm != other.confirm and other.recipe == first.recipe == "larosa"


def test_an_unlucky_first_prompt_is_looked_at_again():
    "What loses much on the first prompts only, or is slow by chance there, is found where time is left"
    made = recording({"larosa": (1.3, 0.01), "kv": (1.5, 0.01)})
    first = Search(RecordedBench(made), candidates(made.times), "total", read_limits("kl=0.05")).search
    made.losses["larosa"][first[0]]["kl"] = 0.12
    for q in first[:2]:
        made.times["kv"][q][0].method["total"] = made.times["kv"][q][0].base["total"] * 1.02
    found = Search(RecordedBench(made), candidates(made.times), "total", read_limits("kl=0.05"), 60).run()
    assert found.chosen.id in ("kv", "larosa+kv")
    assert all(len(found.trials[r].losses["search"]) > 2 for r in ("larosa", "kv"))


def test_no_time():
    "Where the time is up at once, nothing is decided, and it says so"
    advice = said(search({"larosa": (1.3, 0.01)}, minutes=0.01))
    assert advice.sentence.startswith("Change nothing yet: the time was up")


def test_time_for_a_part():
    "Where nothing was timed when the confirmation should begin, the search goes on; what is undecided then is told"
    found = search({"larosa": (1.3, 0.01), "words:rate=0.5": (1.5, 5.0)}, minutes=0.15)
    assert found.trials["words:rate=0.5"].state == "outside" and len(found.trials["larosa"].ratios["search"]) == 1
    sentence = said(found).sentence
    assert sentence.startswith("Change nothing yet: the time was up") and "1 not decided in time" in sentence


def test_the_time_is_kept():
    "A search ends within a measurement of its time, and what it could not confirm it does not advise"
    truth = dict.fromkeys(("larosa", "kv", "vocab", "words", "larosa:sparsity=0.5", "kv:budget=50%"), (1.2, 0.01))
    for minutes in (0.5, 1, 2, 4):
        found = search(truth, minutes=minutes)
        assert found.bench.clock() <= 60 * minutes + 30
        assert found.confirmed == (found.chosen is not None)


class Stopped(RecordedBench):
    "A bench that Ctrl-C meets after some measurements."

    left = 30

    def losses(self, recipe, query):
        "As before, until it is stopped."
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().losses(recipe, query)


@pytest.mark.parametrize("left", [0, 1, 5, 12, 18])
def test_ctrl_c(left):
    "The best so far, marked as not confirmed unless it was; never an error"

    class Bench(Stopped):
        pass

    Bench.left = left
    advice = said(search({"larosa": (1.3, 0.01), "words:rate=0.5": (1.5, 0.5)}, bench=Bench))
    assert advice.interrupted
    assert advice.recipe in ("baseline", "larosa")
    assert advice.recipe == "baseline" or advice.confirmed or "stopped early" in advice.sentence


def test_what_fails_is_left_out():
    "A recipe that cannot run, one with predictions that are no numbers and one without a time do not end the search"

    class Bench(RecordedBench):
        def losses(self, recipe, query):
            if recipe == "kv":
                raise LlmoptError("this model has no such cache\nat all")
            return super().losses(recipe, query) | (dict(kl=math.nan) if recipe == "vocab" else {})

    truth = {"larosa": (1.3, 0.01), "kv": (1.5, 0.0), "vocab": (1.5, 0.0)}
    made = recording(truth | {"words": (1.5, 0.0)})
    for rounds in made.times["words"].values():
        rounds[0].method["total"] = None
    settings = candidates(truth | {"words": 0})
    found = Search(Bench(made), settings, "total", read_limits("kl=0.05")).run()
    assert {r for r, t in found.trials.items() if t.state == "refused"} == {"kv", "vocab", "words"}
    assert said(found).recipe == "larosa"


def test_what_fails_while_it_is_timed_is_left_out():
    "A candidate that breaks in a block, with any error, is refused; the others of that block are timed"

    class Bench(RecordedBench):
        def times(self, recipes, query):
            if "kv" in recipes:
                raise RuntimeError("the cache is full\nand that is that")
            return super().times(recipes, query)

    found = search({"larosa": (1.3, 0.01), "kv": (1.5, 0.0)}, bench=Bench)
    assert (found.trials["kv"].state, found.chosen.id) == ("refused", "larosa")
    assert "the cache is full and that" in found.trials["kv"].reason


def test_a_floor_of_nothing_allows_rounding():
    "What adds the same numbers in another order loses nothing"
    assert said(search({"kv": (1.3, 1e-7), "larosa": (1.5, 1e-3)}, "kl=0")).recipe == "kv"


def test_what_could_not_be_tried_says_why():
    "A reason stands in the text once for all recipes that share it, and not in the file alone"

    class Bench(RecordedBench):
        def losses(self, recipe, query):
            raise LlmoptError(f"there is no file {recipe[:2]}")

    text = advice_text(said(search(dict.fromkeys(("kv", "kv:budget=50%", "larosa"), (1.3, 0.01)), bench=Bench)))
    assert "note: kv, kv:budget=50% could not be tried: there is no file kv" in text
    assert "note: larosa could not be tried: there is no file la" in text
    assert "the only candidate does not gain" in said(search({"larosa": (1.3, 0.01)}, bench=Bench)).sentence


def test_each_file_has_a_place_of_its_own(tmp_path):
    "No file takes the place of the prompts, or of the other one; that is said before a model is loaded"
    prompts = tmp_path / "mine.jsonl"
    prompts.write_text('{"text": "What is rain?"}\n' * 4)
    files = dict(output=tmp_path / "a.json", recipe=tmp_path / "r.json")
    for wrong in (dict(output=prompts), dict(recipe=str(prompts)), dict(recipe=files["output"])):
        with pytest.raises(ConfigError, match="would hold .* a file of its own"):
            advise("nowhere", prompts, **(files | wrong))
    assert [p.name for p in tmp_path.iterdir()] == ["mine.jsonl"]


def test_no_bar_before_an_error(tmp_path, capsys):
    "Prompts that cannot be used are found before the bar is drawn"
    with pytest.raises(ConfigError, match="0 can be used"):
        advise(tiny(), [" "] * 4, output=None, recipe=None, methods=["kv"], alternatives=())
    assert "|" not in capsys.readouterr().err


def test_prompts_that_do_not_fit():
    "Prompts longer than the context are left out and named; with too few others there is a reason"

    class Bench(RecordedBench):
        def misfit(self, query):
            return "the prompt has 9,000 tokens" if query in self.long else None

    Bench.long = ["q1", "q2"]
    advice = said(search({"larosa": (1.3, 0.01)}, bench=Bench))
    assert set(advice.skipped) == {"q1", "q2"} and not {"q1", "q2"} & {*advice.search, *advice.confirm}
    assert "note: prompt q1 was left out" in advice_text(advice)
    Bench.long = [f"q{i}" for i in range(17)]
    with pytest.raises(ConfigError, match="4 prompts are needed, and 3 can be used.*9,000 tokens"):
        search({"larosa": (1.3, 0.01)}, bench=Bench)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(queries=["one"]), "4 prompts or more are needed, and there are 1"),
        (dict(goal="speed"), "no goal 'speed'; known: ttft"),
        (dict(floor="kl=-1"), "cannot be"),
        (dict(floor=None), "cannot read the floor"),
        (dict(minutes=0), "minutes"),
        (dict(minutes="ten"), "minutes"),
        (dict(minutes=math.nan), "minutes"),
        (dict(methods=[]), "nothing to try"),
        (dict(methods=["baseline"]), "nothing to try"),
        (dict(methods=["words:rate=2"]), "rate"),
        (dict(max_new_tokens=1), "max_new_tokens"),
        (dict(alternatives=["plain:magic"]), "unknown alternative"),
        (dict(output="no/such/folder/a.json"), "no folder"),
    ],
)
def test_what_cannot_be_asked(wrong, words):
    "Is refused in one line, before anything is measured or written"
    asked = dict(queries=["a", "b", "c", "d"], output=None, recipe=None, progress=False) | wrong
    with pytest.raises((ConfigError, ResultsError), match=words) as e:
        advise(tiny(), **asked)
    assert "\n" not in str(e.value)


def test_what_gains_and_loses_a_little_too_much_is_outside():
    "Its gain is sure: it is not called unsure."
    found = search({"words:rate=0.5": (1.5, 0.055), "larosa": (1.2, 0.02)}, "kl=0.05")
    lost = found.trials["words:rate=0.5"]
    assert lost.state == "outside" and "kl" in lost.reason and lost.gain().low > 1.03


def test_files(tmp_path):
    "Both files can be read again, and earlier ones are kept"
    out, recipe = tmp_path / "advice.json", tmp_path / "my recipe.json"
    recipe.write_text("mine")
    asked = dict(queries=["a b", "c d", "e f", "g h"], goal="ttft", methods=["larosa"], alternatives=(), progress=False)
    advice = advise(tiny(), max_new_tokens=2, output=out, recipe=recipe, **asked)
    assert read_advice(out).sentence == advice.sentence
    assert read_recipe(recipe)[:2] == ("baseline", tiny().name)
    assert (tmp_path / "my recipe.1.json").read_text() == "mine"


def test_a_damaged_recording(tmp_path):
    "Is refused in one line"
    path = tmp_path / "r.json"
    path.write_text('{"queries": 3}')
    with pytest.raises(ResultsError, match="no recording"):
        read_recording(path)
    with pytest.raises(ResultsError, match="no advice of llmopt"):
        read_advice(path)
