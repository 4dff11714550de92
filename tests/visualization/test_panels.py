"What the panels draw, and what they say where there is nothing to draw."

import numpy as np

from llmopt.evaluation.results import Results, Run
from llmopt.visualization.bars import kept_tokens, kv_bars, phase_bars, rss_bars
from llmopt.visualization.curves import gap_lines
from llmopt.visualization.lanes import lanes
from llmopt.visualization.style import Chart, number
from llmopt.visualization.view import View
from visualization.drawn import draw
from visualization.made_up import made_up


def test_lanes():
    "The median and the quartiles that are drawn are those of the rows; a lane without rows says why."
    v = View(made_up(["baseline", "fast", "gone"], fail=["gone"]))
    ax = Chart().add_subplot()
    lanes(ax, v, "ttft_ms", v.arms("speed"))
    x = v.values("ttft_ms")
    x = x[x.method == "fast"].x
    assert any(np.allclose(l.get_xdata(), x.median()) for l in ax.lines if len(l.get_xdata()) == 1)
    assert any(np.allclose(l.get_xdata(), x.quantile([0.25, 0.75])) for l in ax.lines if len(l.get_xdata()) == 2)
    says = [t.get_text() for t in ax.texts]
    assert "failed" in says and number(x.median()) in says
    ax = Chart().add_subplot()
    lanes(ax, v, "decode_char_per_s", v.arms("speed"))
    assert "not measured in this file" in [t.get_text() for t in ax.texts]


def test_tokens_and_memory():
    "A failed method says so in every panel, and so does a file without the metric."
    v = View(made_up(["baseline", "gone"], queries=3, fail=["gone"]))
    for f in (kept_tokens, kv_bars, rss_bars, phase_bars):
        ax = Chart().add_subplot()
        f(ax, v, v.arms("quality"))
        assert "failed" in [t.get_text() for t in ax.texts], f
        ax = Chart().add_subplot()
        f(ax, View(Results(runs=[Run(arm="quality", query="q", method="m", kl_mean=0)])), ["m"])
        assert "not measured in this file" in [t.get_text() for t in ax.texts], f


def test_the_key_stands_above_the_bars():
    "However tall the panel of many methods is."
    v = View(made_up(["baseline", *(f"m{i}" for i in range(30))], queries=1, rounds=1))
    fig = Chart(figsize=(4, 12))
    ax = fig.add_subplot()
    phase_bars(ax, v, v.methods)
    draw(fig)
    assert ax.get_legend().get_window_extent().y0 >= ax.get_window_extent().y1


def test_an_axis_holds_the_methods_that_are_drawn():
    "A slow method that was left out leaves no empty space."
    v = View(made_up(["baseline", *(f"m{i}" for i in range(30))], queries=1, rounds=1))
    ends = []
    for methods in (["baseline"], v.methods):
        ax = Chart().add_subplot()
        gap_lines(ax, v, methods)
        ends.append(ax.get_ylim())
    assert ends[0][0] > 2 * ends[1][0] and ends[0][1] <= ends[1][1]
