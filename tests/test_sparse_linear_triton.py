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
    for batch, dim in (1, 1), (3, 37), (2, 128), (1, 300):
        x = inputs(kind, batch, dim, dtype)
        for k in {0, 1, dim//2, dim-1, dim}:
            kept, values = triton_select(x, k)
            assert torch.equal(kept.long().cpu(), select(x.cpu(), k))
            assert torch.equal(values, x.gather(1, kept.long()).float())


def test_extreme_magnitudes_are_ordered():
    x = torch.tensor([[3e38, 1e-45, 0., -1e-38, float('inf'), -1e-45, float('nan')]], device=DEVICE)
    for k in range(8): assert torch.equal(triton_select(x, k)[0].long().cpu(), select(x.cpu(), k))


@pytest.mark.parametrize('dtype', DTYPES)
def test_norm_comes_before_selection(dtype):
    x = inputs('random', 2, 50, dtype)
    normal = (x.float()*torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True)+1e-6)).to(dtype)
    kept, values = triton_select(x, 20, eps=1e-6)
    assert torch.equal(kept.long().cpu(), select(normal.cpu(), 20))
    torch.testing.assert_close(values.to(dtype), normal.gather(1, kept.long()))     # the interpreter rounds bfloat16 towards zero
    kept, values = triton_select(x, eps=1e-6, dtype=dtype)
    assert kept is None
    torch.testing.assert_close(values, normal)


@pytest.mark.parametrize('dtype', DTYPES)
def test_gate_comes_before_selection(dtype):
    gate, up = inputs('random', 2, 74, dtype).chunk(2, 1)
    gated = torch.nn.functional.silu(gate)*up
    kept, values = triton_select(torch.cat([gate, up], 1), 20, gated=True)
    assert torch.equal(kept.long().cpu(), select(gated.cpu(), 20))
    torch.testing.assert_close(values.to(dtype), gated.gather(1, kept.long()))
    assert triton_select(torch.cat([gate, up], 1), 37, gated=True)[1].shape == (2, 37)


def test_what_cannot_be_selected_is_refused():
    x = torch.randn(1, 8, device=DEVICE)
    for k in -1, 9:
        with pytest.raises(ValueError, match='between 0 and D=8'): triton_select(x, k)
    with pytest.raises(ValueError, match='15 bits'): triton_select(x.expand(1, 8).repeat(1, 2**12), 3)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('k', [0, 1, 31, 90])
def test_product_is_the_masked_dense_product(k, dtype):
    torch.manual_seed(0)
    weight = torch.randn(133, 90, device=DEVICE).to(dtype)
    lin, x = SparseLinear(weight), inputs('random', 3, 90, dtype)
    kept, values = triton_select(x, k)
    y = triton_product(lin.rows, kept, values, 133, split=3, block_n=64, unroll=2)
    want = masked_linear(x.double(), weight.double(), kept.long())
    assert (y.double()-want).abs().max() <= (1e-4 if dtype == torch.float32 else 2*torch.finfo(dtype).eps*max(1, want.abs().max()))
    assert torch.equal(y, triton_product(lin.rows, kept, values, 133, split=3, block_n=64, unroll=2))
    torch.testing.assert_close(y, bag_product(lin.rows, kept.long(), values.to(dtype))[:, :133], rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize('form', [dict(split=1), dict(split=5, stages=1), dict(split=40, block_n=128), {}])
def test_residual_is_added_and_counters_are_zero_again(form):
    torch.manual_seed(0)
    rows, x, residual = torch.randn(90, 144, device=DEVICE), inputs('random', 2, 90, torch.float32), torch.randn(2, 144, device=DEVICE)
    counters = torch.zeros(8, dtype=torch.int32, device=DEVICE)
    for k in 0, 33, 90:
        kept, values = triton_select(x, k)
        for _ in '12':
            y = triton_product(rows, kept, values, 144, residual, counters, **dict(block_n=64) | form)
            torch.testing.assert_close(y, masked_linear(x, rows.t(), kept.long())+residual, rtol=1e-4, atol=1e-4)
            assert not counters.any()
    torch.testing.assert_close(triton_product(rows, None, x, 144, counters=counters, **dict(block_n=64) | form), x@rows, rtol=1e-4, atol=1e-4)


def test_rows_that_are_not_kept_are_not_read():
    rows, x = torch.randn(40, 16, device=DEVICE), torch.ones(1, 40, device=DEVICE)
    kept = torch.arange(0, 40, 3, dtype=torch.int32, device=DEVICE)[None]
    want = rows[kept[0].long()].sum(0, keepdim=True)
    hidden = torch.full_like(rows, float('nan'))
    hidden[kept[0].long()] = rows[kept[0].long()]
    torch.testing.assert_close(triton_product(hidden, kept, x[:, :kept.shape[1]], 16, split=2, block_n=16), want, rtol=1e-4, atol=1e-4)


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
