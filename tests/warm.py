"What the fork server loads, and does once, for all its copies: what most notebooks need. None of it starts a thread."

import importlib
import os

LIBRARIES = [  # this package last
    "torch",
    "transformers.generation.utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "numba",
    "scipy.stats",
    "pydantic.json_schema",
    "gguf",
    "platformdirs",
    "rouge_score.rouge_scorer",
    "pandas",
    "matplotlib.pyplot",
    "seaborn",
    "ipywidgets",
    "nbdev.test",
    "openai.resources.chat",
    "openai.types.responses",
    "llmopt.cli",
    "llmopt.benchmark.suites",
    "llmopt.evaluation.comparison",
    "llmopt.visualization.charts",
    "llmopt.server",
]


def load(name):
    "Import `name`, if it is installed."
    try:
        importlib.import_module(name)
    except ImportError:
        pass


def first_uses():
    "What these libraries leave for their first use, and then keep: half a second of every process."
    from numba.core.registry import cpu_target
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("llama")  # compiles 900 patterns of names of weights
    cpu_target.typing_context.refresh()
    cpu_target.target_context.refresh()


if "PYTHONPATH" in os.environ:  # as it was before `forked.py` put this folder in front
    os.environ["PYTHONPATH"] = os.environ["PYTHONPATH"].partition(os.pathsep)[2]
for name in LIBRARIES:
    load(name)
first_uses()
