"Stretched rotary positions of a GGUF file are those of the model that it was made from, or the file is refused."

import numpy as np
import pytest
import torch

from helpers import logits
from llmopt.core import load
from llmopt.errors import ModelError

from .gguf_files import TOKENS, random_model, write_gguf

THETA = 10000.0


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path / "cache"))


def same(path, model):
    "Do the loaded file and `model` give the same logits for 200 tokens?"
    x = torch.randint(len(TOKENS), (1, 200), generator=torch.Generator().manual_seed(0))
    return torch.allclose(logits(load(str(path), "cpu").model, x), logits(model, x), rtol=1e-3, atol=1e-3)


def llama3_factors(factor, context, dim=8):
    "The tensor `rope_freqs` as llama.cpp's converter writes it."
    wavelength = 2 * np.pi * THETA ** (np.arange(0, dim, 2) / dim)
    smooth = np.clip((context / wavelength - 1) / 3, 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


@pytest.mark.parametrize("context", [2048, 8192])
def test_llama_3(context, tmp_path):
    rope = dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=THETA)
    model = random_model(rope_parameters=rope | dict(original_max_position_embeddings=context))
    write_gguf(tmp_path / "m.gguf", model, tensors={"rope_freqs.weight": llama3_factors(32, context)})
    assert same(tmp_path / "m.gguf", model)
    assert load(str(tmp_path / "m.gguf"), "cpu").model.config.rope_parameters["rope_type"] == "llama3"


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_linear_and_yarn(kind, tmp_path):
    rope = dict(rope_type=kind, factor=4.0, rope_theta=THETA)
    entries = {"llama.rope.scaling.type": kind, "llama.rope.scaling.factor": 4.0}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = entries["llama.rope.scaling.original_context_length"] = 128
    model = write_gguf(tmp_path / "m.gguf", random_model(rope_parameters=rope), entries=entries)
    assert same(tmp_path / "m.gguf", model)
    plain = random_model()
    plain.load_state_dict(model.state_dict())
    assert not same(tmp_path / "m.gguf", plain)  # the stretch is seen at all


def test_longrope(tmp_path):
    short, long = [1.0, 1.5, 2.0, 3.0], [1.0, 4.0, 16.0, 64.0]
    rope = dict(rope_type="longrope", short_factor=short, long_factor=long, rope_theta=THETA)
    rope["original_max_position_embeddings"] = 128
    model = random_model("phi3", rope_parameters=rope, original_max_position_embeddings=128)
    tensors = {f"rope_factors_{n}.weight": np.array(f) for n, f in dict(short=short, long=long).items()}
    entries = {"phi3.rope.scaling.original_context_length": 128}
    write_gguf(tmp_path / "m.gguf", model, tensors=tensors, entries=entries)
    assert same(tmp_path / "m.gguf", model)


def test_a_size_that_is_missing(tmp_path):
    "A header that speaks of other layers than there are is refused; nothing is made up."
    write_gguf(tmp_path / "m.gguf", entries={"llama.unknown": 1})
    with pytest.warns(UserWarning, match="llama.unknown|unknown"):
        load(str(tmp_path / "m.gguf"), "cpu")
    last = "attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down attn_norm ffn_norm".split()
    write_gguf(tmp_path / "n.gguf", leave_out=[f"blk.1.{leaf}.weight" for leaf in last])
    with pytest.raises(ModelError, match="speaks of 2 layers, and it holds 1"):
        load(str(tmp_path / "n.gguf"), "cpu")
