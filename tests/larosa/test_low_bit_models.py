"Models whose weights are kept in 8 or 4 bits compute with the weights that these stand for, and with nothing else."

import copy

import pytest
import torch

from helpers import logits, small_model, tiny
from larosa.models import exact
from llmopt.core.threads import usable_threads
from llmopt.engine import EnhancedFusedLLMEngine
from llmopt.errors import ConfigError, UnsupportedModelError
from llmopt.larosa import (
    LaRoSAConfig,
    SimpleLaRoSA,
    dense,
    keep_topk,
    projections,
    sparse_linear,
    sparse_shapes,
    traffic,
)
from llmopt.larosa.low_bits import pack_rows, unpack_rows
from llmopt.larosa.rotation import Conv1D, convert
from llmopt.larosa.sparse_linear import SparseLinear

FAMILIES = "llama", "smollm", "mistral", "qwen2", "qwen3", "phi3", "gpt2", "phi2"


def rounded(model, bits):
    "A copy of `model` with the weights that packed rows stand for, head and projections apart."
    width = model.get_input_embeddings().weight.shape[1]
    q = {(i, j): torch.eye(width) for i in range(model.config.num_hidden_layers) for j in (0, 1)}
    new = convert(model, q)  # plain linear maps in every family
    maps = [(m, bits) for m in projections(new).values()] + [(new.lm_head, 8)]
    new.lm_head.weight = torch.nn.Parameter(new.lm_head.weight.clone())  # apart from the embeddings
    for m, b in maps:
        assert not isinstance(m, Conv1D)
        m.weight.data = unpack_rows(pack_rows(m.weight, b)).to(m.weight.dtype)
    return new


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rounding_alone(family, bits):
    "Prompts, and tokens one by one over a cache, in float32."
    model, ids = exact(family)
    model, ids = model.float(), ids[:1, :12]
    new = SimpleLaRoSA(0.0, bits=bits).apply(model)
    want = rounded(model, bits)(ids).logits
    assert (new(ids).logits - want).abs().max() < 1e-4 * want.abs().max()
    past, steps = None, []
    for i in range(ids.shape[1]):
        out = new(ids[:, i : i + 1], past_key_values=past, use_cache=True)
        past = out.past_key_values
        steps.append(out.logits[:, -1])
    assert (torch.stack(steps, 1) - want).abs().max() < 1e-4 * want.abs().max()


@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_dropping_and_rounding(bits):
    "A sparse step reads the channels of largest input of the rounded weights."
    model, ids = small_model(), torch.arange(9)[None]
    larosa = SimpleLaRoSA(0.5, bits=bits, rotation="none", heads=False, allocation="uniform", tokens="all")
    new = larosa.apply(model, torch.arange(512).view(4, 128) % 4096)
    reference = rounded(model, bits)
    for m in projections(reference).values():
        k = m.in_features - round(0.5 * m.in_features)
        m.register_forward_pre_hook(lambda m, args, k=k: keep_topk(args[0], k))
    a, b = logits(new, ids), logits(reference, ids)
    assert (a - b).abs().max() < 1e-3 * b.abs().max()
    assert larosa.traffic.skipped == pytest.approx(
        0.5 * bits / (bits + {8: 0.5, 4: 1.0}[bits]) * larosa.traffic.linears, rel=0.02
    )
    with dense(new):
        plain = logits(new, ids)
    assert (plain - logits(rounded(model, bits), ids)).abs().max() < 1e-3 * plain.abs().max()


@pytest.mark.parametrize("n", [1, 2, 8])
@torch.no_grad()
def test_any_number_of_threads(n, monkeypatch):
    "Whatever torch has; the kernel shares its work among as many."
    monkeypatch.setattr(torch, "get_num_threads", lambda: n)
    layer, x = SparseLinear(torch.randn(100, 200), bits=4), torch.randn(2, 200)
    assert usable_threads(n) >= 1
    assert (layer(x) - x @ layer.weight.T).abs().max() < 1e-4


@torch.no_grad()
def test_without_the_kernel_the_result_is_the_same(monkeypatch):
    model, ids = small_model(), torch.arange(5)[None]
    new = SimpleLaRoSA(0.0, bits=8).apply(model)
    want = logits(new, ids)
    for name in ("numba", "_AXPY"):
        monkeypatch.setattr(sparse_linear, name, None if name == "numba" else {})
    slow = SimpleLaRoSA(0.0, bits=8).apply(model)
    assert projections(slow)["0.mlp.up_proj"].linear.kernel == "bags"
    assert (logits(slow, ids) - want).abs().max() < 1e-4


def test_a_model_in_few_bits_is_smaller_and_stays_so():
    "What is stored follows the bits; a change of precision and a copy leave the codes alone."
    model = small_model()
    eight, four = (SimpleLaRoSA(0.0, bits=b).apply(model) for b in (8, 4))
    plain = traffic(model)
    for new, bits in ((eight, 8.5), (four, 5)):
        t = traffic(new)
        assert t.linears == pytest.approx(plain.linears * bits / 32, rel=0.1)
        assert t.head == pytest.approx(plain.head * 8.5 / 32, rel=0.05)
    again = copy.deepcopy(eight).bfloat16()
    for a, b in zip(projections(again).values(), projections(eight).values()):
        assert torch.equal(a.linear.rows, b.linear.rows) and torch.equal(a.linear.scales, b.linear.scales)
    assert sparse_shapes(eight) and not sparse_shapes(model)


def test_in_an_engine():
    "A recipe holds the bits, answers are made with them, and nothing is calibrated."
    e = EnhancedFusedLLMEngine(tiny(), recipe="larosa:sparsity=0,bits=8,when=always", max_new_tokens=6)
    m = e.run("What is machine learning?")
    assert m.completion_tokens and e.recipe.larosa == LaRoSAConfig(0.0, bits=8, when="always")
    assert e.sparse_shapes and traffic(e.lm.model).skipped == 0


@pytest.mark.parametrize("bits", [5, 0, 32, "8", None, True, 8.5, [8]])
def test_bits_that_do_not_exist(bits):
    with pytest.raises(ConfigError, match="bits is 16"):
        LaRoSAConfig(bits=bits)


def test_a_model_that_is_quantized_already():
    model = SimpleLaRoSA(0.0, bits=8).apply(small_model())
    with pytest.raises(UnsupportedModelError, match="already converted"):
        SimpleLaRoSA(0.0, bits=4).apply(model)


def test_rounding_alone_has_no_calibration_to_save(tmp_path):
    larosa = SimpleLaRoSA(0.0, bits=8)
    larosa.apply(small_model())
    with pytest.raises(ConfigError, match="nothing was calibrated"):
        larosa.save(tmp_path)
