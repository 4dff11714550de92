"""The Triton kernels of the page on decode steps on a GPU against the CPU's way, in Triton's interpreter without a GPU.

The kernels are no part of the library: they are taken from `nbs/research/larosa_decode_step_gpu.ipynb`."""

import ast
import importlib.util
import json
import os

import pytest
import torch

from helpers import ROOT
from llmopt.errors import ConfigError
from llmopt.larosa.products import bag_product, masked_linear
from llmopt.larosa.selection import topk_channels
from llmopt.larosa.sparse_linear import SparseLinear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NO_TRITON = importlib.util.find_spec("triton") is None
INTERPRETED = DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def definitions(page):
    "The imports, constants, functions and classes of a page, as the source of a module."
    for cell in json.loads(page.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or source.startswith("#| gpu"):
            continue
        for node in ast.parse(source).body:
            constant = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).isupper()
            if constant or isinstance(node, ast.Import | ast.ImportFrom | ast.Try | ast.FunctionDef | ast.ClassDef):
                first = min([node, *getattr(node, "decorator_list", ())], key=lambda n: n.lineno).lineno
                yield "\n".join(source.split("\n")[first - 1 : node.end_lineno])


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    "What the page defines; Triton reads the source of its kernels, so it is a file."
    pytest.importorskip("ipywidgets", reason='needs the development tools: pip install -e ".[dev]"')
    path = tmp_path_factory.mktemp("page") / "gpu_kernels.py"
    found = definitions(ROOT / "nbs/research/larosa_decode_step_gpu.ipynb")
    path.write_text("\n\n\n".join(found) + "\n", encoding="utf-8")
    spec = importlib.util.spec_from_file_location("gpu_kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def gpu(page):
    "The page, where its kernels can run."
    if NO_TRITON or not INTERPRETED:
        pytest.skip("needs Triton, and a CUDA device or TRITON_INTERPRET=1 to run kernels in the interpreter")
    return page


def test_triton_is_optional(page):
    message = "pip install triton" if NO_TRITON else "not torch.float64"
    with pytest.raises(ConfigError, match=message):
        page.triton_select(torch.randn(1, 4).double(), 2)


DTYPES = torch.bfloat16, torch.float16, torch.float32


def inputs(kind, batch, dim, dtype):
    "Random numbers, few distinct ones (so that nearly all are ties), or zeros, the same on every device"
    torch.manual_seed(dim)
    x = dict(random=torch.randn(batch, dim), ties=torch.randint(-2, 3, (batch, dim)), zeros=torch.zeros(batch, dim))[
        kind
    ]
    return x.to(dtype).to(DEVICE)


def sparse(x, k):
    "x where `select` on the CPU keeps it, else 0"
    x = x.cpu()
    kept = topk_channels(x, k)
    return torch.zeros_like(x).scatter(1, kept, x.gather(1, kept)).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["random", "ties", "zeros"])
def test_keeps_what_the_cpu_keeps(gpu, kind, dtype):
    for batch, dim in (1, 1), (3, 37), (2, 128), (1, 300):
        x = inputs(kind, batch, dim, dtype)
        for k in {0, 1, dim // 2, dim - 1, dim}:
            assert torch.equal(gpu.triton_select(x, k), sparse(x, k)), (batch, dim, k)


def test_of_equal_ones_the_first_are_kept(gpu):
    for value in 1.0, -3e38, 1e-45:
        y = gpu.triton_select(torch.full((1, 70), value, device=DEVICE), 33)
        assert (y[:, :33] == value).all() and not y[:, 33:].any()


def test_extreme_magnitudes_are_ordered(gpu):
    x = torch.tensor([[3e38, 1e-45, 0.0, -1e-38, float("inf"), -1e-45, float("nan")]], device=DEVICE)
    for k in range(8):
        torch.testing.assert_close(gpu.triton_select(x, k), sparse(x, k), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_comes_before_selection(gpu, dtype):
    x = inputs("random", 2, 50, dtype)
    normal = (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype)
    y = gpu.triton_select(x, 20, eps=1e-6)
    torch.testing.assert_close(y, sparse(normal, 20))  # the interpreter rounds bfloat16 towards zero
    torch.testing.assert_close(gpu.triton_select(x, eps=1e-6), normal)


def test_what_cannot_be_selected_is_refused(gpu):
    x = torch.randn(1, 8, device=DEVICE)
    for k in -1, 9:
        with pytest.raises(ValueError, match="between 0 and D=8"):
            gpu.triton_select(x, k)
    with pytest.raises(ValueError, match="15 bits"):
        gpu.triton_select(x.expand(1, 8).repeat(1, 2**12), 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [0, 1, 31, 90])
def test_product_is_the_masked_dense_product(gpu, k, dtype):
    torch.manual_seed(0)
    weight = torch.randn(133, 90, device=DEVICE).to(dtype)
    lin, x = SparseLinear(weight), inputs("random", 3, 90, dtype)
    kept, form = topk_channels(x.cpu(), k).to(DEVICE), dict(split=3, block_n=64, unroll=2)
    y = gpu.triton_product(lin.rows, gpu.triton_select(x, k), 133, **form)
    want = masked_linear(x.double(), weight.double(), kept)
    assert (y.double() - want).abs().max() <= (
        1e-4 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps * max(1, want.abs().max())
    )
    assert torch.equal(y, gpu.triton_product(lin.rows, gpu.triton_select(x, k), 133, **form))
    torch.testing.assert_close(y, bag_product(lin.rows, kept, x.gather(1, kept))[:, :133], rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("form", [dict(split=1), dict(split=5, unroll=4), dict(split=40, block_n=128), {}])
@pytest.mark.parametrize("gated", [False, True])
def test_residual_is_added_and_counters_are_zero_again(gpu, gated, form):
    torch.manual_seed(0)
    rows, x, residual = (
        torch.randn(90, 144, device=DEVICE),
        inputs("random", 2, 90, torch.float32),
        torch.randn(2, 144, device=DEVICE),
    )
    counters = torch.zeros(8, dtype=torch.int32, device=DEVICE)
    for k in 0, 33, 90:
        want = sparse(x, k) @ rows + residual
        if gated:
            want = torch.nn.functional.silu(want[:, ::2]) * want[:, 1::2]
        for _ in "12":
            y = gpu.triton_product(
                rows, gpu.triton_select(x, k), 144, residual, gated, counters, **dict(block_n=64) | form
            )
            torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
            assert not counters.any()


def test_rows_of_zeros_are_not_read(gpu):
    torch.manual_seed(0)
    rows, x = torch.randn(40, 16, device=DEVICE), torch.ones(1, 40, device=DEVICE)
    kept = torch.arange(0, 40, 3, device=DEVICE)
    hidden, x = torch.full_like(rows, float("nan")), torch.zeros(1, 40, device=DEVICE).index_fill_(1, kept, 1.0)
    hidden[kept] = rows[kept]
    for split in 1, 2:
        torch.testing.assert_close(
            gpu.triton_product(hidden, x, 16, split=split, block_n=16, unroll=2),
            rows[kept].sum(0, keepdim=True),
            rtol=1e-4,
            atol=1e-4,
        )


@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
def test_works_in_a_cuda_graph(gpu):
    lin, x = SparseLinear(torch.randn(200, 90, device=DEVICE)), inputs("random", 1, 90, torch.float32)

    def run():
        return gpu.triton_product(lin.rows, gpu.triton_select(x, 40, eps=1e-6), 200)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    x.copy_(inputs("random", 1, 90, torch.float32).flip(1))
    graph.replay()
    assert torch.equal(y, run())


@pytest.mark.parametrize("way", ["cublas", "rows", "channels", "sparse"])
def test_a_whole_step_is_the_plain_one(gpu, way):
    step = gpu.cuda_step(32, 2, 48, 2, 1, vocab=64, dtype="float32", context=5, device=DEVICE)
    assert step.error(way, 0.5 if way == "sparse" else 0.0) < 1e-4
