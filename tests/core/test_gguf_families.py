"A model that was written as GGUF and converted back says what it said before, in every family."

import pytest
import torch

from helpers import logits
from llmopt.core import load

from .gguf_files import TOKENS, random_model, write_gguf


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path / "cache"))


def ids(n=40):
    "(1, n) token ids."
    return torch.randint(len(TOKENS), (1, n), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["llama", "smollm", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3"])
def test_logits_are_those_of_the_original(family, tmp_path):
    model = write_gguf(tmp_path / "m.gguf", random_model(family))
    lm = load(str(tmp_path / "m.gguf"), "cpu")
    assert lm.model.config.model_type == model.config.model_type
    assert lm.model.dtype == torch.float32
    torch.testing.assert_close(logits(lm.model, ids()), logits(model, ids()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_formats(format, tmp_path):
    "Rounded weights are on their grid; the loaded model is near the original."
    model = write_gguf(tmp_path / "m.gguf", format=format)
    lm = load(str(tmp_path / "m.gguf"), "cpu")
    q = lm.quantization
    assert q.tensors == {format: 16, "F32": 5} and sum(q.weights.values()) == lm.n_params
    assert q.on_grid(format) in ((True,) if format.startswith("Q") else (None,))
    error = (lm.model.model.layers[0].mlp.up_proj.weight - model.model.layers[0].mlp.up_proj.weight).abs().max()
    assert 0 < error < {"F16": 1e-3, "BF16": 1e-2, "Q8_0": 1e-2}.get(format, 0.1)
