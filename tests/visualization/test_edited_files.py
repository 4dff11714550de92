"Results files edited by hand or cut short: each is one line, or a chart on which no panel is silently empty."

import copy
import json
import math

import pytest

from llmopt.errors import ResultsError
from llmopt.evaluation.results import load
from llmopt.visualization.charts import plot
from llmopt.visualization.view import NUMBERS
from visualization.drawn import panels, silent
from visualization.made_up import made_up

SAMPLE = json.loads(made_up(["baseline", "word_removal", "larosa"]).model_dump_json())
MEASURED = [*NUMBERS, "itl_ms"]


def kept(keep):
    "A change that keeps the rows for which `keep` is true."
    return lambda d: d.update(runs=[r for r in d["runs"] if keep(r)])


def each(change):
    "A change of every row."
    return lambda d: [change(r) for r in d["runs"]]


def fail(which, error="OutOfMemory: it broke"):
    "A change that turns rows into failures."
    nothing = dict.fromkeys([*MEASURED, "prompt_text", "output_text"]) | dict(error=error)
    return each(lambda r: r.update(nothing) if which(r) else None)


def texts(read, said, words=()):
    "A change of what was read, said and asked."

    def change(d):
        for r in d["runs"]:
            r.update(prompt_text=read, output_text=said)
        for q in d["queries"]:
            q.update(text=read or "", keywords=[*words])

    return change


def renamed(**names):
    "A change of names of methods, wherever they stand."

    def change(d):
        text = json.dumps(d)
        for old, new in names.items():
            text = text.replace(json.dumps(old), json.dumps(new))
        return json.loads(text)

    return change


def whole(results):
    "A change to other results."
    return lambda d: json.loads(results.model_dump_json())


NUMBERS_EDITED = {
    "every metric null": each(lambda r: r.update(dict.fromkeys(MEASURED))),
    "some metrics null": each(lambda r: r.update(kl_mean=None, ttft_ms=None, kv_bytes_peak=None)),
    "one row of speed": lambda d: d.update(runs=d["runs"][:1]),
    "one row of quality": lambda d: d.update(runs=[r for r in d["runs"] if r["arm"] == "quality"][-1:]),
    "not finite": each(lambda r: r.update(ttft_ms=math.inf, kl_mean=math.nan, itl_ms=[math.inf] * 3)),
    "sizes that cannot be": each(
        lambda r: r.update(itl_ms=[], kv_bytes_reserved=2**62, peak_rss_delta_bytes=r["peak_rss_bytes"] and 2**40)
    ),
    "no queries, no methods": lambda d: d.update(queries=[], methods=[], config={}, environment={}, definitions={}),
    "40 methods": whole(made_up(["baseline", *(f"words:n={n}" for n in range(2, 41))], queries=1, rounds=1)),
    "metrics in another arm": lambda d: [m.update(arm="memory") for m in d["definitions"].values()],
    "one round failed": fail(lambda r: r["round"] == 1),
    "the baseline failed": fail(lambda r: r["method"] == "baseline", "out\nof memory " * 200),
    "everything failed": fail(lambda r: True),
    "rounds far apart": each(lambda r: r.update(round=r["round"] * 2**61)),
    "odd ratios": lambda d: [s.update(ratio=1e-300, ratio_low=2.0, ratio_high=1e300) for s in d["summary"]],
    "a floor upside down": lambda d: [f.update(low=1.2, high=0.8) for f in d["noise_floor"].values()],
    "a wrong type": lambda d: d["runs"][0].update(ttft_ms="fast"),
    "an unknown column": lambda d: d["runs"][0].update(joules=3),
}
TEXTS_EDITED = {
    "names of 300 letters": renamed(larosa="l" * 300, word_removal="word_removal" * 25),
    "names that are none": renamed(larosa="", word_removal="\n" + "空" * 90),
    "right to left": texts("ما هو الذكاء الاصطناعي؟" * 5, "مرحبا بالعالم. שלום עולם " * 6, ["ذكاء", "שלום"]),
    "wide": texts("什么是人工智能？" * 30, "人工智能是计算机科学的一个分支。" * 12, ["人工智能"] * 30),
    "markup": texts("\ud83d x 👍🏽 \u200d\ufe0f e\u0301", "a\ud800b $x^2$ \\frac{1}{2} {unbalanced $"),
    "long texts": texts("w" * 50_000, "so it goes on and on " * 5_000),
    "empty texts": texts("", ""),
    "no texts": texts(None, None),
    "odd settings": lambda d: d.update(
        config=dict(model_id="m" * 3000, parameters=0, max_new_tokens=10**15, decoding="x\n\ny" * 50, more=[[[]]]),
        environment=dict(cpu_model="c" * 900, accelerators=["g" * 400] * 9),
    ),
    "quality failed": fail(lambda r: r["arm"] == "quality", "\x1b[31mTraceback\n" + "File\n" * 300),
}
ODD = NUMBERS_EDITED | TEXTS_EDITED


def edited(name, path):
    "The sample, with the change of that name, as a file that was read."
    content = copy.deepcopy(SAMPLE)
    changed = ODD[name](content)
    content = changed if isinstance(changed, dict) else content
    path.write_text(json.dumps(content), encoding="utf-8")
    return load(path)


@pytest.mark.parametrize("name", NUMBERS_EDITED)
def test_one_line_or_panels(name, tmp_path):
    "No traceback, no second line, no panel without a word."
    try:
        fig = panels(edited(name, tmp_path / "r.json"))
    except ResultsError as e:
        assert "\n" not in str(e) and len(str(e)) < 500
    else:
        assert silent(fig) == []


@pytest.mark.parametrize("name", TEXTS_EDITED)
def test_one_line_or_texts(name, tmp_path):
    "Texts, names and settings of any kind fit on a sheet, and no name is lost."
    results = edited(name, tmp_path / "r.json")
    fig = plot(results, "input_output_pairs")
    assert fig.get_figheight() < 202
    methods = {r.method for r in results.runs if r.arm == "quality"}
    assert len({line.get_marker() + str(line.get_color()) for ax in fig.axes for line in ax.lines}) > len(methods)


def test_what_is_refused(tmp_path):
    "Of all these files only those that say nothing, or are no results."
    refused = set()
    for name in ODD:
        try:
            edited(name, tmp_path / "r.json")
        except ResultsError:
            refused.add(name)
    assert refused == {"a wrong type", "an unknown column"}
