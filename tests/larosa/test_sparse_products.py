"Selection and products agree with their references for every shape, precision and kind of number; the rest is refused."

import pytest
import torch

from llmopt.benchmark.clock import torch_threads
from llmopt.errors import ConfigError
from llmopt.larosa.axpy import axpy_product, numba
from llmopt.larosa.low_bits import BITS, pack_rows, packed_product
from llmopt.larosa.products import bag_product, n_pieces, product_bytes
from llmopt.larosa.selection import select_by_sorting, topk_channels
from llmopt.larosa.sparse_linear import SparseLinear

# private: the way without numba, which a machine with numba does not take
from llmopt.larosa.selection import _as_integers, _select_torch  # isort: skip

DTYPES = torch.float64, torch.float32, torch.bfloat16, torch.float16
needs_numba = pytest.mark.skipif(numba is None, reason="numba is not installed: pip install numba")


def vectors(dtype):
    "Random numbers, nearly all ties, zeros, more dimensions, columns, and NaN, infinity and a denormal number."
    torch.manual_seed(0)
    yield torch.randn(3, 67).to(dtype)
    yield torch.randint(-2, 3, (4, 40)).to(dtype)
    yield torch.zeros(2, 9, dtype=dtype)
    yield torch.randn(2, 3, 33).to(dtype)
    yield torch.randn(300, 2).to(dtype).T
    yield torch.tensor([[1.0, float("nan"), float("-inf"), 6.0, 6.0, 1e-40]]).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_way_keeps_what_the_sort_keeps(dtype):
    for x in vectors(dtype):
        D = x.shape[-1]
        for k in {0, 1, D // 3, D - 1, D}:
            want = select_by_sorting(x, k)
            kept = topk_channels(x, k)
            assert torch.equal(kept, want) and kept.shape == (*x.shape[:-1], k) and kept.dtype == torch.int64
            if 0 < k < D:
                assert torch.equal(_select_torch(_as_integers(x.abs()), k).view(kept.shape), want)


@pytest.mark.parametrize("k", [-1, 6, 2.5, True, None, "2"])
def test_an_impossible_number_of_channels(k):
    with pytest.raises(ConfigError, match="from 0 to D=5"):
        topk_channels(torch.randn(5), k)


def test_pieces_divide_the_outputs():
    for N in range(64, 4096, 64):
        for threads in (1, 2, 3, 6, 96):
            assert N % n_pieces(N, threads, 1 + threads % 3) == 0
    for pieces in (0, -1, 3):
        with pytest.raises(ConfigError, match="must divide"):
            bag_product(torch.ones(3, 64), torch.tensor([[0]]), torch.ones(1, 1), pieces)


@needs_numba
def test_long_runs_refuse_what_does_not_fit():
    "They read memory by address, so a wrong shape or type must never get that far."
    rows, kept, x = pack_rows(torch.ones(64, 5), 32), torch.tensor([[0, 4]]), torch.ones(1, 5)
    assert axpy_product(rows, kept, x)[0, 0] == 2
    bad = [
        (rows, kept, x[:, :4], 1, "x must be"),
        (rows, kept.repeat(2, 1), x, 1, "x must be"),
        (rows, kept.int(), x, 1, "int64"),
        (rows, kept, x, 0, "n_threads"),
        (rows, kept + 1, x, 1, "there are 5 channels"),
        (rows, kept - 1, x, 2, "there are 5 channels"),
    ]
    for *args, message in bad:
        with pytest.raises(ConfigError, match=message):
            axpy_product(*args)


@needs_numba
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("D, N", [(70, 64), (33, 8256), (70, 16448), (1, 16385)])
def test_threads_share_wide_rows_by_outputs_and_narrow_ones_by_groups(bits, D, N):
    torch.manual_seed(0)
    rows, x = pack_rows(torch.randn(N, D), bits), torch.randn(2, D)
    for k in {0, 1, D // 2, D}:
        kept = topk_channels(x, k)
        want = packed_product(rows, kept, x)
        for threads in (1, 2, 8):
            assert (axpy_product(rows, kept, x, threads) - want).abs().max() <= 1e-4


@needs_numba
@pytest.mark.parametrize("bits", BITS)
def test_infinity_and_nan_reach_every_output_and_nothing_else(bits):
    "An input that is not finite and is kept spoils the product, as it does in torch; one that is dropped does not."
    rows, x = pack_rows(torch.randn(100, 70), bits), torch.randn(1, 70)
    for bad in (float("nan"), float("inf")):
        x[0, 5] = bad
        assert not axpy_product(rows, torch.arange(70)[None], x).isfinite().any()
        assert axpy_product(rows, torch.arange(6, 70)[None], x).isfinite().all()


@pytest.mark.parametrize("kernel", ["bags", pytest.param("axpy", marks=needs_numba)])
def test_a_channel_out_of_range_is_the_same_error_for_every_kernel(kernel):
    layer = SparseLinear(torch.randn(20, 12), kernel=kernel)
    for channel in (12, -1):
        with pytest.raises(ConfigError, match="out of range: there are 12 channels"):
            layer.sparse(torch.randn(2, 12), torch.full((2, 1), channel))


@needs_numba
@pytest.mark.parametrize("dtype, bits, eps", [(torch.float32, 32, 1e-3), (torch.bfloat16, 16, 0.3)])
def test_both_kernels_compute_the_same_in_every_precision(dtype, bits, eps):
    rows = torch.randn(90, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed = pack_rows(rows.T, bits)
    for B, k, n in ((1, 0, 1), (1, 5, 2), (3, 90, 1), (4, 47, 2)):
        x = torch.randn(B, 90, generator=torch.Generator().manual_seed(k)).to(dtype)
        kept = topk_channels(x, k)
        want = bag_product(rows, kept, x.gather(1, kept))
        with torch_threads(n):
            for threads in (1, 2, 4):
                assert (axpy_product(packed, kept, x, threads) - want).abs().max() <= eps


@needs_numba
def test_long_sums_in_bfloat16_are_rounded_once_and_keep_nan():
    torch.manual_seed(0)
    w, x = torch.randn(64, 4096).bfloat16(), torch.randn(1, 4096).bfloat16()
    want = (x.double() @ w.double().t()).bfloat16().double()
    got = SparseLinear(w, kernel="axpy").sparse(x, torch.arange(4096)).double()
    assert (got - want).abs().max() <= 1.1  # one place of bfloat16 at this size
    x[0, 7] = float("nan")
    assert SparseLinear(w).sparse(x, torch.arange(10)).isnan().all()


@pytest.mark.skipif(numba is not None, reason="numba is installed")
def test_the_error_without_numba_says_how_to_install_it():
    with pytest.raises(ConfigError, match="pip install numba"):
        SparseLinear(torch.randn(3, 4), kernel="axpy")


@pytest.mark.parametrize(
    "weight, bias, message",
    [
        (torch.ones(12), None, "out_features, in_features"),
        (torch.ones(20, 12, dtype=torch.int8), None, "quantized"),
        (torch.ones(20, 12).to(torch.float8_e4m3fn), None, "quantized"),
        (torch.ones(20, 12), torch.zeros(12), "bias must be"),
    ],
)
def test_a_weight_that_has_no_sparse_product_is_refused(weight, bias, message):
    with pytest.raises(ConfigError, match=message):
        SparseLinear(weight, bias)


def test_a_layer_refuses_tensors_that_do_not_fit_together():
    layer, x, kept = SparseLinear(torch.ones(20, 12)), torch.ones(2, 12), torch.tensor([[0, 1], [2, 3]])
    assert (layer.sparse(x, kept) == 2).all()
    bad = [
        (x[:, :11], kept, "11 channels"),
        (x.double(), kept, "convert"),
        (x, kept.float(), "channel numbers"),
        (x, kept[:1], "one row per token"),
        (x, kept.to("meta"), "kept on meta"),
        (x.clone().requires_grad_(), kept, "no gradient"),
    ]
    for *args, message in bad:
        with pytest.raises(ConfigError, match=message):
            layer.sparse(*args)
    with torch.no_grad():
        assert (layer.sparse(x.clone().requires_grad_(), kept) == 2).all()


def test_bytes_of_more_channels_than_there_are_is_an_error():
    with pytest.raises(ConfigError, match="between 0 and D=4"):
        product_bytes(4, 4, 5, 2)
