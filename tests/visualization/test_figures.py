"Figures of one panel, and the two overviews: what they return, what they show, what they say where nothing is there."

import math

import pytest

from llmopt.errors import ResultsError
from llmopt.evaluation.results import Effect, Method, Results, Run
from llmopt.visualization import column
from llmopt.visualization.charts import KINDS, plot, plot_file
from llmopt.visualization.interactions import Gain, _shade
from llmopt.visualization.overviews import all_methods, comprehensive_comparison
from llmopt.visualization.style import COLUMN, Chart
from llmopt.visualization.texts import answer_differences, fused
from llmopt.visualization.view import View
from visualization.drawn import collisions, draw, says, silent, texts_drawn
from visualization.made_up import made_up

FIGURES = [k for k, (f, _) in KINDS.items() if f.__module__ == column.__name__]
LONG = ["baseline", "words:n=2+vocab+larosa:sparsity=0.4,budget=0.5", "m$1$_2^{3", "空" * 40, "gone", "larosa", "kv"]


@pytest.fixture(scope="module")
def odd():
    "Long names, a method that failed, and a pair with an effect."
    res = made_up(LONG, queries=3, rounds=2, fail=["gone"])
    found = [(["larosa"], -0.2), (["kv"], -0.1), (["kv", "larosa"], 0.1)]
    found = [
        Effect(factors=f, metric="e2el_ms", log_ratio=x, low=x - 0.02 * len(f), high=x + 0.02 * len(f))
        for f, x in found
    ]
    return res.model_copy(update=dict(effects=found))


@pytest.mark.parametrize("name", FIGURES)
def test_a_column_holds_what_is_drawn_in_it(name, odd):
    "No text covers another or leaves the column, whatever the names are; without notes only the panel is left."
    fig = plot(odd, name)
    with texts_drawn() as drawn:
        draw(fig)
    assert collisions(drawn) == [] and silent(fig) == []
    assert fig.get_figwidth() == COLUMN
    bare = getattr(column, name)(odd, notes=False)
    assert bare.get_figheight() < fig.get_figheight()


@pytest.mark.parametrize("name", FIGURES)
def test_axes_of_ones_own(name, odd):
    "Given axes are drawn in, and their figure is returned; nothing else on it changes."
    page = Chart(figsize=(6, 3))
    ax = page.add_subplot()
    assert getattr(column, name)(View(odd), ax=ax) is page
    assert page.texts == [] and page.get_figwidth() == 6
    assert ax.lines or ax.patches or ax.collections


def test_a_pair_is_shown_beside_its_product(odd):
    "Speed-ups of the two alone, of the pair beside the product, and what was measured."
    said = " ".join(says(plot(odd, "interaction_map")))
    both, product = math.exp(0.2), math.exp(0.3)
    for text in (f"×{math.exp(0.2):.2f}", f"×{math.exp(-0.1):.2f}", f"{both:.2f} of {product:.2f}"):
        assert text in said
    assert "no pair was measured" not in said


def test_nothing_that_can_be_drawn():
    with pytest.raises(ResultsError, match="no measurement succeeded"):
        column.paired_dots(Results())


def test_one_method_alone():
    "There is nothing to compare: the pictures say so, or show the one there is."
    v = View(made_up(["baseline"]))
    v = View(v.results.model_copy(update=dict(runs=[r for r in v.results.runs if r.method == "baseline"])))
    assert fused(v) is None
    for draw_it, word in ((comprehensive_comparison, "no method beside"), (answer_differences, "no method beside")):
        assert any(word in s for s in says(draw_it(v)))
    assert "baseline" in says(all_methods(v))


def test_no_baseline():
    "What is beside nothing is shown alone."
    res = made_up(["m"])
    v = View(res.model_copy(update=dict(runs=[r for r in res.runs if r.method == "m"])))
    assert all("m" in says(draw_it(v)) for draw_it in (comprehensive_comparison, answer_differences, all_methods))


def test_a_table_is_coloured_beyond_noise_only():
    "A time within noise is white, a better one blue; a method that failed says so."
    res = made_up(["baseline", "fast", "gone"], fail=["gone"])
    res.summary = [
        s.model_copy(update=dict(verdict="within noise")) if s.metric == "ttft_ms" else s for s in res.summary
    ]
    fig = all_methods(View(res))
    cells = [p for ax in fig.axes for p in ax.patches if p.get_y() > 0.4]
    ttft, total = (next(c for c in cells if round(c.get_x() - 0.02) == j) for j in (0, 2))
    assert min(ttft.get_facecolor()[:3]) > 0.98 > total.get_facecolor()[0]
    assert "failed" in says(fig)


def test_the_whole_stack_is_the_one_with_most_switched_on():
    res = made_up(["baseline", "a", "b+c"])
    res.methods = [Method(id="baseline"), Method(id="a", factors=dict(x=1, y=1)), Method(id="b+c", factors=dict(x=1))]
    assert fused(View(res)) == "a" and fused(View(res), "b+c") == "b+c" and fused(View(res), "none") is None


def test_of_two_equal_stacks_the_one_that_changed_an_answer_is_shown():
    "A picture of two answers that are word for word the same would show nothing."
    rows = [Run(arm="quality", query="q", method=m, output_text=m[0]) for m in ("baseline", "words", "bkv")]
    assert fused(View(Results(runs=rows, methods=[Method(id=r.method) for r in rows]))) == "words"


def test_a_gain_that_is_unsure_is_paler_than_a_sure_one():
    "The colour of a pair is as strong as what is known of it."
    assert 0 < _shade(Gain(3.0, 0.5, 19.0, False)) < _shade(Gain(1.3, 1.2, 1.4, True)) < 0.3


def test_answers_are_marked_where_they_differ():
    rows = [
        Run(arm="quality", query="q", method=m, output_text=t, kl_mean=0.0)
        for m, t in (("baseline", "the sky is blue today"), ("kv", "the sky is green today"))
    ]
    said = says(answer_differences(View(Results(runs=rows))))
    assert "they differ from word 4 on; 4 of 5 words and marks are equal" in said
    assert any("blue" in s for s in said) and any("green" in s for s in said)
    rows[1].output_text, rows[1].error = None, "it broke"
    assert any("kv failed: it broke" in s for s in says(answer_differences(View(Results(runs=rows)))))


def test_svg(tmp_path):
    "Both formats of one drawing, with text outlines, the same twice; others are refused before anything is made."
    odd = made_up(["baseline", "--><script>alert(1)</script>"])
    path = tmp_path / "r.json"
    path.write_text(odd.model_dump_json())
    png, svg = plot_file(path, tmp_path, ["paired_dots"], formats=["png", "svg"])
    text = svg.read_text(encoding="utf-8")
    assert (png.suffix, svg.suffix) == (".png", ".svg") and text.lstrip().startswith("<?xml") and "<script" not in text
    assert plot_file(path, tmp_path / "b", "paired_dots", formats="svg")[0].read_text(encoding="utf-8") == text
    with pytest.raises(ResultsError, match="unknown format 'pdf'; known: png, svg"):
        plot_file(path, tmp_path / "c", formats="pdf")
    assert not (tmp_path / "c").exists()
