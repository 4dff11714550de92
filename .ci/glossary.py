"""Terms of the glossary, linked where they first occur on a page of the documentation.

The glossary is a notebook: a heading of the third level for each term, other names of it in italics below, and what it
means. An entry under the heading "Papers" leads to the paper that it links, any other one to its place in the glossary.
"""

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from execnb.nbio import read_nb
from pages import heading_anchor

GLOSSARY = Path("explanations/glossary.ipynb")
ENTRY = re.compile(r"^### (?P<name>.+)\n+(?:\*(?P<others>[^*\n]+)\*\n+)?(?P<meaning>(?:(?!^##).+\n?)+)", re.MULTILINE)
KEPT = re.compile(  # what is not prose, or is a link or a heading already
    r"(^```.*?^```|^#+ .*?$|`[^`\n]+`|!?\[[^\]]*\](?:\([^)]*\)|\[[^\]]*\])|\$\$.*?\$\$|\$(?=\S)[^$\n]+?(?<=\S)\$(?!\d)"
    r"|<!--.*?-->|<[^>\n]+>|\{[^}\n]*\}|https?://\S+)",
    re.MULTILINE | re.DOTALL,
)


class Term(NamedTuple):
    "An entry of the glossary."

    names: tuple
    summary: str  # its first sentence, plain
    anchor: str
    paper: str | None  # its address


def plain(text):
    "The first sentence of `text` without its markup, as the title of a link may hold it"
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", " ".join(text.split()))
    return re.split(r"(?<=[.?!]) (?=[A-Z])", text)[0].replace('"', "'")


@cache
def terms(path: Path):
    "The entries of the glossary at `path`; none if there is no such notebook"
    if not path.exists():
        return ()
    found, papers = [], False
    for cell in read_nb(path).cells:
        if cell.cell_type != "markdown":
            continue
        papers = papers or bool(re.search(r"^## Papers$", cell.source, re.MULTILINE))
        for m in ENTRY.finditer(cell.source):
            names = (m["name"], *(n.strip() for n in (m["others"] or "").split(",") if n.strip()))
            link = re.search(r"\]\((https?:[^)]+)\)", m["meaning"]) if papers else None
            found.append(Term(names, plain(m["meaning"]), heading_anchor(m["name"]), link and link[1]))
    return tuple(found)


def faults(path: Path):
    "Names that two entries claim, and entries of papers without a link"
    seen = {}
    for term in terms(path):
        for name in term.names:
            if name in seen:
                yield f"{path.as_posix()}: {name!r} is a name of {seen[name]!r} and of {term.names[0]!r}"
            seen[name] = term.names[0]


def spelled(name):
    "A pattern for `name`: as written if it has capitals, else with a capital at the beginning of a sentence too"
    words = r"\s+".join(map(re.escape, name.split()))
    return words if name != name.lower() else f"[{words[0].upper()}{words[0]}]{words[1:]}"


def link_terms(nb, page: Path, nbs: Path):
    "Link each term of the glossary in `nbs` where it first occurs in the prose of `nb`, which is to become `page`"
    entries = terms(nbs / GLOSSARY)
    if page == GLOSSARY or not entries:
        return
    prose = "\n".join(c.source for c in nb.cells if c.cell_type == "markdown")
    left = {n: t for t in entries for n in t.names if t.paper is None or t.paper not in prose}
    up = "../" * (len(page.parts) - 1)
    any_name = re.compile(rf"(?<![\w-])(?:{'|'.join(map(spelled, sorted(left, key=len, reverse=True)))})(?![\w-])")

    def replace(match):
        name = " ".join(match[0].split())
        term = left.get(name) or left.get(name[0].lower() + name[1:])
        if term is None:
            return match[0]
        for other in term.names:
            left.pop(other, None)
        target = term.paper or f"{up}{GLOSSARY.as_posix()}#{term.anchor}"
        return f'[{match[0]}]({target} "{term.summary}"){{.term}}'

    for cell in nb.cells:
        if cell.cell_type == "markdown" and left:
            parts = KEPT.split(cell.source)
            cell.source = "".join(p if i % 2 else any_name.sub(replace, p) for i, p in enumerate(parts))
