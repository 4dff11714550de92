"Results that nobody measured, as a hand-edited file may hold them: a chart, or one line, never a traceback."

import json
from unittest import mock

import pytest

from llmopt.evaluation.results import Floor, Query, Results, Run, Summary
from llmopt.visualization.charts import plot
from llmopt.visualization.style import Chart, looks
from llmopt.visualization.text_diff import (
    _longest,  # private: what is counted is how often it is called
    columns,
    common,
    flow,
)
from llmopt.visualization.view import NUMBERS, View
from visualization.drawn import draw, panels, says, silent, texts_drawn
from visualization.made_up import made_up

COUNTS = [k for k in NUMBERS if Run.model_fields[k].annotation == Run.model_fields["prompt_tokens"].annotation]


def rows(value, methods=("baseline", "fast"), **more):
    "A row an arm and method in which every metric is `value`, with made-up texts"
    whole = min(int(value), 2**63 - 1) if value >= 0 else 0
    numbers = dict.fromkeys(NUMBERS, value) | dict.fromkeys(COUNTS, whole) | dict(exact_match=1)
    return [
        Run(arm=arm, query="q", method=m, itl_ms=[value] * 3, **numbers, **more)
        for arm in ("speed", "quality", "memory")
        for m in methods
    ]


@pytest.mark.parametrize("value", [0.0, -3.0, 5e-324, 9e18, 1.7e308])
def test_every_number_the_same(value):
    "Zeros, negative, tiny and absurdly large numbers are drawn, or left out and counted."
    res = Results(runs=rows(value))
    fig = panels(res)
    draw(fig)
    assert silent(fig) == []
    assert any("beyond 1e30" in s for s in View(res).remarks()) == (value > 1e30)


def test_extreme_intervals():
    "Ratios and floors at the ends of what a number can be stay on the axis."
    floor = dict(e2el_ms=Floor(median=1, low=5e-324, high=1.7e308))
    summary = [Summary(method="fast", metric="e2el_ms", median=1, ratio=5e-324, ratio_low=5e-324, ratio_high=1.7e308)]
    fig = panels(Results(runs=rows(5.0), noise_floor=floor, summary=summary))
    draw(fig)
    assert any("e-324" in text for text in says(fig))


def test_rows_that_stand_twice():
    "A block that was pasted twice has one ratio: that of its medians."
    res = made_up(queries=2, rounds=1)
    twice = res.model_copy(update=dict(runs=res.runs * 2))
    assert View(twice).blocks("e2el_ms", "fast").equals(View(res).blocks("e2el_ms", "fast"))


def test_definitions_that_were_taken_out():
    "A file without definitions is drawn with ours."
    res = made_up().model_copy(update=dict(definitions={}))
    said = says(panels(res))
    assert "KL divergence" in said and any("lower is better" in s for s in said)


def test_a_look_does_not_depend_on_the_others():
    "Two files with one method in common show it alike."
    a, b = View(made_up(["baseline", "words:n=2", "mine"])), View(made_up(["mine", "larosa", "x", "words:n=2"]))
    assert {m: a.look[m] for m in ("mine", "words:n=2")} == {m: b.look[m] for m in ("mine", "words:n=2")}
    assert len(set(looks([f"method {i}" for i in range(40)]).values())) == 40


def test_longer_is_not_better():
    "What only says that an answer was longer has no better direction."
    said = says(plot(made_up(queries=1, rounds=1, kind="ask"), "token_metrics"))
    assert "characters per token of the answer" in said
    assert not any("higher is better" in s for s in said)


def test_a_very_tall_sheet_can_be_written():
    "An image has at most 65,536 rows."
    fig = Chart(figsize=(1, 900))
    fig.text(0, 0.5, "here")
    assert fig.png().startswith(b"\x89PNG")


def test_long_texts_are_compared_in_windows():
    "Twice the text is twice the windows, not four times the table."
    counts = []
    for n in (6_000, 12_000):
        with mock.patch("llmopt.visualization.text_diff._longest", side_effect=_longest) as called:
            pairs = common(list(range(n)), list(range(0, n, 2)), window=200)
        assert len(pairs) == n // 2
        counts.append(called.call_count)
    assert counts[1] <= 2.3 * counts[0]


def test_what_is_left_out_is_counted():
    "Also where characters take no room, and no more than what can be shown is looked at."
    parts = [("e" + "\u0301" * 99, "same")] * 500
    with mock.patch("llmopt.visualization.text_diff.columns", side_effect=columns) as called:
        lines = flow(parts, 10, 3)
    shown = sum(len(text) for line in lines[:-1] for _, text, _ in line)
    assert lines[-1] == [[0, f"… {50_000 - shown:,} more characters", "cut"]]
    assert called.call_count < 100


@pytest.mark.parametrize("chart", ["input_output_pairs", "performance_dashboard"])
def test_odd_words(chart):
    "Names, labels, warnings and texts may be of any length and script."
    wide = ["W" * 400, "空" * 90, "", "a b\n\tc", "\u202eright to left", "é" * 60]
    res = made_up(["baseline", *wide], queries=2, rounds=1)
    raw = json.loads(res.model_dump_json())
    raw["definitions"]["kl_mean"]["label"] = "K" * 500
    raw |= dict(warnings=["W" * 5000] * 3 + ["x"] * 500, queries=[dict(id="q1", text="空" * 900, keywords=wide)])
    fig = plot(Results.model_validate(raw), chart)
    assert fig.get_figheight() < 60
    with texts_drawn() as drawn:
        draw(fig)
    outside = [text[:80] for text, box, (w, h) in drawn.values() if box[0] < -0.1 or box[2] > w + 0.1]
    assert len(drawn) > 20 and outside == []


def test_one_query_nobody_asked():
    "Queries without rows, and rows of a query that the file does not list, are drawn."
    res = Results(runs=rows(3.0, output_text="so", prompt_text="what"), queries=[Query(id="other", text="?")])
    said = " ".join(says(plot(res, "input_output_pairs")))
    assert "other" in said and "what" in said
