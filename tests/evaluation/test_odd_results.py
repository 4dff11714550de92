"Results that were edited by hand, come from elsewhere, or hold numbers that are none."

import json
import math

import pytest

from helpers import DATA
from llmopt.errors import ResultsError
from llmopt.evaluation.ceilings import add_ceilings
from llmopt.evaluation.results import DEFINITIONS, Method, Probe, Results, Run, load, save
from llmopt.evaluation.statistics import summarize
from llmopt.evaluation.tables import summary_text


@pytest.fixture
def edited(tmp_path):
    "A function that writes a small results file, changed by a function of its content, and reads it."

    def edit(change):
        path = tmp_path / "r.json"
        rows = [
            Run(arm="speed", query=f"q{q}", method=m, e2el_ms=10.0 + q) for q in range(3) for m in ("baseline", "a")
        ]
        save(summarize(Results(runs=rows, methods=[Method(id="a")])), path)
        content = json.loads(path.read_text())
        path.write_text(json.dumps(change(content) or content))
        return load(path)

    return edit


ODD = {
    "environment": [
        lambda d: d.update(environment="a laptop"),
        lambda d: d.update(environment=dict(ram_bytes="much")),
        lambda d: d.update(environment=dict(torch_num_threads=-1)),
        lambda d: d.update(environment=dict(accelerators="none")),
    ],
    "config": [lambda d: d.update(config=dict(parameters=[1])), lambda d: d.update(config=dict(methods=3))],
    "noise_floor": [
        lambda d: d.update(noise_floor=dict(e2el_ms=dict(median=0, low=0, high=0))),
        lambda d: d.update(noise_floor=dict(e2el_ms=dict(median=1, low=1, high=math.inf))),
    ],
    "summary": [
        lambda d: d["summary"][0].update(median=math.nan),
        lambda d: d["summary"][0].update(ratio=0),
        lambda d: d["summary"][0].update(median=None),
    ],
    "runs": [
        lambda d: d["runs"][0].update(prompt_tokens=10**30),
        lambda d: d["runs"][0].update(round=-1),
        lambda d: d["runs"][0].update(ttft_ms="fast"),
        lambda d: d["runs"][0].update(speed_ms=1),
        lambda d: d["runs"].append(None),
        lambda d: d.update(runs={}),
    ],
    "methods": [lambda d: d.update(methods=[dict(id="a", params=dict(words=3))])],
    "kind": [lambda d: d.update(kind="guess")],
    "version": [lambda d: d.update(schema_version=3), lambda d: d.update(schema_version=[[1]])],
}


@pytest.mark.parametrize("place, n", [(k, i) for k, v in ODD.items() for i in range(len(v))])
def test_what_does_not_fit_is_one_line(edited, place, n):
    "Each names the place."
    with pytest.raises(ResultsError, match=place) as e:
        edited(ODD[place][n])
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("value, says", [(math.inf, "infinite"), (-math.inf, "infinite"), (math.nan, "not a number")])
@pytest.mark.parametrize("metric", ["ttft_ms", "kl_mean", "prompt_tokens", "itl_ms"])
def test_numbers_that_are_none_are_null_with_a_reason(edited, metric, value, says):
    "In a file, and in a row that is made; the table says so, and what was saved can be read."
    value = [1.0, value] if metric == "itl_ms" else value
    results = edited(lambda d: d["runs"][0].update({metric: value}))
    run = results.runs[0]
    assert getattr(run, metric) is None and run.note == f"{metric} is {says}"
    assert Run(arm="speed", query="q", method="m", **{metric: value}).note == run.note
    assert f"{metric} is null in 1 row of baseline: it is {says}" in summarize(results).warnings
    assert f"note: {metric} is null" in summary_text(results)


def test_a_saved_infinity_can_be_read(tmp_path):
    "The file is JSON that every reader takes."
    run = Run(arm="quality", query="q", method="m", kl_mean=math.inf, top1_agree=1.0)
    text = save(Results(runs=[run]), tmp_path / "r.json").read_text()
    assert "Infinity" not in text and load(tmp_path / "r.json").runs == [run]


def test_deep_parameters_are_one_line(tmp_path):
    "Nested so deep that they can be read and not written."
    deep = {}
    for _ in range(5000):
        deep = dict(a=deep)
    with pytest.raises(ResultsError, match="cannot write"):
        save(Results(methods=[Method(id="m", params=dict(words=deep))]), tmp_path / "r.json")
    assert not (tmp_path / "r.json").exists()


def test_files_of_version_1_are_read(tmp_path):
    "Rows without notes, definitions without names and labels; a definition that we do not know stays."
    old = json.loads((DATA / "sample_multi_query_results.json").read_text()) | dict(schema_version=1)
    for name, d in old["definitions"].items():
        old["definitions"][name] = {k: v for k, v in d.items() if k in ("formula", "unit", "better", "arm")}
    old["definitions"]["energy_wh"] = dict(formula="joules/3600", unit="Wh")
    (tmp_path / "r.json").write_text(json.dumps(old))
    results = load(tmp_path / "r.json")
    assert results.schema_version == 2 and results.definitions["ttft_ms"].label == DEFINITIONS["ttft_ms"].label
    assert results.definitions["energy_wh"].unit == "Wh"
    assert load(save(results, tmp_path / "new.json")) == results


def test_metrics_are_defined_once():
    "A name is its key; every metric has words for a chart; a ratio is worth having only where one way is better."
    for name, m in DEFINITIONS.items():
        assert m.name == name and m.label and m.formula and m.unit
        assert m.better != "neither" or not m.compared
    assert len({m.label for m in DEFINITIONS.values()}) == len(DEFINITIONS)


@pytest.mark.parametrize("name", ["completion_tokens", "completion_tokens_base", "decode_char_per_s"])
def test_a_longer_answer_is_not_better(name):
    "What grows with the text of an answer, at equal tokens and times, is better in neither direction."
    assert DEFINITIONS[name].better == "neither" and not DEFINITIONS[name].compared


def test_advice_is_no_results_file(tmp_path):
    "Both have a schema version; what can show it is named."
    path = tmp_path / "advice.json"
    path.write_text(json.dumps(dict(schema_version=1, kind="advice", goal="total", floor=[], sentence="Use kv.")))
    with pytest.raises(ResultsError, match="holds advice .* llmopt report"):
        load(path)


@pytest.mark.parametrize("method", ["baseline", "a"])
def test_absurd_times_are_left_out_of_what_is_summed_up(method):
    "Numbers whose sums and ratios are infinite, as a hand-edited file may hold them, are no measurements."
    times = dict.fromkeys(("e2el_ms", "ttft_ms", "tpot_ms", "prefill_ms", "preprocess_ms"), 9.0)
    rows = [
        Run(arm="speed", query="q", method=m, round=r, completion_tokens=9, prompt_tokens=9, **times)
        for r in range(2)
        for m in ("baseline", "a")
    ]
    for row in [r for r in rows if r.method == method]:
        row.e2el_ms = row.prefill_ms = 1.7e308
    res = Results(runs=rows, methods=[Method(id="a", params=dict(cache={}))])
    res.probe = Probe(context=9, step_ms=2.0, empty_ms=1.0)
    res = add_ceilings(summarize(res))
    assert Results.model_validate_json(res.model_dump_json()) == res
    medians = {(s.method, s.metric): s.median for s in res.summary}
    assert (method, "e2el_ms") not in medians and medians[method, "tpot_ms"] == 9.0
