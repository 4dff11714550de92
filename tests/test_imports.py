"""Who may know whom: imports go down the table of DESIGN only, in no circle, and take no private name.

Imports are read from the source, those inside functions too, so a late import hides no arrow.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "llmopt"
MODULES = {
    "llmopt." + ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
    for p in ROOT.rglob("*.py")
    if "assets" not in p.parts and p.name != "_modidx.py" and p != ROOT / "__init__.py"
}
METHODS = {"word_removal", "adaptivocab", "larosa", "kv_cache"}
KNOWS = {  # a room and the rooms that it may import
    "errors": set(),
    "core": {"errors"},
    **{m: {"errors", "core"} for m in METHODS},
    "engine": {"errors", "core", *METHODS},
    "evaluation": {"errors", "core", *METHODS, "engine"},
    "visualization": {"errors", "evaluation"},
    "server": {"errors", "core", "engine", "evaluation"},
    "benchmark": {"errors", "core", *METHODS, "engine", "evaluation", "visualization", "server"},
    "cli": {"errors", "core", *METHODS, "engine", "evaluation", "visualization", "server", "benchmark"},
}


def room(module):
    "The room of a module: `kv_cache` of `llmopt.kv_cache.slab`"
    return module.split(".")[1]


def absolute(node, module, is_package):
    "The module that an `ImportFrom` names, in full"
    if not node.level:
        return node.module
    base = module.split(".")[: None if is_package and node.level == 1 else (1 if is_package else 0) - node.level]
    return ".".join([*base, *([node.module] if node.module else [])])


def imports(module):
    "Pairs of what `module` imports of llmopt: the module, and the name or None"
    path, found = MODULES[module], []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(a.name, None) for a in node.names]
        if isinstance(node, ast.ImportFrom):
            source = absolute(node, module, path.name == "__init__.py")
            for a in node.names:
                inner = f"{source}.{a.name}"
                found += [(inner, None)] if inner in MODULES else [(source, a.name)]
    return [(m, n) for m, n in found if m in MODULES]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down_only(module):
    known = KNOWS[room(module)] | {room(module)}
    up = [m for m, _ in imports(module) if room(m) not in known]
    assert not up, f"{module} may not know {', '.join(up)}"


def test_charts_know_results_and_files_alone():
    "Of evaluation, charts need the schema of results and how a file is written."
    seen = {m for module in MODULES if room(module) == "visualization" for m, _ in imports(module)}
    assert {m for m in seen if room(m) == "evaluation"} <= {"llmopt.evaluation.files", "llmopt.evaluation.results"}


def circles():
    "Circles of modules that import one another"
    graph = {m: {i for i, _ in imports(m) if i != m} for m in MODULES}
    for start in graph:
        reached, todo = set(), [start]
        while todo:
            new = graph[todo.pop()] - reached
            reached |= new
            todo += new
        if start in reached:
            yield start


def test_no_circles():
    assert not [*circles()]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_private_name_of_another_module(module):
    assert not [f"{m}.{n}" for m, n in imports(module) if n and n.startswith("_") and m != module]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_methods_stand_where_their_class_stands(module):
    "`@patch` adds methods to classes of this module only."
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    own = {n.name for n in tree.body if isinstance(n, ast.ClassDef)}
    patched = {
        ast.unparse(f.args.args[0].annotation)
        for f in tree.body
        if isinstance(f, ast.FunctionDef) and any("patch" in ast.unparse(d) for d in f.decorator_list)
    }
    assert patched <= own


def test_charts_load_no_torch():
    code = "import sys, llmopt.visualization, llmopt.errors; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent).returncode == 0


def page_of(module):
    "The number of the notebook that a module is exported from, None for a file written by hand"
    found = re.search(r"File to edit: .*/(\d+)_\w+\.ipynb", MODULES[module].read_text(encoding="utf-8")[:400])
    return int(found[1]) if found else None


def test_a_page_has_a_number_of_its_own():
    "Modules of one package come from notebooks of different numbers"
    numbers = [(room(m), page_of(m)) for m in MODULES if m.count(".") > 1 and page_of(m) is not None]
    assert len(numbers) > 50 and len(set(numbers)) == len(numbers)


def test_pages_are_numbered_in_order_of_imports():
    "A module imports from earlier pages of its package"
    arrows = [(m, other) for m in MODULES for other, _ in imports(m) if room(m) == room(other) != m]
    arrows = [(m, o) for m, o in arrows if None not in (page_of(m), page_of(o)) and m != o]
    assert len(arrows) > 50
    assert [(m, o) for m, o in arrows if page_of(o) >= page_of(m)] == []


def exported(module):
    "The names in `__all__` of a module"
    body = ast.parse(MODULES[module].read_text(encoding="utf-8")).body
    found = [n.value for n in body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
    return {name for value in found for name in ast.literal_eval(value)}


def test_no_name_of_a_package_hides_one_of_its_modules():
    "`import llmopt.larosa.x as m` takes the attribute `x` of the package, which must be the module."
    packages = {m: p for m, p in MODULES.items() if p.name == "__init__.py"}
    assert {"llmopt.larosa", "llmopt.kv_cache"} <= packages.keys() and "sparsify" in exported("llmopt.larosa")
    assert [f"{m}.{n}" for m in packages for n in exported(m) if f"{m}.{n}" in MODULES] == []
