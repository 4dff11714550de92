"""A system without numba: everything imports, keys and values are read by torch, and the answers are the same."""

import os
import pkgutil
import subprocess
import sys

import llmopt
from llmopt.engine import EnhancedFusedLLMEngine

QUESTION = "Please summarize the following text: " + "The glacier moves slowly down the valley. " * 40
ALONE = """
import importlib, sys
sys.modules["numba"] = None
for name in {names}:
    importlib.import_module(name)
from llmopt.engine import EnhancedFusedLLMEngine
from llmopt.kv_cache.decode_kernel import numba
assert numba is None
for recipe in {recipes}:
    print(EnhancedFusedLLMEngine("llmopt-tiny", recipe=recipe).run({question!r}, max_new_tokens=12).output_ids)
"""


def test_a_process_that_finds_no_numba():
    "A fresh process, in which no module of numba can be imported; prompts are long enough for the kernel elsewhere."
    names = [m.name for m in pkgutil.walk_packages(llmopt.__path__, "llmopt.") if m.name != "llmopt.__main__"]
    recipes = ["kv", "kv:bits=8", "kv:bits=4,budget=50%,policy=foreseen", "larosa:when=always+kv:budget=50%"]
    code = ALONE.format(names=names, recipes=recipes, question=QUESTION)
    env = os.environ | dict(OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    engines = (EnhancedFusedLLMEngine("llmopt-tiny", recipe=r) for r in recipes)
    here = [e.run(QUESTION, max_new_tokens=12).output_ids for e in engines]
    assert done.stdout.splitlines() == [str(ids) for ids in here]
