"""`llmopt benchmark compare`: what moved between two files, and files that cannot be compared."""

import copy
import json

import pytest

from helpers import DATA
from llmopt.benchmark.regressions import compare_files, report, suite_measures
from llmopt.cli.entry import main
from llmopt.errors import ResultsError

ENGINE, RESULTS = DATA / "benchmark_engine.json", DATA / "sample_multi_query_results.json"


def written(tmp_path, content, name="new.json"):
    "A file with `content` as JSON."
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def engine():
    "The stored engine benchmark."
    return json.loads(ENGINE.read_text(encoding="utf-8"))


def times_worse(content, factor):
    "`content` with the times per token of one variant multiplied."
    for row in content["tables"]["times"]:
        if row["variant"] == "larosa" and row["model"] == "llmopt-tiny":
            row.update({k: row[k] * factor for k in ("tpot_ratio", "tpot_q1", "tpot_q3")})
    return content


def test_a_ratio_that_got_worse_is_named_and_the_exit_code_is_1(tmp_path, capsys):
    """Half as slow again is beyond any interval of sixty rounds."""
    new = written(tmp_path, times_worse(engine(), 1.5))
    found = compare_files(ENGINE, new)
    assert [c.what for c in found.worse] == ["llmopt-tiny larosa, tpot"]
    assert main(["benchmark", "compare", str(ENGINE), str(new)]) == 1
    assert "llmopt-tiny larosa, tpot" in (said := capsys.readouterr().out) and "1 worse" in said
    assert main(["benchmark", "compare", str(new), str(ENGINE)]) == 0
    assert "0 worse, 1 better" in capsys.readouterr().out


def test_a_ratio_within_its_interval_has_not_moved(tmp_path):
    """A thousandth is less than the interval."""
    found = compare_files(ENGINE, written(tmp_path, times_worse(engine(), 1.001)))
    assert not found.worse and {c.verdict for c in found.changes} == {"same"}


def test_a_target_that_was_met_and_is_missed_is_a_regression(tmp_path):
    """Suites whose numbers have no interval are judged by their own targets."""
    new = engine()
    row = next(r for r in new["tables"]["targets"] if r["met"])
    row["met"] = False
    assert [c.what for c in compare_files(ENGINE, written(tmp_path, new)).worse] == [f"target: {row['what']}"]


def test_results_of_compare_are_compared_by_ratio_and_by_quality(tmp_path):
    """A method that became slower, and one whose predictions moved further away."""
    new = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert not compare_files(RESULTS, RESULTS).worse
    slower = next(s for s in new["summary"] if s["metric"] == "tpot_ms" and s.get("ratio_low"))
    slower.update({k: slower[k] * 3 for k in ("ratio", "ratio_low", "ratio_high")})
    for row in new["runs"]:
        if row["arm"] == "quality" and row["method"] == "word_removal" and row.get("kl_mean") is not None:
            row["kl_mean"] += 0.5
    worse = [c.what for c in compare_files(RESULTS, written(tmp_path, new)).worse]
    assert worse == [f"{slower['method']}, tpot_ms", "word_removal, kl_mean +-"]


def test_few_queries_and_the_second_baseline_decide_nothing(tmp_path):
    """A bootstrap over two queries has no interval to speak of, and two equal baselines differ by noise."""
    new = json.loads(RESULTS.read_text(encoding="utf-8"))
    for s in new["summary"]:
        if s.get("ratio_low"):
            s.update({k: s[k] * 3 for k in ("ratio", "ratio_low", "ratio_high")}, n_queries=2, n_rounds=9)
    found = compare_files(RESULTS, written(tmp_path, new))
    assert not found.worse and not [c for c in found.changes if "baseline*" in c.what]
    assert "unknown" in {c.verdict for c in found.changes}


def test_other_questions_are_told(tmp_path):
    """Ratios of other prompts may differ with nothing changed."""
    new = json.loads(RESULTS.read_text(encoding="utf-8"))
    new["queries"][0]["text"] = "What is snow?"
    assert "they asked different questions" in compare_files(RESULTS, written(tmp_path, new)).notes
    assert "they asked different questions" not in compare_files(RESULTS, RESULTS).notes


def test_rounding_is_no_loss_of_quality(tmp_path):
    """The same sign in every query, and less than a thousandth: another build of torch does that."""
    new = json.loads(RESULTS.read_text(encoding="utf-8"))
    for row in new["runs"]:
        if row["arm"] == "quality" and row.get("kl_mean") is not None:
            row["kl_mean"] += 1e-4
    assert not compare_files(RESULTS, written(tmp_path, new)).worse


@pytest.mark.parametrize(
    "content, says",
    [
        ("{", "truncated or not JSON"),
        ("[]", "is no file of llmopt benchmark"),
        ("3", "is no file of llmopt benchmark"),
        ({"tables": {}}, "is no file of llmopt benchmark"),
        ({"benchmark": "words", "tables": {}}, "is of benchmark engine, and"),
        ({"benchmark": "engine", "tables": {}}, "no measure in common"),
        ({"benchmark": "engine", "tables": {"times": 3, "targets": [3, None]}}, "no measure in common"),
        ({"schema_version": 99}, "schema version 99"),
    ],
)
def test_files_that_cannot_be_compared_say_why_in_a_line(tmp_path, content, says):
    """Truncated, of something else, of another suite, empty, hand-edited, of a later llmopt."""
    with pytest.raises(ResultsError, match=says) as e:
        compare_files(ENGINE, written(tmp_path, content))
    assert "\n" not in str(e.value)


def test_files_of_two_models_are_refused_and_other_settings_are_told(tmp_path):
    """A ratio of another model is another ratio; a ratio of a quick run is a less certain one."""
    other = engine() | dict(config=dict(model="smollm2", texts=None, quick="False"))
    with pytest.raises(ResultsError, match="is of the model llmopt-tiny, and .* of smollm2"):
        compare_files(ENGINE, written(tmp_path, other))
    quick = engine() | dict(created="2020-01-01T00:00:00+00:00")
    quick["config"] = quick["config"] | dict(quick="True")
    quick["environment"] = quick["environment"] | dict(torch="3.0")
    said = report(compare_files(ENGINE, written(tmp_path, quick)))
    assert "quick False -> True" in said and "-> 3.0" in said and "older than the first" in said


def test_rows_that_are_missing_broken_or_not_numbers_decide_nothing(tmp_path):
    """NaN, texts, truth values and rows without rounds have no interval, so they are left out."""
    content = engine()
    base = copy.deepcopy(content["tables"]["times"][2])
    for i, bad in enumerate((float("nan"), "fast", True, None)):
        content["tables"]["times"].append(base | dict(variant=f"odd{i}", tpot_ratio=bad, ttft_ratio=bad))
    content["tables"]["times"] += [base | dict(variant="never", rounds=0), base | dict(variant="twice", rounds=2)]
    assert not [k for k in suite_measures(content) if "odd" in k or "never" in k]
    path = written(tmp_path, json.dumps(content))
    found = compare_files(path, path)
    assert {c.verdict for c in found.changes if "twice" in c.what} == {"unknown"} and not found.worse


def test_two_rows_of_one_name_are_two_measures(tmp_path):
    """A suite may hold one thing to two limits, or measure it on two halves: none of them hides the other."""
    old, what = engine(), "faster"
    old["tables"]["targets"] = [dict(what=what, met=True), dict(what=what, met=True)]
    new = copy.deepcopy(old)
    new["tables"]["targets"][0]["met"] = False
    found = compare_files(written(tmp_path, old, "old.json"), written(tmp_path, new))
    assert [c.what for c in found.worse] == ["target: faster"]
    assert "target: faster (2)" in [c.what for c in found.changes]


def test_an_interval_may_stand_under_the_name_of_its_column():
    """`kl_low` and `kl_high` where a row has several intervals."""
    row = dict(scorer="idf", rate=0.5, kl=1.0, kl_low=0.9, kl_high=1.2, low=5, high=6)
    (measure,) = suite_measures(dict(benchmark="words", tables=dict(answers=[row]))).values()
    assert measure[:3] == (1.0, 0.9, 1.2)


def test_measures_of_one_file_only_are_told(tmp_path):
    """A method that was left out must not look as if it had not changed."""
    new = engine()
    new["tables"]["times"] = [r for r in new["tables"]["times"] if r["variant"] != "larosa"]
    notes = compare_files(ENGINE, written(tmp_path, new)).notes
    assert any("new.json" in n and "larosa" in n for n in notes)


@pytest.mark.parametrize("given", [[], ["a.json"], ["a.json", "b.json", "c.json"], ["no.json", "no.json"]])
def test_the_command_needs_two_files_that_are_there(given, capsys):
    """Anything else is one line, and exit code 2 or 1."""
    assert main(["benchmark", "compare", *given]) in (1, 2)
    assert capsys.readouterr().err.count("\n") == 1


def test_the_command_refuses_options_of_measuring(capsys):
    """Nothing is measured, so `--quick` would be a misunderstanding."""
    assert main(["benchmark", "compare", str(ENGINE), str(ENGINE), "--quick"]) in (1, 2)
    assert "leave out --texts, --model, --quick" in capsys.readouterr().err
