"The Triton kernels against the CPU's way, through Triton's interpreter where there is no GPU"
import os

import pytest
import torch

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
if DEVICE == 'cpu' and os.environ.get('TRITON_INTERPRET') != '1':
    pytest.skip('no CUDA device: set TRITON_INTERPRET=1 to run the kernels in the interpreter', allow_module_level=True)
pytest.importorskip('triton', reason='Triton is not installed: pip install triton')

from llmopt.sparse_linear import SparseLinear, bag_product, masked_linear, select, triton_product, triton_select  # noqa: E402

DTYPES = torch.bfloat16, torch.float16, torch.float32


def inputs(kind, batch, dim, dtype):
    "Random numbers, few distinct ones (so that nearly all are ties), or zeros, the same on every device"
    torch.manual_seed(dim)
    x = dict(random=torch.randn(batch, dim), ties=torch.randint(-2, 3, (batch, dim)), zeros=torch.zeros(batch, dim))[kind]
    return x.to(dtype).to(DEVICE)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('kind', ['random', 'ties', 'zeros'])
def test_keeps_what_the_cpu_keeps(kind, dtype):
    for batch, dim in (1, 1), (3, 37), (2, 128):
        x = inputs(kind, batch, dim, dtype)
        for k in {0, 1, dim//2, dim-1, dim}:
            kept, values = triton_select(x, k)
            assert torch.equal(kept.long().cpu(), select(x.cpu(), k))
            assert torch.equal(values, x.gather(1, kept.long()))


def test_extreme_magnitudes_are_ordered():
    x = torch.tensor([[3e38, 1e-45, 0., -1e-38, float('inf'), -1e-45, float('nan')]], device=DEVICE)
    for k in range(8): assert torch.equal(triton_select(x, k)[0].long().cpu(), select(x.cpu(), k))


@pytest.mark.parametrize('dtype', DTYPES)
def test_norm_comes_before_selection(dtype):
    x = inputs('random', 2, 50, dtype)
    normal = (x.float()*torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True)+1e-6)).to(dtype)
    kept, values = triton_select(x, 20, eps=1e-6)
    assert torch.equal(kept.long().cpu(), select(normal.cpu(), 20))
    torch.testing.assert_close(values, normal.gather(1, kept.long()))


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('k', [0, 1, 31, 90])
def test_product_is_the_masked_dense_product(k, dtype):
    torch.manual_seed(0)
    weight = torch.randn(133, 90, device=DEVICE).to(dtype)
    lin, x = SparseLinear(weight), inputs('random', 3, 90, dtype)
    kept, values = triton_select(x, k)
    y = triton_product(lin.rows, kept, values, 133, split=3, block_n=64, block_k=8)
    want = masked_linear(x.double(), weight.double(), kept.long())
    assert (y.double()-want).abs().max() <= (1e-4 if dtype == torch.float32 else 2*torch.finfo(dtype).eps*max(1, want.abs().max()))
    assert torch.equal(y, triton_product(lin.rows, kept, values, 133, split=3, block_n=64, block_k=8))
    torch.testing.assert_close(y, bag_product(lin.rows, kept.long(), values)[:, :133], rtol=2e-2, atol=1e-3)


@pytest.mark.skipif(DEVICE == 'cpu', reason='no CUDA device')
def test_works_in_a_cuda_graph():
    lin, x = SparseLinear(torch.randn(200, 90, device=DEVICE)), inputs('random', 1, 90, torch.float32)
    def run(): return triton_product(lin.rows, *triton_select(x, 40, eps=1e-6), 200)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side): run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): y = run()
    x.copy_(inputs('random', 1, 90, torch.float32).flip(1))
    graph.replay()
    assert torch.equal(y, run())
