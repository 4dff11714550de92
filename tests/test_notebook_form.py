"""The form of the notebooks: each opens with a question and ends with something to try; sliders report where they rest.

What is in a page, and whether it runs, is seen by `test_notebooks.py`."""

import ast
import json
import re
from functools import cache
from pathlib import Path

NBS = Path(__file__).resolve().parent.parent / "nbs"
PAGES = sorted(p.relative_to(NBS).as_posix() for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
BOXES = "IntSlider", "FloatSlider", "SelectionSlider", "IntRangeSlider", "FloatLogSlider", "Text", "Textarea"


@cache
def cells(page):
    "The cells of a page: (is it code?, its source)."
    found = json.loads((NBS / page).read_text(encoding="utf-8"))["cells"]
    return [(c["cell_type"] == "code", "".join(c["source"])) for c in found]


def prose(page):
    return [source for is_code, source in cells(page) if not is_code]


def calls(page):
    "Every call in the code of a page: (name of the function, the call)."
    for is_code, source in cells(page):
        if is_code and "(" in source:
            try:
                tree = ast.parse(re.sub(r"^\s*[!%].*$", "", source, flags=re.MULTILINE))
            except SyntaxError:  # more of Jupyter's own language
                continue
            for node in ast.walk(tree):
                if isinstance(node, ast.Call):
                    yield getattr(node.func, "id", getattr(node.func, "attr", "")), node


def opening(page):
    "A page opens with a title, a summary, and the question that it answers."
    if not re.match(r"# .+\n\n> .+", prose(page)[0]):
        yield "the first cell is no title with a summary below it"
    if "?" not in " ".join(prose(page)[:3]):
        yield "neither the summary nor the text below it asks what the page answers"


def ending(page):
    "A page of the library ends with something to try; an exercise has its answer folded below it."
    heads = [h for text in prose(page) for h in re.findall(r"^## (.+)", text, re.MULTILINE)]
    if not heads or not heads[-1].startswith("Explore"):
        yield "the last section is not Explore"
    if "<details>" not in "\n".join(prose(page)):
        yield "there is no exercise with a folded answer"


def lost(page):
    "No cell is part of a text, as when a marker between two cells was misspelt."
    if any(re.search(r"^%%+ (code|md)\b|^#\| ?export", text, re.MULTILINE) for text in prose(page)):
        yield "a text holds cells"


def hasty(page):
    "A model that answers at each place of a slider, or at each letter, comes to rest long after the hand does."
    for name, call in calls(page):
        given = {k.arg: k.value for k in call.keywords}
        waits = None in given or ast.unparse(given.get("continuous_update", ast.Constant(True))) == "False"
        if name in BOXES and not waits:
            yield f"{ast.unparse(call)} needs continuous_update=False"
        if name == "interact":
            if "continuous_update" in given:
                yield "continuous_update is for the widgets, and ignored by interact"
            short = [k for k, v in given.items() if isinstance(v, ast.Tuple | ast.Constant) and not is_choice(v)]
            yield from (f"interact makes a hasty widget of {k}; give one with continuous_update=False" for k in short)


def is_choice(node):
    "Is this abbreviation one for a list or a checkbox?"
    if isinstance(node, ast.Constant):
        return isinstance(node.value, bool)
    return any(isinstance(e, ast.Constant) and isinstance(e.value, str) for e in node.elts)


def test_pages_have_the_form_of_pages():
    found = []
    for page in PAGES:
        numbered = re.search(r"^\d\d_\w+/\d\d_", page)
        checks = [opening, lost, hasty] + [ending] * bool(numbered)
        found += [f"{page}: {fault}" for check in checks for fault in check(page)]
    assert found == []
