"Where numba is missing all the same, LaRoSA takes its slower product, and says so once."

import warnings

import torch

import llmopt.larosa.sparse_linear as sparse_linear
from llmopt.larosa import SparseLinear


def test_the_fallback_is_said_once(monkeypatch):
    monkeypatch.setattr(sparse_linear, "numba", None)
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter("always")
        layers = [SparseLinear(weight) for _ in range(2)]
    assert len([m for m in w if "pip install numba" in str(m.message)]) == 1
    assert {layer.kernel for layer in layers} == {"bags"}
