"""The page with sliders: its numbers are those of `data/`, and it works in a browser from a file, without a kernel.

Its browser part needs Playwright (`pip install playwright`) and a Chromium of the system, and is skipped without."""

import json
import re
from statistics import fmean

import pytest

from helpers import DATA, ROOT, SCREENS, chromium, visits

PAGE = ROOT / "nbs" / "explanations" / "sliders.ipynb"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="not in a checkout")


@pytest.fixture(scope="module")
def fragment():
    "The HTML that the page's cell has put out."
    cells = json.loads(PAGE.read_text(encoding="utf-8"))["cells"]
    found = [
        "".join(o["data"]["text/html"]) for c in cells for o in c.get("outputs", []) if "text/html" in o.get("data", {})
    ]
    return next(h for h in found if "llmopt-sliders" in h)


@pytest.fixture(scope="module")
def numbers(fragment):
    "The numbers that lie in the page."
    return json.loads(re.search(r'class="llmopt-data">(.*?)</script>', fragment, re.S)[1])


def test_the_page_is_small_and_asks_nobody(fragment):
    "Under 300 kB, no library and no address but the name space of SVG."
    assert len(fragment.encode()) < 300_000
    assert {*re.findall(r"https?://[^\"'\s]+", fragment)} == {"http://www.w3.org/2000/svg"}
    assert "import " not in fragment and "fetch(" not in fragment and "src=" not in fragment


def test_losses_are_those_of_the_files(numbers):
    "Each setting has the mean of the KL that its file holds."
    rows = json.loads((DATA / "smollm2" / "larosa_ablation.json").read_text(encoding="utf-8"))["rows"]
    kl = {(r["variant"], r["p"]): fmean(r["kl_answers"]) for r in rows}
    here = {(r["bits"], r["sparsity"]): r["kl"] for r in numbers["weights"]}
    assert here[16, 0] == 0
    for (bits, dropped), x in here.items():
        if dropped or bits == 8:
            key = ("top-k, measured", dropped / 100) if bits == 16 else ("8 bits", round(0.5 + dropped / 200, 2))
            assert x == pytest.approx(kl[key], abs=1e-5)
    rows = json.loads((DATA / "smollm2" / "kv_eviction_quality.json").read_text(encoding="utf-8"))["test"]["rows"]
    for r in numbers["cache"]:
        part = [
            x["kl"]
            for x in rows
            if (x["policy"], x.get("window"), x.get("bits"), x["when"]) == ("cake", 8, r["bits"], r["when"])
            and r["label"].endswith(f"to {x['budget']}" if x["budget"] != "100%" else "all tokens")
        ]
        assert r["kl"] == (pytest.approx(fmean(part), abs=1e-5) if part else 0), r


def test_bytes_are_those_of_the_model(numbers):
    "135 million weights, and keys and values of 3 heads in 30 layers."
    assert numbers["kvBytes"] == 2 * 2 * 30 * 3 * 64
    assert numbers["projectionBytes"] + numbers["otherBytes"] == pytest.approx(2 * 134.515e6, rel=1e-4)
    assert numbers["otherBytes"] == pytest.approx(2 * 49152 * 576, rel=1e-2)


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def visit(browser, fragment, tmp_path):
    "A function that opens the page as a file."
    file = tmp_path / "page.html"
    look = "<meta name=viewport content='width=device-width'><style>:root{color-scheme:light dark}</style>"
    file.write_text(f"<!doctype html><html lang=en><meta charset=utf-8>{look}<body>{fragment}</body></html>", "utf-8")
    with visits(browser) as opened:
        yield lambda **screen: opened(file.as_uri(), **screen)


def move(page, name, steps):
    "Move a slider by keys, as one does without a mouse."
    page.locator(f"[data-in={name}]").focus()
    for _ in range(abs(steps)):
        page.keyboard.press("ArrowRight" if steps > 0 else "ArrowLeft")


def said(page, name):
    return page.locator(f"[data-out={name}]").inner_text()


@pytest.mark.parametrize("look", SCREENS)
def test_sliders_move_the_figures(visit, numbers, look):
    "Bytes, bound and losses follow; nothing is wider than the screen."
    page = visit(**SCREENS[look])
    mib = (numbers["projectionBytes"] + numbers["otherBytes"] + 2048 * numbers["kvBytes"]) / 2**20
    assert said(page, "bytes") == f"{mib:,.0f} MiB"
    assert (said(page, "klWeights"), said(page, "klCache")) == ("0", "0")
    move(page, "bits", 1)
    eight = next(r for r in numbers["weights"] if (r["bits"], r["sparsity"]) == (8, 0))
    assert said(page, "klWeights") == f"{eight['kl']:.3f}"
    move(page, "kvBits", 2)
    move(page, "budget", 2)
    least = next(r for r in numbers["cache"] if (r["bits"], r["share"], r["when"]) == (4, 0.1, "after"))
    assert said(page, "klCache") == f"{least['kl']:.3f}"
    page.select_option("[data-in=when]", "before")
    worse = next(r for r in numbers["cache"] if (r["bits"], r["share"], r["when"]) == (4, 0.1, "before"))
    assert said(page, "klCache") == f"{worse['kl']:.3f}"
    mib = (numbers["projectionBytes"] * eight["share"] + numbers["otherBytes"] + 204.8 * numbers["kvBytes"]) / 2**20
    assert said(page, "bytes") == f"{mib:,.0f} MiB"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_only_measured_settings_are_offered(visit, numbers):
    "Whatever the bits, each stop of the other slider is a row of the data, and the page never shows NaN."
    page = visit(**SCREENS["desktop"])
    for bits in (0, 1):
        move(page, "bits", bits)
        stops = int(page.get_attribute("[data-in=sparsity]", "max")) + 1
        assert stops == sum(r["bits"] == (16, 8)[bits] for r in numbers["weights"])
        for _ in range(stops):
            move(page, "sparsity", 1)
            assert "NaN" not in page.inner_text("body") and "undefined" not in page.inner_text("body")


def test_the_chosen_setting_stands_out(visit):
    "One dot in each chart is the current one, and it has a title."
    page = visit(**SCREENS["desktop"])
    move(page, "sparsity", 3)
    for chart in ("weights", "cache"):
        assert page.locator(f"[data-chart={chart}] circle.now").count() == 1
    assert "40 % of the inputs dropped" in page.locator("[data-chart=weights] circle.now title").text_content()
