"""What a page of the documentation shows: each exported cell gives way to a description of what it defines.

nbdev imports and runs the exported cells for that, and then shows `Call self as a function.` for a property and
`data: Any` for a record. Here everything is read from the source of the cell, in the layout of its author:
signatures and fields with their comments, docstrings. Nothing is run, so a page needs no model.
"""

import ast
import re
import textwrap
from collections import defaultdict
from functools import cache
from pathlib import Path

from colab import badge
from execnb.nbio import mk_cell
from nbdev.config import get_config
from nbdev.process import NBProcessor, Processor
from nbdev.processors import FilterDefaults
from nbdev.showdoc import showdoc_nm

FUNCTIONS = ast.FunctionDef, ast.AsyncFunctionDef
SHOWN = "export", "exports"
HEADING = re.compile(r"^#+ (.*?)[ \t]*(\{#[^}]*\})?[ \t]*$", re.MULTILINE)  # its text, and its own anchor if it has one


def definitions(cell):
    "Pairs of the full name and the syntax of the public functions, classes and methods that an exported cell defines"
    if cell.cell_type != "code" or not cell.directives_.keys() & {*SHOWN} or "hide" in cell.directives_:
        return
    for node in cell.parsed_() or []:
        if not isinstance(node, (*FUNCTIONS, ast.ClassDef)) or is_setter(node):
            continue
        names = showdoc_nm(node)
        for name in [names] if isinstance(names, str) else names:
            if not any(part.startswith("_") for part in name.split(".")):
                yield name, node
                yield from methods(name, node)


def methods(name, node):
    "Pairs of the full name and the syntax of the public methods in the body of a class"
    if isinstance(node, ast.ClassDef):
        inner = [n for n in node.body if isinstance(n, FUNCTIONS) and n.name[0] != "_" and not is_setter(n)]
        yield from ((f"{name}.{n.name}", n) for n in inner)


# ## A description


def signature(node, source):
    "The lines of a function up to its body, as they are written"
    lines = source.splitlines()
    text = "\n".join(lines[node.lineno - 1 : max(node.lineno, node.body[0].lineno - 1)])
    text = re.sub(r"^(\s*)(async )?def \w+\(\s*(self|cls)\s*(:\s*\w+)?\s*,?[ ]*", lambda m: head(m, node.name), text)
    return textwrap.dedent(text).rstrip()


def head(match, name):
    "The beginning of a method's signature, without the argument that a caller does not give"
    return f"{match[1]}{match[2] or ''}def {name}("


def fields(node, source):
    "The lines of a class that name its fields, below the line that names the class"
    lines, out = source.splitlines(), [source.splitlines()[node.lineno - 1]]
    out[0] = out[0].partition(":  #")[0].rstrip(":") + ":"
    for part in node.body:
        private = isinstance(part, ast.AnnAssign) and getattr(part.target, "id", "").startswith("_")
        if isinstance(part, ast.AnnAssign) and not private:
            out += lines[part.lineno - 1 : part.end_lineno]
    if init := next((n for n in node.body if isinstance(n, FUNCTIONS) and n.name == "__init__"), None):
        return signature(init, source).replace("def __init__(", f"{node.name}(", 1).rstrip(":")
    return "\n".join(out) if len(out) > 1 else None


def is_setter(node):
    "Does this function only set what a property of the same name reads?"
    return any(re.search(r"\.setter$|set_prop=True", ast.unparse(d)) for d in node.decorator_list)


def is_property(node):
    "Is this function read like a field?"
    return any(re.search(r"property|as_prop=True", ast.unparse(d)) for d in node.decorator_list)


def shown(node, source):
    "What stands below the heading of an entry, as code: fields, signature, or the type of a property"
    if isinstance(node, ast.ClassDef):
        return fields(node, source)
    if not is_property(node):
        return signature(node, source).rstrip(":")
    return f"{node.name}: {ast.unparse(node.returns)}" if node.returns else None


def described(name, node, source, link, home, place):
    "The entry of `name` on its page, in markdown; `home` is where its code lies, `place` its anchor"
    level, code = "####" if "." in name else "###", shown(node, source)
    heading = f"{level} `{name}` {{#{place}}}"
    doc = link(" ".join((ast.get_docstring(node) or "").split()))
    return "\n\n".join([heading, *([f"```python\n{code}\n```"] if code else []), f"{doc} {home}".strip()]) + "\n"


@cache
def lines_of(module):
    "The line of each definition in the exported `module`, such as `kv_cache.slab`: name -> number"
    path = Path(get_config().lib_path, *module.split(".")).with_suffix(".py")
    if not path.exists():
        return {}
    found = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            names = showdoc_nm(node)
            for name in [names] if isinstance(names, str) else names:
                found |= {name: node.lineno} | {n: m.lineno for n, m in methods(name, node)}
    return found


def source_link(module, name):
    "A link to the code of `name` in the repository"
    if not module or name not in lines_of(module):
        return ""
    cfg = get_config()
    file = "/".join([cfg.lib_path.name, *module.split(".")]) + ".py"
    return f"[source]({cfg.git_url}/blob/{cfg.branch}/{file}#L{lines_of(module)[name]})"


def anchor(name, names=()):
    "The anchor of a symbol on a page with `names`: a function called as a class is, but for capitals, is told apart"
    twice = name == name.lower() and any(n != name and n.lower() == name for n in names)
    return f"{name}-function" if twice else name.lower()


def heading_anchor(text):
    "The anchor that pandoc gives a heading"
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", text)
    text = re.sub(r"[^\w\s.-]", "", text.lower())
    return re.sub(r"^[^a-z]+", "", "-".join(text.split()))


def set_apart(text, taken):
    "Headings that are called as a symbol of the page get an anchor of their own, so that links lead to the symbol"

    def replace(match):
        name = heading_anchor(match[1])
        return match[0] if match[2] or name not in taken else f"{match[0].rstrip()} {{#about-{name}}}"

    parts = re.split(r"(^```.*?^```)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(p if i % 2 else HEADING.sub(replace, p) for i, p in enumerate(parts))


def module_of(nb):
    "The module that a notebook exports to, None if it exports nothing"
    found = (c.directives_.get("default_exp") for c in nb.cells if c.cell_type == "code")
    return next((d[0] for d in found if d), None)


# ## Links


@cache
def index(nbs: Path):
    "Where each public symbol is described: name -> pages, relative to `nbs`"
    found = defaultdict(list)
    for path in sorted(nbs.rglob("*.ipynb")):
        if any(p[0] in "._" for p in path.relative_to(nbs).parts):
            continue
        for cell in NBProcessor(path).nb.cells:
            for name, _ in definitions(cell):
                found[name].append(path.relative_to(nbs))
    return found


@cache
def names_on(page: Path, nbs: Path):
    "The public symbols that are described on `page`"
    return {name for name, pages in index(nbs).items() if page in pages}


def linker(page: Path, nbs: Path):
    "A function that turns names in backticks into links: to this page first, else to the only page that has the name"
    known = index(nbs)

    def target(name):
        pages = [*dict.fromkeys(known.get(name, []))]
        if page not in pages and len(pages) != 1:
            return None
        at = page if page in pages else pages[0]
        up = "" if at == page else "../" * (len(page.parts) - 1) + at.as_posix()
        return f"{up}#{anchor(name, names_on(at, nbs))}"

    def replace(match):
        to = target(match[1])
        return f"[{match[0]}]({to})" if to else match[0]

    def link(text):
        parts = re.split(r"(^```.*?^```|\]\([^)]*\)|\[`[^`]*`\])", text, flags=re.MULTILINE | re.DOTALL)
        plain = re.compile(r"(?<!\[)`([A-Za-z]\w*(?:\.\w+)*)(?:\(\))?`")
        return "".join(p if i % 2 else plain.sub(replace, p) for i, p in enumerate(parts))

    return lambda text: link(lower_anchors(text))


# ## Processors of nbdev


class document(Processor):
    "Put the entries of what a cell defines behind it, and link the names in prose"

    def begin(self):
        cells, nbs = [], Path(get_config().nbs_path).resolve()
        page = Path(self.nb.path_).resolve().relative_to(nbs)
        link, module = linker(page, nbs), module_of(self.nb)
        names = names_on(page, nbs)
        own = {anchor(name, names) for name in names}
        for cell in self.nb.cells:
            cells.append(cell)
            if len(cells) == 1 and page.name != "index.ipynb":
                cells.append(mk_cell(badge(f"nbs/{page.as_posix()}"), "markdown"))
            if cell.cell_type == "markdown":
                cell.source = set_apart(link(cell.source), own)
            found = definitions(cell)
            entries = [
                described(n, node, cell.source, link, source_link(module, n), anchor(n, names)) for n, node in found
            ]
            if entries:
                cells.append(mk_cell("\n".join(entries), "markdown"))
        self.nb.cells = cells


def lower_anchors(text):
    "Links to headings as pandoc spells them, `#the-idea`, where JupyterLab has `#The-idea`"
    return re.sub(r"(\]\((?!\w+:)[^)#\s]*#)([^)\s]+)", lambda m: m[1] + m[2].lower(), text)


def drop_unrun(cell):
    "Leave out what only the machinery needs: directives of tests and setup"
    if cell.cell_type == "code":
        cell.source = re.sub(r"^#\|\s*(test|test_setup|slow|gpu|hub)\b.*\n?", "", cell.source, flags=re.MULTILINE)


class Pages(FilterDefaults):
    "The processors of a page: nbdev's own, but for those that run code or link names"

    def base_procs(self):
        out = {"add_show_docs", "exec_show_docs", "clean_show_doc", "ai_magics", "add_links", "add_fold", "mv_exports"}
        kept = [p for p in super().base_procs() if p.__name__ not in out]
        return [kept[0], document, *kept[1:], drop_unrun]
