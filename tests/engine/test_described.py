"What a reader of the API is told"

import dataclasses
import inspect

from llmopt.engine import ChatMetrics


def test_every_field_of_an_answer_says_what_it_is():
    "Each field of `ChatMetrics` has a comment, on its line or on the one before."
    lines = inspect.getsource(ChatMetrics).splitlines()
    for f in dataclasses.fields(ChatMetrics):
        at = next(i for i, line in enumerate(lines) if line.startswith(f"    {f.name}:"))
        assert "  # " in lines[at] or lines[at - 1].startswith("    # "), f.name
