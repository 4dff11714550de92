"Reports of odd and broken files: a page that says what is missing, or one line."

import json
from contextlib import nullcontext
from unittest import mock

import pytest

from helpers import DATA
from llmopt.cli import main
from llmopt.errors import ResultsError
from llmopt.evaluation.results import Results, Run, load
from llmopt.visualization.page import rendered
from llmopt.visualization.report import report_html, write_report
from visualization.made_up import made_up
from visualization.test_edited_files import ODD, edited


@pytest.mark.parametrize("name", ODD)
def test_a_page_or_one_line(name, tmp_path):
    "Edited files of every kind: no traceback, and a page that is closed at its end. What panels draw has other tests."
    drawn = ["names that are none"]
    with nullcontext() if name in drawn else mock.patch("llmopt.visualization.report._figures", return_value=[]):
        try:
            page = report_html(edited(name, tmp_path / "r.json"), name)
        except ResultsError as e:
            assert "\n" not in str(e)
            return
    assert page.rstrip().endswith("</html>") and page.count("<svg") == page.count("</svg>")
    assert (page.count("<svg") > 5) == (name in drawn) and page.encode("utf-8")


def test_characters_that_html_cannot_hold():
    "Controls, as in the colours of a terminal, are shown as characters that are not known."
    page = rendered(verdict=dict(head="red \x1b[31m\0 end\x85", lines=[]))
    assert "red \ufffd[31m\ufffd end\ufffd" in page and not set(page) & set("\x1b\0\x85")


def test_a_message_has_a_page_too():
    "A file of `ask` is one query, whose answers stand in the page."
    res = load(DATA / "sample_comprehensive_results.json")
    page = report_html(res, "comprehensive_results.json")
    assert "One message, every method" in page and page.count('<details class="query"') == 1
    assert "all_combined" in page and "Nothing is known of the noise" not in page


def test_one_method_one_query_one_round():
    "The page says that there is nothing to compare, and shows what there is."
    row = dict(query="q", method="baseline")
    page = report_html(
        Results(runs=[Run(arm="speed", e2el_ms=5.0, **row), Run(arm="quality", output_text="so", **row)])
    )
    assert "Only the baseline was measured" in page and "not measured in this file" in page and ">so<" in page


def test_failed_cells_are_named():
    page = report_html(made_up(["baseline", "gone", "fast"], fail=["gone"]))
    assert "Failed measurements: gone" in page and "failed: it broke" in page and ">failed<" in page


def test_what_is_left_out_is_counted():
    "Fifty queries are shown, a text of thousands of characters is cut, and both are said."
    rows = [Run(arm="quality", query=f"q{i}", method="m", output_text="w " * 4000, kl_mean=0) for i in range(53)]
    with mock.patch("llmopt.visualization.report._figures", return_value=[]):
        page = report_html(Results(runs=rows))
    assert "3 more queries stand in the file" in page and "2,000 more characters" in page and len(page) < 10**6


def test_files_that_are_none(tmp_path, capsys):
    "The command says one line for what cannot be read, and writes nothing."
    text = (DATA / "sample_comprehensive_results.json").read_text(encoding="utf-8")
    bad = {
        "half": (text[: len(text) // 2], "truncated"),
        "new": (
            text.replace('"schema_version": 2', '"schema_version": 3', 1),
            "schema version 3; this llmopt reads versions 1 and 2: update llmopt",
        ),
        "other": ("[1, 2]", "no llmopt results"),
        "advice": ('{"kind": "advice", "schema_version": 7}', "advice of schema version 7"),
        "edited": ('{"kind": "advice", "schema_version": 1, "tried": 3}', "schema at tried"),
        "empty": (Results().model_dump_json(), "no measurement succeeded"),
    }
    for name, (content, why) in bad.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert main(["report", str(tmp_path / name), "-o", str(tmp_path / "out.html")]) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("llmopt: error: ") and why in " ".join(said.split()), (name, said)
    assert main(["report", str(tmp_path / "none.json")]) == 2
    assert not (tmp_path / "out.html").exists()


def test_where_it_is_written(tmp_path):
    "A folder, a place that is none, and the results file itself are one line."
    for output in (tmp_path, tmp_path / "none" / "r.html"):
        with pytest.raises(ResultsError, match="cannot write"):
            write_report(DATA / "sample_comprehensive_results.json", output)
    own = tmp_path / "r.json"
    own.write_bytes((DATA / "sample_comprehensive_results.json").read_bytes())
    (tmp_path / "link.html").symlink_to(own)
    for output in (own, tmp_path / "link.html"):
        with pytest.raises(ResultsError, match="take the place of the file"):
            write_report(own, output)
    assert load(own).kind == "ask"


def test_odd_advice(tmp_path):
    "Advice without a candidate, with numbers that are none, and with markup: a page."
    tried = [dict(recipe="<b>x</b>", state="outside", losses=dict(kl=dict(value=0.3)), gain=dict(value=-1))]
    for raw in (dict(), dict(tried=tried, floor=["kl<=nan", "x"], sentence="<i>: <b>", skipped={"<q>": "<w>"})):
        path = tmp_path / "advice.json"
        path.write_text(json.dumps(raw | dict(kind="advice", schema_version=1)), encoding="utf-8")
        page = write_report(path, tmp_path / "r.html").read_text(encoding="utf-8")
        assert "no candidate was timed and judged" in page and "<b>x" not in page and "<i>" not in page
