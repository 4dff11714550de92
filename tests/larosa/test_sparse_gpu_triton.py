"The CUDA step against plain torch and `transformers`, through Triton's interpreter where there is no GPU"

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no CUDA device: set TRITON_INTERPRET=1 to run the kernels in the interpreter", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from llmopt.larosa.sparse_cpu import DENSE, DecodeStep, step_model  # noqa: E402
from llmopt.larosa.sparse_gpu import (
    CudaStep,
    benchmark_cuda,
    benchmark_products,
    cuda_step,
    folded_weights,
    triton_attend,
    triton_dense,
    triton_gate,
)  # noqa: E402

SMALL = dict(hidden=32, layers=2, intermediate=48, heads=4, kv_heads=2, vocab=100, context=7, device=DEVICE)
LIMIT = dict(float32=1e-5, bfloat16=2e-2)
FORMS = dict(sparse=[dict(block_n=32, split=2), dict(block_n=33)], rows=[dict(rows=16, block_d=32)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", [dict(rows=4, block_d=16), dict(rows=2, block_d=64, stages=1)])
def test_dense_product_with_norm_and_residual(form, dtype):
    torch.manual_seed(0)
    weight, x, residual = (torch.randn(shape, device=DEVICE).to(dtype) for shape in ((37, 50), (2, 50), (2, 37)))
    close = dict(rtol=1e-4, atol=1e-4) if dtype == torch.float32 else dict(rtol=2e-2, atol=1e-1)
    torch.testing.assert_close(triton_dense(weight, x, residual, **form), x @ weight.t() + residual, **close)
    normal = torch.nn.functional.rms_norm(x, (50,), eps=1e-5)
    torch.testing.assert_close(triton_dense(weight, x, eps=1e-5, **form), normal @ weight.t(), **close)
    gate, up = (normal @ weight[:36].t()).view(2, 18, 2).unbind(-1)
    torch.testing.assert_close(
        triton_dense(weight[:36], x, None, 1e-5, True, **form), torch.nn.functional.silu(gate) * up, **close
    )


def test_gate():
    torch.manual_seed(0)
    gate, up = torch.randn(2, 2, 45, device=DEVICE)
    torch.testing.assert_close(triton_gate(torch.stack([gate, up], -1).flatten(1)), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("context", [0, 5, 200])
def test_attention_of_two_tokens_with_grouped_queries(context):
    torch.manual_seed(0)
    n, m, d = 4, 2, 16
    qkv, angle = torch.randn(2, (n + 2 * m) * d, device=DEVICE), torch.rand(d // 2, device=DEVICE).repeat(2)
    keys, values = torch.randn(2, 2, m, context + 1, d, device=DEVICE)
    q, k, v = qkv.view(2, n + 2 * m, 1, d).split([n, m, m], 1)
    q, k = (t * angle.cos() + torch.cat([-t[..., d // 2 :], t[..., : d // 2]], -1) * angle.sin() for t in (q, k))
    all_k, all_v = (torch.cat([old[:, :, :context], new], 2) for old, new in ((keys, k), (values, v)))
    y = triton_attend(qkv, keys, values, angle.cos(), angle.sin())
    torch.testing.assert_close(
        y,
        torch.nn.functional.scaled_dot_product_attention(q, all_k, all_v, enable_gqa=True).reshape(2, -1),
        rtol=1e-4,
        atol=1e-5,
    )
    torch.testing.assert_close(keys, all_k)
    torch.testing.assert_close(values, all_v)


@pytest.mark.skipif(DEVICE == "cuda", reason="compares with a step on the CPU")
@pytest.mark.parametrize("way", ["cublas", "rows", "channels", "sparse"])
def test_dense_steps_equal_those_of_the_cpu(way):
    model = step_model(32, 2, 48, 4, 2, 100, "float32")
    for name, p in model.named_parameters():
        if "norm" in name:
            p.data.uniform_(0.5, 2)
    step, other = CudaStep(folded_weights(model), 7), DecodeStep(model, DENSE["linear"], 7)
    step.token.fill_(5)
    other.keys, other.values = step.keys.clone(), step.values.clone()
    torch.testing.assert_close(step(way), other(5), rtol=1e-4, atol=1e-4)
    assert not step.counters.any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_agree_with_the_reference_on_the_same_channels(dtype):
    step = cuda_step(**SMALL, dtype=dtype)
    for way, level in (
        ("cublas", 0.0),
        ("rows", 0.0),
        ("channels", 0.0),
        ("sparse", 0.0),
        ("sparse", 0.4),
        ("sparse", 0.75),
    ):
        assert step.error(way, level) < LIMIT[dtype], (way, level)
    kept = []
    y = step("sparse", 0.5, kept)
    assert [int(k.sum()) for k in kept] == 2 * [16, 16, 16, 24]
    assert (y.float() - step.reference()).norm() > 0.05 * y.float().norm()  # half of the inputs do matter


def test_benchmark_lists_what_failed_and_what_ran():
    step, seen = cuda_step(**SMALL), []
    rows = benchmark_products(step, 1e9, (0.5, 0.75), rounds=1, inner=1, forms=FORMS, report=seen.append)
    assert rows == seen and {r["name"] for r in rows} == {"qkv", "o", "gate_up", "down", "head"}
    failed = [r for r in rows if "error" in r]
    assert len(failed) == 4 and all(r["form"] == dict(block_n=33) for r in failed)
    assert step.options["o", "sparse"] == FORMS["sparse"][0] and step.options["head"] in ("rows", "cublas")
    rows = benchmark_cuda((0.5,), rounds=1, inner=1, read=1e9, step=step)
    assert [(r["arm"], r["level"]) for r in rows] == [
        ("cublas", 0.0),
        ("rows", 0.0),
        ("channels", 0.0),
        ("sparse", 0.5),
    ] and not any("error" in r for r in rows)
    assert (
        min(r["vs_best_dense"] for r in rows[:3]) <= 1.0
        and rows[3]["bytes"] < rows[0]["bytes"]
        and rows[3]["bound_ratio"] > 1
    )


def test_a_step_that_is_off_is_not_timed():
    step = cuda_step(**SMALL)
    step.layers[0]["down"].rows = -step.layers[0]["down"].rows
    rows = benchmark_cuda((0.5,), rounds=1, inner=1, read=1e9, step=step)
    assert ["off the reference" in r.get("error", "") for r in rows] == [False, False, True, True]
