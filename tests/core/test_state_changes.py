"Whatever changes what a model computes changes its state: each change here changes logits, and the state must follow."

import functools
import sys
import types

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers.models.llama import modeling_llama

from helpers import random_ids, small_model
from llmopt.core.state_hash import active_mode, model_state

IDS = random_ids(12)
ROPE, MLP, LINEAR = modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaMLP.forward, torch.nn.Linear.forward
SCALE, TABLE, OPTIONS = 1.0, torch.ones(32), {"scale": 1.0}


class Options:
    scale = 1.0


def helper(x):
    return x


class Derived(modeling_llama.LlamaMLP):
    pass


class Outer(torch.nn.Module):
    "A module with everything on its class."

    options, table = {"scale": 1.0}, torch.ones(1)
    static = staticmethod(lambda x: x)

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    @property
    def scale(self):
        return SCALE

    def forward(self, x):
        return self.static(self.inner(x)) * self.scale * self.table * self.options["scale"]


def reads_globals(self, x):
    return helper(MLP(self, x) * SCALE * TABLE * OPTIONS["scale"] * Options.scale)


def scaled(s):
    return lambda self, x: MLP(self, x) * s


def default(s):
    def forward(self, x, scale=s):
        return MLP(self, x) * scale

    return forward


@functools.wraps(MLP)
def wrapped(self, x):
    return MLP(self, x) * 2


def rope(q, k, *args, **kwargs):
    return ROPE(1.5 * q, k, *args, **kwargs)


HERE = sys.modules[__name__]
CHANGES = {  # name: (object, attribute, before, after)
    "function of the modeling module": (modeling_llama, "apply_rotary_pos_emb", ROPE, rope),
    "functools.wraps": (modeling_llama.LlamaMLP, "forward", MLP, wrapped),
    "closure": (modeling_llama.LlamaMLP, "forward", scaled(1.5), scaled(2.0)),
    "default": (modeling_llama.LlamaMLP, "forward", default(1.5), default(2.0)),
    "torch.nn.Linear": (torch.nn.Linear, "forward", LINEAR, lambda self, x: LINEAR(self, x) * 1.1),
    "global number": (HERE, "SCALE", 1.0, 2.0),
    "global tensor": (HERE, "TABLE", torch.ones(32), torch.ones(32) * 2),
    "global dict": (HERE, "OPTIONS", {"scale": 1.0}, {"scale": 2.0}),
    "global class": (Options, "scale", 1.0, 2.0),
    "global function": (HERE, "helper", helper, lambda x: 2 * x),
    "static method": (Outer, "static", staticmethod(lambda x: x), staticmethod(lambda x: 2 * x)),
    "tensor of a class": (Outer, "table", torch.ones(1), torch.ones(1) * 2),
    "dict of a class": (Outer, "options", {"scale": 1.0}, {"scale": 2.0}),
}


@pytest.fixture
def model():
    "Layer 0 reads globals, layer 1 has a module of a class of ours around one with a base class."
    m = small_model(initializer_range=0.2)
    first, second = m.model.layers[0].mlp, m.model.layers[1].mlp
    first.forward = types.MethodType(reads_globals, first)
    second.__class__ = Derived
    m.model.layers[1].mlp = Outer(second)
    return m


def seen(m):
    "Logits and state."
    with torch.inference_mode():
        return m(IDS).logits, model_state(m)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_changes_the_state(model, change, monkeypatch):
    where, name, before, after = CHANGES[change]
    monkeypatch.setattr(where, name, before)
    logits, state = seen(model)
    assert seen(model)[1] == state
    monkeypatch.setattr(where, name, after)
    changed, other = seen(model)
    assert not torch.equal(logits, changed) and other != state
    monkeypatch.setattr(where, name, before)
    assert seen(model)[1] == state


def test_a_function_of_torch_that_a_class_of_ours_names(monkeypatch):
    "It is named behind two dots."

    class Named(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.silu(x)

    state = model_state(Named())
    monkeypatch.setattr(torch.nn.functional, "silu", lambda x: x)
    assert model_state(Named()) != state


def test_modes_of_torch_are_seen():
    class Mode(TorchFunctionMode):
        def __torch_function__(self, f, types, args=(), kwargs=None):
            return f(*args, **(kwargs or {}))

    with Mode():
        assert active_mode() == "Mode"
    with torch.device("cpu"), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert active_mode() is None
