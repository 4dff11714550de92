"""The report in a real browser: a phone, the dark, a table that sorts, and nothing loaded or run that is not ours.

Needs Playwright (`pip install playwright`) and a Chromium of the system; skipped where one of them is missing."""

import pytest

from helpers import CONTRAST, SCREENS, chromium, visits
from llmopt.visualization.report import write_report
from visualization.made_up import made_up

HOSTILE = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>" + "W" * 60
TEXTS = "h1, h2, h3, p, th, td, li, dt, del, ins, summary"
SIZES = """() => [...document.querySelectorAll('figure svg text')].map((t) => t.getBoundingClientRect().height)"""


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


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
    "A function that opens the report."
    with visits(browser) as opened:
        yield lambda **screen: opened(page_file.as_uri(), **screen)


@pytest.mark.parametrize("look", SCREENS)
def test_it_fits_and_can_be_read(visit, look):
    "Nothing is wider than the screen, text stands out (WCAG AA), and the letters of charts are at least 9 pixels high."
    page = visit(**SCREENS[look])
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.evaluate(CONTRAST, TEXTS) >= 4.5
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
