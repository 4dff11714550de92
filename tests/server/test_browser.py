"""The page in a real browser: both answers, their costs, a phone, dark mode, and what goes wrong.

Needs Playwright (`pip install playwright`) and a Chromium of the system; skipped where one of them is missing."""

import shutil

import pytest

from llmopt.server.run import running
from server.fakes import fake_app

playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
CONTRAST = """() => [...document.querySelectorAll('h1, header p, label, button, .turn, th, td, li')].filter(
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


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    "A function that opens the page of a server; at the end, no error of a script and no other site may have been seen."
    wrong, contexts = [], []

    def opened(url, **look):
        contexts.append(browser.new_context(**look))
        page = contexts[-1].new_page()
        page.set_default_timeout(5000)
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on("request", lambda r: None if r.url.startswith((url, "data:")) else wrong.append(r.url))
        page.goto(url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def ask(page, prompt):
    "Ask both sides, and wait until they are ready."
    page.fill("#prompt", prompt)
    page.click("#go")
    page.wait_for_selector("#go:not([disabled])")


LOOKS = dict(
    desktop=dict(viewport=dict(width=1280, height=800)),
    phone=dict(viewport=dict(width=360, height=740), is_mobile=True, has_touch=True),
    dark=dict(viewport=dict(width=360, height=740), color_scheme="dark"),
)


@pytest.mark.parametrize("look", LOOKS)
def test_two_recipes_answer_one_prompt(visit, look):
    "Nothing is wider than the screen, and all text stands out from what is behind it (WCAG AA)."
    with running(fake_app()) as url:
        page = visit(url, **LOOKS[look])
        page.wait_for_selector("#b option >> nth=1", state="attached")
        ask(page, "Hello <b>there</b> " + "x" * 200)
        answers = page.locator(".turn.assistant").all_inner_texts()
        assert len(answers) == 2 and set(answers) == {"You said: Hello <b>there</b> " + "x" * 200}
        assert [page.locator(f"#{side} .model").input_value() for side in "ab"] == ["fake", "fake:words"]
        assert all("Time to first token" in t for t in page.locator(".cost").all_inner_texts())
        assert "prompt tokens" in page.locator("#both").inner_text()
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert page.evaluate(CONTRAST) >= 4.5
        assert (
            sum(page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")) < 200
        ) == (look == "dark")
        ask(page, "Again")
        assert (
            page.locator(".turn.user").count() == 4 and page.input_value("#prompt") == ""
        )  # each turn has its question
        assert page.get_attribute("#tokens", "max") == "1000"  # the context of the model
        page.click("#new")
        assert page.locator(".turn").count() == 0


def test_an_answer_is_stopped_and_an_error_is_shown(visit):
    "The model is free after Stop; the next question is no victim of the one before."
    app = fake_app(pause=0.02)
    with running(app) as url:
        page = visit(url)
        page.wait_for_selector("#b option >> nth=1", state="attached")
        page.fill("#prompt", "w " * 400)
        page.fill("#tokens", "300")
        page.click("#go")
        page.wait_for_selector("#a .turn.assistant:not(.waiting)")
        page.click("#stop")
        page.wait_for_selector("#go:not([disabled])")
        assert [t.endswith("[stopped]") for t in page.locator(".turn.assistant").all_inner_texts()] == [True, True]
        assert page.input_value("#prompt") == ("w " * 400).strip()  # nobody answered it: it may be asked again
        ask(page, "Hello")
        assert page.locator(".cost:visible, #both:visible").count() == 3
        ask(page, "fail")
        assert page.locator(".cost:visible, #both:visible").count() == 0  # they were of the answer before
        assert "an error of the server" in page.locator("#a .turn.assistant").last.inner_text()
        ask(page, "Hello")
        assert page.locator("#a .turn.assistant").last.inner_text() == "You said: Hello"
        assert not app.state.service.lanes["fake"].busy


def test_a_key_is_asked_for(visit):
    with running(fake_app(api_key="sesame")) as url:
        page = visit(url)
        page.wait_for_selector("#notice:visible")
        page.fill("#key", "sesame")
        page.press("#key", "Tab")
        page.wait_for_selector("#b option >> nth=1", state="attached")
        ask(page, "Hello")
        assert page.locator("#a .turn.assistant").inner_text() == "You said: Hello"
