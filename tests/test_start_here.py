"The page for beginners names commands that exist, and times that were measured."

import json
import re
import shlex

import pytest

from helpers import DATA, ROOT
from llmopt.cli.parser import parser

PAGE = ROOT / "nbs" / "start_here.ipynb"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="not in a checkout")


@pytest.fixture(scope="module")
def stored():
    return json.loads((DATA / "start_here.json").read_text(encoding="utf-8"))


def test_each_command_is_one(stored):
    "The parser takes each line as it is typed."
    known = parser()
    for step in stored["steps"]:
        name, *arguments = shlex.split(step["run"])
        assert name == "llmopt" and known.parse_args(arguments)


def test_each_page_is_there(stored):
    assert stored["pages"] and not [p for p in stored["pages"] if not (PAGE.parent / p["run"]).exists()]


def test_the_page_shows_what_is_stored(stored):
    "Every command and page has its row, with the time that was measured; all of them fit into ten minutes."
    cells = json.loads(PAGE.read_text(encoding="utf-8"))["cells"]
    shown = "".join("".join(o.get("data", {}).get("text/markdown", "")) for c in cells for o in c.get("outputs", []))
    for row in stored["steps"] + stored["pages"]:
        s = row["seconds"]
        time = "not measured yet" if s is None else f"{s:.1f} s" if s < 10 else f"{s:.0f} s"
        assert re.search(rf"{re.escape(row['run'])}[`)\]].*? \| {re.escape(time)} \|", shown), row
    assert sum(row["seconds"] or 0 for row in stored["steps"]) < 600
