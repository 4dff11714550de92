"""The page with sliders: its numbers are those of `data/`, and it works in a browser from a file, without a kernel.

Its browser part needs Playwright (`pip install playwright`) and a Chromium of the system, and is skipped without."""

import json
import re
import shutil
from statistics import fmean

import pytest

from helpers import DATA, ROOT

PAGE = ROOT / "nbs" / "explanations" / "sliders.ipynb"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="not in a checkout")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LOOKS = dict(
    desktop=dict(viewport=dict(width=1280, height=900)),
    phone=dict(viewport=dict(width=360, height=740), is_mobile=True, has_touch=True),
    dark=dict(viewport=dict(width=360, height=740), color_scheme="dark"),
)


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
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, fragment, tmp_path):
    "A function that opens the page as a file; no error of a script and no request may have been seen at the end."
    wrong, contexts = [], []
    file = tmp_path / "page.html"
    look = "<meta name=viewport content='width=device-width'><style>:root{color-scheme:light dark}</style>"
    file.write_text(f"<!doctype html><html lang=en><meta charset=utf-8>{look}<body>{fragment}</body></html>", "utf-8")

    def opened(**look):
        contexts.append(browser.new_context(**look))
        page = contexts[-1].new_page()
        page.set_default_timeout(5000)
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on("request", lambda r: None if r.url == file.as_uri() else wrong.append(r.url))
        page.goto(file.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def move(page, name, steps):
    "Move a slider by keys, as one does without a mouse."
    page.locator(f"[data-in={name}]").focus()
    for _ in range(abs(steps)):
        page.keyboard.press("ArrowRight" if steps > 0 else "ArrowLeft")


def said(page, name):
    return page.locator(f"[data-out={name}]").inner_text()


@pytest.mark.parametrize("look", LOOKS)
def test_sliders_move_the_figures(visit, numbers, look):
    "Bytes, bound and losses follow; nothing is wider than the screen."
    page = visit(**LOOKS[look])
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
    page = visit(**LOOKS["desktop"])
    for bits in (0, 1):
        move(page, "bits", bits)
        stops = int(page.get_attribute("[data-in=sparsity]", "max")) + 1
        assert stops == sum(r["bits"] == (16, 8)[bits] for r in numbers["weights"])
        for _ in range(stops):
            move(page, "sparsity", 1)
            assert "NaN" not in page.inner_text("body") and "undefined" not in page.inner_text("body")


def test_the_chosen_setting_stands_out(visit):
    "One dot in each chart is the current one, and it has a title."
    page = visit(**LOOKS["desktop"])
    move(page, "sparsity", 3)
    for chart in ("weights", "cache"):
        assert page.locator(f"[data-chart={chart}] circle.now").count() == 1
    assert "40 % of the inputs dropped" in page.locator("[data-chart=weights] circle.now title").text_content()
