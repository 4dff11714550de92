"The page of claims shows figures of stored files, and nothing else."

import json
import math
import re
import statistics

import pytest

from helpers import DATA, ROOT

PAGE = ROOT / "nbs" / "explanations" / "claims.ipynb"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="not in a checkout")
NAMES = r"SmolLM2|LLMLingua-2|Llama-[\d.]+-\d+B|Mistral-7B|GPT-3\.5|\d+-bit\b|\d+[Kk] tokens"
SHOWN = {
    "saved": ("{:.0f} %", lambda x: 100 - 100 * x),
    "percent": ("{:.0f} %", lambda x: 100 * x),
    "more": ("{:.0f} %", lambda x: 100 * x - 100),
    "times": ("{:.2f}x", float),
    "faster": ("{:.2f}x", lambda x: 1 / x),
    "ratio": ("{:.2f}x", math.exp),
    "kl": ("{:.3f}", float),
    "number": ("{:.2f}", float),
    "count": ("{:.0f}", float),
}


@pytest.fixture(scope="module")
def claims():
    return json.loads((DATA / "claims.json").read_text(encoding="utf-8"))["claims"]


@pytest.fixture(scope="module")
def files(claims):
    names = {f["file"] for c in claims for f in c["figures"].values()}
    return {n: json.loads((ROOT / n).read_text(encoding="utf-8")) for n in names}


def at(stored, path):
    "The numbers at `path`, read in another way than the page does: key by key from the left."
    here = [stored]
    for part in re.split(r"\.(?![^\[]*\])", path):
        key, _, wanted = part.partition("[")
        here = [x[key] for x in here]
        for condition in re.split(r"(?<!\\),", wanted.rstrip("]")) if wanted else []:
            k, _, v = condition.strip().replace("\\,", ",").partition("=")
            here = [
                row for rows in here for row in (rows if isinstance(rows, list) else [rows]) if f"{row.get(k)}" == v
            ]
    flat = [y for x in here for y in (x if isinstance(x, list) else [x]) if y is not None]
    assert flat, f"nothing lies at {path}"
    return flat


def shown(figure, files):
    "A figure as the page must show it."
    take = statistics.fmean if figure["take"] == "mean" else math.fsum
    x = take(at(files[figure["file"]], figure["figure"]))
    if "of" in figure:
        x /= take(at(files[figure["file"]], figure["of"]))
    form, change = SHOWN[figure["show"]]
    return form.format(change(x))


def page():
    "The prose of the page, and the Markdown that its cells have put out."
    cells = json.loads(PAGE.read_text(encoding="utf-8"))["cells"]
    prose = ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]
    outputs = [
        o for c in cells if c["cell_type"] == "code" for o in c["outputs"] if "text/markdown" in o.get("data", {})
    ]
    return "\n".join(prose), "\n".join("".join(o["data"]["text/markdown"]) for o in outputs)


def numbers(text):
    "The numbers of a text, less those in names, links and code."
    plain = re.sub(rf"`[^`]*`|\]\([^)]*\)|{NAMES}", "", text)
    return {n.rstrip(".,") for n in re.findall(r"\d[\d.,]*", re.sub(r"^\d\. ", "", plain, flags=re.M))}


def test_each_claim_has_a_source_and_each_of_our_figures_a_place(claims):
    "What is not measured has no figure, and no number of ours is typed in."
    for c in claims:
        assert c["link"] is None or re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{5}", c["link"]), c["id"]
        assert bool(c["figures"]) == bool(c["ours"]), c["id"]
        assert c["where"] and c["value"] and c["why"], c["id"]
        assert not numbers(f"{c['ours']} {c['why']}"), c["id"]
        named = {*re.findall(r"\{(\w+)\}", f"{c['ours']} {c['why']}")}
        assert named == c["figures"].keys(), c["id"]


def test_the_page_shows_what_the_files_hold(claims, files):
    "Each row stands on the page with the figures that its files hold now."
    _, tables = page()
    for c in claims:
        ours = {k: shown(f, files) for k, f in c["figures"].items()}
        here = c["ours"].format(**ours) if c["ours"] else "*not measured here*"
        assert f"| {c['claim']} | **{c['value']}** ({c['where']}) | {here} | {c['why'].format(**ours)} |" in tables, c[
            "id"
        ]


def test_no_number_of_the_page_comes_from_elsewhere(claims, files):
    "Every number of prose and tables is in the file of claims, or is a figure of a results file."
    known = numbers(json.dumps([[c["claim"], c["value"], c["where"]] for c in claims], ensure_ascii=False))
    known |= {n for c in claims for f in c["figures"].values() for n in numbers(shown(f, files))}
    prose, tables = page()
    assert not numbers(prose) - known
    assert not numbers(tables) - known


def test_a_wrong_number_would_be_found():
    "The test of numbers sees one that was typed in, and leaves names alone."
    assert numbers("SmolLM2 saves 31.5 % of 8-bit weights, `x=3`") == {"31.5"}
