"""The script that times everything in turn: what it does without the packages that it compares."""

import importlib.util

import torch

from helpers import ROOT


def test_bytes_of_quantized_weights_are_those_of_their_parts():
    spec = importlib.util.spec_from_file_location("rivals", ROOT / "nbs/research/rivals.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.nbytes(torch.nn.Parameter(torch.zeros(3, 4))) == 48
    names = script.variants()
    assert len(names) == len({*names}) and {*script.FLATTERED, *script.IN_BFLOAT16, script.REFERENCE} <= {*names}
