"""Pages in a real JupyterLab, in a headless Chromium: Run All, and no line of code that must be scrolled sideways.

    pytest tests/test_jupyterlab.py --jupyter -k explore

A page takes 10 to 30 seconds and all of them over an hour, so this is no part of the workflow for pull requests.
Needs Playwright (`pip install playwright`), a Chromium of the system, and `pip install -e ".[dev]"`."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from helpers import ROOT, chromium

playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
pytest.importorskip("jupyterlab", reason='needs the development tools: pip install -e ".[dev]"')
pytestmark = pytest.mark.jupyter
PAGES = sorted(p.relative_to(ROOT / "nbs").as_posix() for p in (ROOT / "nbs").rglob("*.ipynb"))
KERNEL = dict(display_name="python3", language="python", name="python3")
LONGEST = 180  # seconds that a page may take
SETTINGS = {  # all cells are there to be looked at, and no question stands in the way
    "notebook-extension/tracker": dict(windowingMode="none", autoStartDefaultKernel=True),
    "apputils-extension/notification": dict(fetchNews="false", checkForUpdates=False),
    "docmanager-extension/plugin": dict(autosave=False),
}
HAVE_RUN = """() => {
  const prompts = [...document.querySelectorAll('.jp-InputPrompt')].map((p) => p.innerText);
  return prompts.some((p) => /\\d/.test(p)) && !prompts.some((p) => p.includes('*'));
}"""
ERRORS = """() => [...document.querySelectorAll('[data-mime-type="application/vnd.jupyter.stderr"]')].map(
  (e) => e.innerText).filter((t) => /^\\w+(Error|Exception|Interrupt)\\b/m.test(t)).map((t) => t.slice(-300))"""
SIDEWAYS = """() => [...document.querySelectorAll('.jp-CodeCell .jp-InputArea-editor .cm-scroller')].filter(
  (e) => e.scrollWidth > e.clientWidth + 1).map((e) => e.innerText.slice(0, 80))"""


def free_port():
    "A port that nobody listens at."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def copied(folder):
    "A copy of the notebooks in `folder`, beside links to whatever else is in the tree."
    for path in ROOT.iterdir():
        if path.name != "nbs" and path.name[0] not in "._":
            (folder / path.name).symlink_to(path)
    shutil.copytree(ROOT / "nbs", folder / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints", "_quarto.yml"))


def settle(folder):
    "Write `SETTINGS` where JupyterLab looks for them, and the environment that says where that is."
    for name, values in SETTINGS.items():
        path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    places = dict(JUPYTER_CONFIG_DIR="config", JUPYTER_RUNTIME_DIR="runtime", IPYTHONDIR="ipython")
    places |= dict(JUPYTERLAB_SETTINGS_DIR="settings", JUPYTERLAB_WORKSPACES_DIR="workspaces")
    places |= dict(JUPYTER_DATA_DIR="data")
    env = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}  # figures are drawn into the page
    return env | {k: str(folder / v) for k, v in places.items()} | dict(PYTHONPATH=str(ROOT))


@contextmanager
def jupyterlab(folder, env):
    "The address of a JupyterLab over `folder`."
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--IdentityProvider.token=", "--ServerApp.disable_check_xsrf=True", f"--notebook-dir={folder}"]
    said = folder.parent.parent / "server.log"
    with open(said, "w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        for _ in range(240):
            try:
                urlopen(f"{url}/api").close()
                break
            except (URLError, ConnectionError):
                assert process.poll() is None, said.read_text()
                time.sleep(0.25)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture(scope="module")
def notebooks(tmp_path_factory):
    "A folder with a copy of the notebooks."
    tree = tmp_path_factory.mktemp("lab") / "tree"
    tree.mkdir()
    copied(tree)
    return tree / "nbs"


@pytest.fixture(scope="module")
def lab(notebooks):
    "The address of a JupyterLab over `notebooks`."
    with jupyterlab(notebooks, settle(notebooks.parent.parent)) as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def visit(lab, browser):
    "A function that opens a notebook and runs all of its cells."
    contexts = []

    def opened(path):
        contexts.append(browser.new_context(viewport=dict(width=1440, height=900)))
        page = contexts[-1].new_page()
        page.goto(f"{lab}/lab/tree/{path}?reset")
        page.wait_for_selector(".jp-Notebook .jp-CodeCell", state="attached", timeout=60_000)
        page.wait_for_selector("#jp-main-statusbar >> text=/[|] Idle$/", timeout=60_000)
        run_all(page)
        return page

    yield opened
    for context in contexts:
        for page in context.pages:
            shut_down(page)
        context.close()


def run_all(page):
    "Run > Run All Cells, and wait for the last one."
    page.click(".lm-MenuBar-itemLabel:text-is('Run')")
    page.click('li[data-command="runmenu:run-all"]')
    page.wait_for_function(HAVE_RUN, timeout=LONGEST * 1000)


def shut_down(page):
    "Stop the kernel of a page, so that it takes no memory from the next one."
    page.evaluate("""async () => {
      const sessions = await (await fetch('/api/sessions')).json();
      await Promise.all(sessions.map((s) => fetch('/api/sessions/' + s.id, {method: 'DELETE'})));
    }""")


def test_a_page_with_faults_is_found(visit, notebooks):
    "Or the test of the pages could not fail."
    wide, broken = "x = '" + "wide " * 60 + "'", "raise ValueError('broken')"
    inner = "from ipywidgets import interact\ninteract(lambda x: 1 / x, x=(0, 0));"
    empty = dict(cell_type="code", execution_count=None, metadata={}, outputs=[])
    cells = [dict(empty, id=f"cell{n}", source=source) for n, source in enumerate((wide, inner, broken))]
    page = dict(cells=cells, metadata=dict(kernelspec=KERNEL), nbformat=4, nbformat_minor=5)
    (notebooks / "faulty.ipynb").write_text(json.dumps(page))
    page = visit("faulty.ipynb")
    errors = page.evaluate(ERRORS)
    assert any("ZeroDivisionError" in e for e in errors) and any("broken" in e for e in errors)
    assert [line[:12] for line in page.evaluate(SIDEWAYS)] == ["x = 'wide wi"]


@pytest.mark.parametrize("path", PAGES)
def test_all_cells_run_and_none_is_too_wide(visit, path):
    "On a screen of 1440 pixels."
    page = visit(path)
    assert page.evaluate(ERRORS) == []
    assert page.evaluate(SIDEWAYS) == []


def test_the_lab_draws_runs_and_stops(visit):
    "A slider changes the recipe, another one the chart; a run fills the table, and ends when it is asked to."
    page = visit("explore/lab.ipynb")
    page.set_default_timeout(60_000)
    panel = page.locator(".jp-OutputArea-output:has(.jupyter-button:text-is('Stop'))")

    def knob(name):
        return panel.locator(f".widget-slider:has(label:text-is('{name}')) .noUi-handle")

    panel.locator(".lm-TabBar-tab:has-text('Chart')").click()
    chart = panel.locator("img.widget-image").element_handle()
    page.wait_for_function("(e) => e.naturalWidth > 500", arg=chart)
    before = chart.get_attribute("src")
    knob("query").press("ArrowRight")
    page.wait_for_function("([e, old]) => e.src !== old && e.naturalWidth > 500", arg=[chart, before])
    panel.locator(".widget-checkbox:has-text('word_removal') input").check()
    knob("rate").press("ArrowRight")
    panel.locator(".widget-label:text-is('word_removal:rate=0.55')").wait_for()
    panel.locator(".lm-TabBar-tab:has-text('Table')").click()
    run, stop = (panel.locator(f".jupyter-button:text-is('{name}')") for name in ("Run", "Stop"))
    run.click()
    panel.locator(".widget-html-content:text-matches('^[1-9][0-9]* of [0-9]+: ')").wait_for()
    assert stop.is_enabled() and not run.is_enabled()
    stop.click()
    panel.locator(".widget-html-content:text-matches('^stopped: [1-9][0-9]* measurements')").wait_for()
    assert panel.locator("table tr").count() == 4  # the head, the baseline, two methods
    playwright.expect(run).to_be_enabled()
    assert page.evaluate(ERRORS) == []
