"Charts from results files: what is drawn of good files, odd ones and broken ones."

import itertools
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.text import Text
from PIL import Image

from llmopt.errors import ResultsError
from llmopt.evaluation.results import Method, Query, Results, Run, load, save
from llmopt.visualization.charts import KINDS, plot, plot_file
from llmopt.visualization.style import Chart

DATA = Path(__file__).resolve().parents[2] / "data"
SAMPLES = {"compare": DATA / "sample_multi_query_results.json", "ask": DATA / "sample_comprehensive_results.json"}
METHODS = [
    "baseline",
    "word_removal",
    "words:n=2+kv",
    "simple_adaptivocab",
    "larosa",
    "hybrid_kv_cache",
    "all_combined",
    "gone",
    "words:n=2+vocab+larosa:sparsity=0.4,budget=0.5",
    "m$1$_2^{3",
    "vocab+larosa",
    "kv",
]


def suits(kind):
    return {f"{k}.png" for k, (_, kinds) in KINDS.items() if kind in kinds}


def assert_drawn(path):
    "A PNG of a sensible size, with something on white in every quarter of its height"
    with Image.open(path) as im:
        a = np.asarray(im.convert("L"))
    assert a.shape[0] > 100 and a.shape[1] == 600 and path.stat().st_size > 5_000
    assert a[0, 0] == np.median(a) == 255 and all((part < 200).sum() > 50 for part in np.array_split(a, 4))


def subset(results, keep, **changes):
    "`results` with the rows that `keep` says, and changes"
    rows = [r for r in results.runs if keep(r)]
    methods = {r.method for r in rows}
    return results.model_copy(
        update=dict(
            runs=rows,
            methods=[m for m in results.methods if m.id in methods],
            summary=[s for s in results.summary if s.method in methods],
            **changes,
        )
    )


def large(queries, rounds, methods=METHODS):
    "A made-up comparison with long names, dollars in texts, missing metrics, and a method that failed: 'gone'."
    rng, runs = np.random.default_rng(0), []
    for q, m in itertools.product(range(queries), [*methods, "baseline*"]):
        row = dict(query=f"q{q}", method=m, error="RuntimeError: too $mall" if m == "gone" else None)
        for r in range(rounds):
            t = rng.normal(20, 1, 6)
            times = dict(ttft_ms=t[0], prefill_ms=t[0] - 1, preprocess_ms=1, tpot_ms=t.mean(), e2el_ms=t.sum())
            sizes = dict(prompt_tokens=9, prompt_tokens_base=12, kv_bytes_live=10**6, kv_bytes_peak=2 * 10**6)
            measured = {} if m == "gone" else dict(itl_ms=list(t[1:]), **times, **sizes)
            runs.append(Run(arm="speed", round=r, **row, **measured))
        read, said = "<|user|>\nWhy is $5 _less_ than 空の $6?\x07", f"{m} says \\frac{{1}} " + "so " * q
        answered = {} if m == "gone" else dict(prompt_text=read, output_text=said, kl_mean=rng.random())
        if m != "baseline*":
            runs.append(Run(arm="quality", **row, **answered))
    return Results(
        runs=runs,
        queries=[Query(id=f"q{q}", text=f"Why $ {q}?") for q in range(queries)],
        methods=[Method(id=m) for m in methods],
    )


@contextmanager
def texts_drawn():
    "A dict that gets what each text says that is drawn, its box and its sheet, in inches"
    drawn, draw = {}, Text.draw

    def record(text, renderer):
        draw(text, renderer)
        fig = text.get_figure(root=True)
        if text.get_visible() and text.get_text().strip():
            drawn[text] = (
                text.get_text(),
                text.get_window_extent(renderer).extents / fig.dpi,
                fig.bbox.extents[2:] / fig.dpi,
            )

    with mock.patch.object(Text, "draw", record):
        yield drawn


def says(results, chart):
    "What the texts of a chart say"
    return [t.get_text() for t in plot(results, chart).findobj(Text)]


def collisions(drawn):
    "Pairs of texts that overlap, and texts that leave the sheet, by more than a fiftieth of an inch"
    text, b, sheet = zip(*drawn.values())
    b, slack = np.array(b), 0.02
    w = np.minimum(b[:, None, 2], b[None, :, 2]) - np.maximum(b[:, None, 0], b[None, :, 0])
    h = np.minimum(b[:, None, 3], b[None, :, 3]) - np.maximum(b[:, None, 1], b[None, :, 1])
    pairs = np.argwhere(np.triu((w > slack) & (h > slack), 1))
    out = np.flatnonzero((b[:, :2] < -slack).any(1) | (b[:, 2:] > sheet[0] + slack).any(1))
    return [(text[i], text[j]) for i, j in pairs] + [(text[i], "leaves the sheet") for i in out]


@pytest.fixture(autouse=True)
def few_dots():
    "Charts are drawn with a third of the dots, which takes a fifth of the time."
    with mock.patch.object(Chart.png, "__defaults__", (50,)):
        yield


@pytest.mark.parametrize("chart", KINDS)
def test_every_chart_of_the_samples(chart, tmp_path):
    "Each chart is written where it was asked for, has something in every quarter, and no text covers another."
    with texts_drawn() as drawn:
        [path] = plot_file(SAMPLES[KINDS[chart][1][0]], tmp_path / "new" / "plots", [chart])
    assert path == tmp_path / "new" / "plots" / f"{chart}.png"
    assert_drawn(path)
    assert collisions(drawn) == []


@pytest.mark.parametrize("chart", KINDS)
def test_any_chart_of_a_large_file(chart):
    "Twelve methods with long names and dollars, one of them failed."
    with texts_drawn() as drawn:
        plot(large(2 if chart == "input_output_pairs" else 8, 1), chart).draw(RendererAgg(100, 100, 50))
    assert collisions(drawn) == []
    assert any("failed" in text for text, _, _ in drawn.values())


def test_many_answers_make_a_tall_sheet():
    "Cells get fewer lines, and what does not fit is counted"
    fig = plot(large(60, 1), "input_output_pairs")
    assert 150 < fig.get_figheight() < 202
    foot = " ".join(t.get_text() for t in fig.findobj(Text))
    assert "more queries do not fit" in foot


@pytest.mark.parametrize("kind", SAMPLES)
def test_single_method_single_round(kind, tmp_path):
    "The charts that suit a file are drawn, no others, of one method in one round too."
    res = subset(load(SAMPLES[kind]), lambda r: r.method == "baseline" and r.round == 0, noise_floor={})
    with mock.patch.object(Chart, "png", return_value=b"a picture"):
        paths = plot_file(save(res, tmp_path / "r.json"), tmp_path / "p")
    assert {p.name for p in paths} == suits(kind) == {p.name for p in (tmp_path / "p").iterdir()}
    assert {p.read_bytes() for p in paths} == {b"a picture"}
    assert any("One round" in s for s in says(res, paths[0].stem))


def test_a_file_without_a_baseline():
    "There are no ratios then, and everything else is drawn."
    res = subset(load(SAMPLES["compare"]), lambda r: not r.method.startswith("baseline"), noise_floor={})
    assert "nothing to compare with the baseline" in says(res, "performance_dashboard")
    for chart in ("input_output_pairs", "comprehensive_dashboard", "efficiency_metrics"):
        assert says(res, chart)


def test_an_interrupted_file():
    "Only the quality arm was run: the other panels say so"
    res = subset(load(SAMPLES["compare"]), lambda r: r.arm == "quality", noise_floor={})
    assert says(res, "performance_dashboard").count("not measured in this file") >= 4
    assert "not measured in this file" not in says(res, "quality_comparison")


@pytest.mark.parametrize(
    "chart", ["quality_comparison", "input_output_pairs", "performance_dashboard", "comprehensive_dashboard"]
)
def test_a_failed_method_is_named(chart):
    res = load(SAMPLES["compare"])
    m = next(r.method for r in res.runs if not r.method.startswith("baseline"))
    empty = [
        Run(arm=r.arm, query=r.query, method=r.method, round=r.round, error="it broke") if r.method == m else r
        for r in res.runs
    ]
    drawn = says(res.model_copy(update=dict(runs=empty)), chart)
    assert any("failed" in s for s in drawn) and any("it broke" in s for s in drawn)


def test_asked_by_name(tmp_path):
    "Any chart can be asked of any file, and twice is once."
    assert [p.name for p in plot_file(SAMPLES["ask"], tmp_path, "input_output_pairs")] == ["input_output_pairs.png"]
    assert [p.name for p in plot_file(SAMPLES["compare"], tmp_path, ["token_metrics", "token_metrics"])] == [
        "token_metrics.png"
    ]


def test_drawn_twice_is_the_same(tmp_path):
    "A committed figure does not change when a notebook is run again."
    a, b = (plot_file(SAMPLES["compare"], tmp_path / d, "quality_comparison")[0].read_bytes() for d in "ab")
    assert a == b


def refused(match, *args):
    with pytest.raises(ResultsError, match=match) as e:
        plot_file(*args)
    assert "\n" not in str(e.value)


def test_nothing_usable(tmp_path):
    "A file without one success is refused with its first error, and no folder is made."
    rows = [Run(arm="speed", query="q", method="baseline", error="out of memory")]
    refused("no measurement succeeded.*out of memory", save(Results(runs=rows), tmp_path / "r.json"), tmp_path / "p")
    refused("no measurement succeeded", save(Results(), tmp_path / "r.json"), tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_broken_files(tmp_path):
    "What is no results file is refused in one line, and no folder is made."
    text = SAMPLES["compare"].read_text(encoding="utf-8")
    for name, bad, says in (
        ("half", text[: len(text) // 2], "truncated"),
        ("other", '{"a": 1}', "no llmopt results"),
        ("old", re.sub('"schema_version": .', '"schema_version": 7', text, count=1), "version 7"),
        ("deep", '{"schema_version": 2, "runs": ' + "[" * 10**5, "nested|truncated"),
        ("long", '{"schema_version": 2, "runs": [' + "9" * 5000 + "]}", "integer|digits"),
        (
            "floor",
            '{"schema_version": 2, "noise_floor": {"e2el_ms": {"median": 1, "low": 0, "high": 1}}}',
            "noise_floor",
        ),
        ("machine", '{"schema_version": 2, "environment": {"cpu_model": 3}}', "environment"),
    ):
        (tmp_path / name).write_text(bad, encoding="utf-8")
        refused(says, tmp_path / name, tmp_path / "p")
    refused("no results file", tmp_path / "none.json", tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_unwritable_output(tmp_path):
    "A folder that cannot be, and a picture whose place is taken, are one line; nothing is left behind."
    (tmp_path / "file").write_text("")
    refused("cannot write", SAMPLES["ask"], tmp_path / "file")
    refused("cannot write", SAMPLES["ask"], tmp_path / "file" / "sub")
    (tmp_path / "p" / "token_metrics.png").mkdir(parents=True)
    refused("cannot write.*token_metrics", SAMPLES["ask"], tmp_path / "p", ["token_metrics"])
    assert [p.name for p in (tmp_path / "p").iterdir()] == ["token_metrics.png"]
    for output in ("a\0b", tmp_path / ("n" * 300), None, 5):
        refused("cannot write", SAMPLES["ask"], output, ["token_metrics"])


def test_a_full_disk_leaves_nothing(tmp_path):
    "Neither half a picture nor a temporary file stays, and the old picture does."
    (tmp_path / "token_metrics.png").write_text("old")
    with mock.patch("llmopt.visualization.charts.os.replace", side_effect=OSError(28, "No space left on device")):
        refused("No space left", SAMPLES["ask"], tmp_path, "token_metrics")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def test_links_are_written_through(tmp_path):
    "A link stays a link: the picture goes where it leads."
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "token_metrics.png").symlink_to(tmp_path / "kept.png")
    plot_file(SAMPLES["ask"], tmp_path / "p", "token_metrics")
    assert (tmp_path / "p" / "token_metrics.png").is_symlink() and (tmp_path / "kept.png").stat().st_size > 1000


def test_unknown_chart(tmp_path):
    "A chart that does not exist is refused before anything is made, whatever is given as its name."
    refused("unknown chart 'pie'.*quality_comparison", SAMPLES["compare"], tmp_path / "p", ["pie"])
    for odd in ([["pie"]], [None], [3], ["pie" * 999]):
        refused("unknown chart", SAMPLES["ask"], tmp_path / "p", odd)
    refused("has a path", None, tmp_path / "p")
    with pytest.raises(ResultsError, match="pie"):
        plot(load(SAMPLES["ask"]), "pie")
    assert not (tmp_path / "p").exists()


def test_no_torch_and_no_window():
    "A machine without torch draws too, and drawing opens no pyplot figure"
    code = (
        "import sys; import llmopt.visualization.charts as v; from llmopt.evaluation.results import load\n"
        f'v.plot(load({str(SAMPLES["ask"])!r}), "token_metrics").png(50)\n'
        "import matplotlib.pyplot as plt\n"
        'assert not plt.get_fignums() and not {"torch", "transformers"} & set(sys.modules)'
    )
    p = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert p.returncode == 0, p.stderr
