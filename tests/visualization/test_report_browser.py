"""The report in a real browser: a phone, the dark, a table that sorts, and nothing loaded or run that is not ours.

Needs Playwright (`pip install playwright`) and a Chromium of the system; skipped where one of them is missing."""

import shutil

import pytest

from llmopt.visualization.report import write_report
from visualization.made_up import made_up

playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
LOOKS = dict(
    desktop=dict(viewport=dict(width=1280, height=900)),
    phone=dict(viewport=dict(width=360, height=740), is_mobile=True, has_touch=True),
    dark=dict(viewport=dict(width=360, height=740), color_scheme="dark"),
)
HOSTILE = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>" + "W" * 60
CONTRAST = """() => [...document.querySelectorAll('h1, h2, h3, p, th, td, li, dt, del, ins, summary')].filter(
  (e) => e.checkVisibility()).map((e) => {
    const rgb = (c) => c.match(/[\\d.]+/g).map(Number);
    const light = (c) => rgb(c).slice(0, 3).map((v) => v / 255).map(
      (v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4).reduce(
      (sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    let box = e;
    while (box.parentElement && rgb(getComputedStyle(box).backgroundColor)[3] === 0) box = box.parentElement;
    const [a, b] = [getComputedStyle(e).color, getComputedStyle(box).backgroundColor].map(light).sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  }).reduce((x, y) => Math.min(x, y))"""
SIZES = """() => [...document.querySelectorAll('figure svg text')].map((t) => t.getBoundingClientRect().height)"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    "A report of three methods, one with a hostile name, and texts that are markup."
    res = made_up(["baseline", HOSTILE, "larosa"], queries=2, rounds=2)
    for r in res.runs:
        if r.output_text:
            r.output_text += HOSTILE
    res.warnings.append(HOSTILE)
    folder = tmp_path_factory.mktemp("report")
    (folder / "r.json").write_text(res.model_dump_json(), encoding="utf-8")
    return write_report(folder / "r.json", folder / "r.html")


@pytest.fixture
def visit(browser, page_file):
    "A function that opens the report; at the end, no script may have failed and nothing else may have been asked for."
    wrong, contexts = [], []

    def opened(**look):
        contexts.append(browser.new_context(**look))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on("request", lambda r: None if r.url == page_file.as_uri() else wrong.append(r.url))
        page.goto(page_file.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.mark.parametrize("look", LOOKS)
def test_it_fits_and_can_be_read(visit, look):
    "Nothing is wider than the screen, text stands out (WCAG AA), and the letters of charts are at least 9 pixels high."
    page = visit(**LOOKS[look])
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.evaluate(CONTRAST) >= 4.5
    sizes = page.evaluate(SIZES)
    assert len(sizes) > 50 and min(sizes) > 9
    dark = sum(page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")) < 200
    assert dark == (look == "dark")


def test_no_script_but_ours_runs(visit):
    "Markup of the file is shown as it was written."
    page = visit()
    assert page.title() != "run" and page.locator("img").count() == 0 and page.locator("script").count() == 1
    assert "onerror" in page.locator("tbody tr").nth(1).inner_text()


def test_the_table_sorts(visit):
    "A click sorts up, a second one down; what was not measured stands last both times."
    page = visit()

    def names():
        return [t.strip()[:6] for t in page.locator(".sortable tbody th").all_inner_texts()]

    assert names() == ["baseli", "<img s", "larosa"]
    head = page.locator(".sortable thead button").nth(1)
    head.click()
    up = names()
    head.click()
    assert up == ["baseli", "<img s", "larosa"] and names() == up[::-1]
    assert page.locator(".sortable thead th").nth(1).get_attribute("aria-sort") == "descending"
