"Charts from results files: what is drawn of good files, odd ones and broken ones."

import itertools
import re
import subprocess
import sys
from functools import cache
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from helpers import DATA
from llmopt.errors import ResultsError
from llmopt.evaluation.results import Method, Query, Results, Run, load, save
from llmopt.visualization.charts import KINDS, plot, plot_file
from llmopt.visualization.style import WIDTH, Chart
from visualization.drawn import DOTS, collisions, draw, panels, says, silent, texts_drawn

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


@cache
def read(kind):
    "A sample, read once: not to be changed."
    return load(SAMPLES[kind])


def suits(kind):
    return {f"{k}.png" for k, (_, kinds) in KINDS.items() if kind in kinds}


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


@pytest.fixture(autouse=True)
def few_dots():
    "Files are written with a third of the dots, which takes a fifth of the time."
    with mock.patch.object(Chart.png, "__defaults__", (DOTS,)):
        yield


@pytest.mark.parametrize("chart", KINDS)
def test_every_chart_of_the_samples(chart):
    "Something stands on white in every quarter, and no text covers another or leaves the sheet."
    fig = plot(read(KINDS[chart][1][0]), chart)
    with texts_drawn() as drawn:
        grey = draw(fig)
    assert collisions(drawn) == [] and silent(fig) == []
    assert grey[0, 0] == np.median(grey) == 255
    assert all((part < 200).sum() > 50 for part in np.array_split(grey, 4))


@pytest.mark.parametrize("chart", ["performance_dashboard", "time_metrics", "input_output_pairs"])
def test_charts_of_a_large_file(chart):
    "Twelve methods with long names and dollars, one of them failed: every kind of panel stands in one of these charts."
    with texts_drawn() as drawn:
        draw(plot(large(2 if chart == "input_output_pairs" else 4, 1), chart))
    assert collisions(drawn) == []
    assert any("failed" in text for text, _, _ in drawn.values())


def test_a_picture_is_written_where_it_was_asked_for(tmp_path):
    "Folders are made, and the file is a PNG of the width of a sheet, twice the same."
    a, b = (plot_file(SAMPLES["ask"], tmp_path / "new" / d, "memory_metrics")[0] for d in "ab")
    assert (a, b) == (tmp_path / "new" / "a" / "memory_metrics.png", tmp_path / "new" / "b" / "memory_metrics.png")
    with Image.open(a) as im:
        assert im.format == "PNG" and im.width == WIDTH * DOTS and im.height > 100
    assert a.read_bytes() == b.read_bytes()  # a committed figure does not change when a notebook is run again


def test_many_answers_make_a_tall_sheet():
    "Cells get fewer lines, and what does not fit is counted."
    fig = plot(large(500, 1, ["baseline", "larosa"]), "input_output_pairs")
    assert 150 < fig.get_figheight() < 202
    assert "more queries do not fit" in " ".join(says(fig))


@pytest.mark.parametrize("kind", SAMPLES)
def test_single_method_single_round(kind, tmp_path):
    "The charts that suit a file are drawn, no others, of one method in one round too."
    res, foot = subset(read(kind), lambda r: r.method == "baseline" and r.round == 0, noise_floor={}), []

    def picture(fig):
        foot.append(says(fig))
        return b"a picture"

    with mock.patch.object(Chart, "png", picture):
        paths = plot_file(save(res, tmp_path / "r.json"), tmp_path / "p")
    assert {p.name for p in paths} == suits(kind) == {p.name for p in (tmp_path / "p").iterdir()}
    assert {p.read_bytes() for p in paths} == {b"a picture"}
    assert all(any("One round" in s for s in texts) for texts in foot) and len(foot) == len(paths)


def test_a_file_without_a_baseline():
    "There are no ratios then, and everything else is drawn."
    res = subset(read("compare"), lambda r: not r.method.startswith("baseline"), noise_floor={})
    said = says(panels(res))
    assert "nothing to compare with the baseline" in said
    assert "not measured in this file" not in said
    assert "what the model read" in says(plot(res, "input_output_pairs"))


def test_a_document_is_named_by_its_question():
    "The band over its answers and the heading show what was asked, not how the document begins."
    asked = Query(id="d", text="Once upon a time. " * 30 + "Who came?", question="Who came?")
    row = dict(query="d", method="baseline", prompt_text="x", output_text="y", kl_mean=0.0)
    said = says(plot(Results(queries=[asked], runs=[Run(arm="quality", **row)]), "input_output_pairs"))
    assert "d:  Who came?" in said and any('("Who came?")' in s for s in said)


def test_an_interrupted_file():
    "Only the quality arm was run: the other panels say so."
    res = subset(read("compare"), lambda r: r.arm == "quality", noise_floor={})
    assert says(plot(res, "performance_dashboard")).count("not measured in this file") >= 4
    assert "not measured in this file" not in says(plot(res, "quality_comparison"))


@pytest.mark.parametrize("chart", ["input_output_pairs", "performance_dashboard"])
def test_a_failed_method_is_named(chart):
    "In its lanes or beside its texts, and with the first error below."
    res = read("compare")
    m = next(r.method for r in res.runs if not r.method.startswith("baseline"))
    empty = [
        Run(arm=r.arm, query=r.query, method=r.method, round=r.round, error="it broke") if r.method == m else r
        for r in res.runs
    ]
    drawn = says(plot(res.model_copy(update=dict(runs=empty)), chart))
    assert any("failed" in s for s in drawn) and any("it broke" in s for s in drawn)


def test_asked_by_name(tmp_path):
    "Any chart can be asked of any file, and twice is once."
    with mock.patch.object(Chart, "png", return_value=b"a picture"):
        other = plot_file(SAMPLES["ask"], tmp_path, "input_output_pairs")
        twice = plot_file(SAMPLES["compare"], tmp_path, ["token_metrics", "token_metrics"])
    assert [p.name for p in (*other, *twice)] == ["input_output_pairs.png", "token_metrics.png"]


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
    for name, bad, why in (
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
        refused(why, tmp_path / name, tmp_path / "p")
    refused("no results file", tmp_path / "none.json", tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_unwritable_output(tmp_path):
    "A folder that cannot be, and a picture whose place is taken, are one line; nothing is left behind."
    (tmp_path / "file").write_text("")
    refused("it is a file; give a folder", SAMPLES["ask"], tmp_path / "file")
    refused("cannot write", SAMPLES["ask"], tmp_path / "file" / "sub")
    (tmp_path / "p" / "token_metrics.png").mkdir(parents=True)
    refused("cannot write.*token_metrics", SAMPLES["ask"], tmp_path / "p", ["token_metrics"])
    assert [p.name for p in (tmp_path / "p").iterdir()] == ["token_metrics.png"]
    for output in ("a\0b", tmp_path / ("n" * 300)):
        refused("cannot write", SAMPLES["ask"], output, ["token_metrics"])
    for output in (None, 5):
        refused("has a path, not", SAMPLES["ask"], output, ["token_metrics"])


@pytest.fixture
def picture():
    "Pictures are a few bytes, for tests of where they go."
    with mock.patch.object(Chart, "png", return_value=b"a picture"):
        yield b"a picture"


def test_a_full_disk_leaves_nothing(tmp_path, picture):
    "Neither half a picture nor a temporary file stays, and the old picture does."
    (tmp_path / "token_metrics.png").write_text("old")
    with mock.patch("os.replace", side_effect=OSError(28, "No space left on device")):
        refused("No space left", SAMPLES["ask"], tmp_path, "token_metrics")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def test_links_are_written_through(tmp_path, picture):
    "A link stays a link: the picture goes where it leads."
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "token_metrics.png").symlink_to(tmp_path / "kept.png")
    plot_file(SAMPLES["ask"], tmp_path / "p", "token_metrics")
    assert (tmp_path / "p" / "token_metrics.png").is_symlink() and (tmp_path / "kept.png").read_bytes() == picture


def test_unknown_chart(tmp_path):
    "A chart that does not exist is refused before anything is made, whatever is given as its name."
    refused("unknown chart 'pie'.*quality_comparison", SAMPLES["compare"], tmp_path / "p", ["pie"])
    for odd in ([["pie"]], [None], [3], ["pie" * 999]):
        refused("unknown chart", SAMPLES["ask"], tmp_path / "p", odd)
    refused("has a path", None, tmp_path / "p")
    with pytest.raises(ResultsError, match="pie"):
        plot(read("ask"), "pie")
    assert not (tmp_path / "p").exists()


def test_no_torch_and_no_window():
    "A machine without torch draws too, and drawing opens no pyplot figure"
    code = (
        "import sys; import llmopt.visualization.charts as v; from llmopt.evaluation.results import load\n"
        f'v.plot(load({str(SAMPLES["ask"])!r}), "memory_metrics").png(40)\n'
        "import matplotlib.pyplot as plt\n"
        'assert not plt.get_fignums() and not {"torch", "transformers"} & set(sys.modules)'
    )
    p = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert p.returncode == 0, p.stderr
