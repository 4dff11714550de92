"""The page in a real browser: both answers, their costs, a phone, dark mode, and what goes wrong.

Needs Playwright (`pip install playwright`) and a Chromium of the system; skipped where one of them is missing."""

import pytest

from helpers import CONTRAST, SCREENS, chromium, visits
from llmopt.server.run import running
from server.fakes import fake_app

TEXTS = "h1, header p, label, button, .turn, th, td, li"


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def visit(browser):
    "A function that opens the page of a server."
    with visits(browser) as opened:
        yield opened


def ask(page, prompt):
    "Ask both sides, and wait until they are ready."
    page.fill("#prompt", prompt)
    page.click("#go")
    page.wait_for_selector("#go:not([disabled])")


@pytest.mark.parametrize("look", SCREENS)
def test_two_recipes_answer_one_prompt(visit, look):
    "Nothing is wider than the screen, and all text stands out from what is behind it (WCAG AA)."
    with running(fake_app()) as url:
        page = visit(url, **SCREENS[look])
        page.wait_for_selector("#b option >> nth=1", state="attached")
        ask(page, "Hello <b>there</b> " + "x" * 200)
        answers = page.locator(".turn.assistant").all_inner_texts()
        assert len(answers) == 2 and set(answers) == {"You said: Hello <b>there</b> " + "x" * 200}
        assert [page.locator(f"#{side} .model").input_value() for side in "ab"] == ["fake", "fake:words"]
        assert all("Time to first token" in t for t in page.locator(".cost").all_inner_texts())
        assert "prompt tokens" in page.locator("#both").inner_text()
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert page.evaluate(CONTRAST, TEXTS) >= 4.5
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
