"""The compiled kernel computes what packed attention in torch computes, whoever asks, and wherever the keys lie.

Everywhere else sequences are too short for it, so here every length is long enough.
"""

import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("numba", reason="numba is not installed: pip install numba")

from helpers import small_model  # noqa: E402
from llmopt.kv_cache import EvictingCache, EvictionConfig, SlabCache, decode_kernel  # noqa: E402
from llmopt.kv_cache.attention import packed, packed_attention  # noqa: E402
from llmopt.kv_cache.decode_kernel import decode_attention, try_decode  # noqa: E402
from llmopt.kv_cache.partial_softmax import attention_in_pieces  # noqa: E402
from llmopt.kv_cache.slab import SimpleVAttention  # noqa: E402

from .test_equality import MODES, dynamic, generate, prompt, same  # noqa: E402
from .test_eviction import both_ways  # noqa: E402

MODELS = {  # vectors, plain loops, groups of one and of three, other layers between
    "wide": lambda: small_model("llama", vocab_size=256, head_dim=32),
    "narrow": lambda: small_model("llama", vocab_size=256),
    "alone": lambda: small_model("gpt2", vocab_size=256, pad_token_id=5),
    "three": lambda: small_model("llama", vocab_size=256, hidden_size=48, num_attention_heads=6, head_dim=16),
    "mixed": lambda: small_model(
        "qwen3", vocab_size=256, head_dim=32, sliding_window=16, use_sliding_window=True, max_window_layers=1
    ),
}
made = {}


def model_of(name):
    "A small model with weights large enough that its tokens differ, made once."
    if name not in made:
        made[name] = MODELS[name]()
        torch.manual_seed(0)
        for p in made[name].parameters():
            p.data.add_(0.1 * torch.randn_like(p))
    return made[name]


@pytest.fixture
def calls(monkeypatch):
    "Every length is long enough for the kernel; the list gets the number of queries of each call."
    seen, attend = [], decode_kernel.attend_sources

    def counting(q, *args, **kw):
        seen.append(q.shape[2])
        return attend(q, *args, **kw)

    monkeypatch.setattr(decode_kernel, "FROM", 1)
    monkeypatch.setattr(decode_kernel, "attend_sources", counting)
    return seen


def reference(q, k, v, mask=None, scaling=None):
    "In float64, as (B, q, Hq, Dv)."
    q, k, v = (t.double() for t in (q, k, v))
    return packed_attention(q, k, v, mask, scaling).transpose(1, 2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_every_way_to_generate(name, mode, calls):
    "Greedy, sampling, beams, padding, prompt lookup, prompts in pieces: the tokens of the stock cache."
    model, (ids, mask) = model_of(name), prompt(dict(prompt_lookup=1, padded=3).get(mode, 2))
    if mode.startswith("padded"):
        mask[1, :5] = 0
        mask[2:, :11] = 0
    want = generate(model, dynamic(model.config), ids, mask, **MODES[mode])
    with packed(model):
        got = generate(model, SlabCache(model.config), ids, mask, **MODES[mode])
    same(got, want, exact=False)
    assert calls.count(1) >= 9 or mode == "prompt_lookup"
    assert mode != "chunked_prefill" or max(calls) > 1


@pytest.mark.parametrize("budget, left", [("20%", 0), ("20%", 40), ("mass=0.7", 0), ("mass=0.7", 40), (48, 40)])
@pytest.mark.parametrize("name", ["wide", "narrow"])
def test_what_an_eviction_leaves(name, budget, left, calls):
    "Rows of equal and of unequal length, with padding and without, one query and several."
    model, ids = model_of(name), torch.randint(4, 256, (2, 170), generator=torch.Generator().manual_seed(2))
    pad = torch.ones_like(ids)
    pad[1, :left] = 0
    cache = EvictingCache(model.config, EvictionConfig(budget, window=8, slack=4, unit=1))
    a, b = both_ways(model, cache, ids, pad, [0, 110, 114, 115, 150, *range(151, 170)])
    assert cache.evictor.rounds > 2 and (a - b).abs().max() < 1e-5 * b.abs().max()
    assert {1, 4} <= {*calls}


SHAPES = st.tuples(*(st.integers(1, n) for n in (3, 3, 4, 4)), st.sampled_from((2, 8, 16, 24, 32, 48, 64)))
WIDER = st.sampled_from((0, 2, 16))  # numbers that a value has more than a key
MASKS = st.sampled_from((None, "shared", "heads"))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(SHAPES, WIDER, st.integers(1, 700), st.integers(1, 5), MASKS, st.integers(0, 9**9))
def test_any_shape(shape, wider, n, threads, masked, seed):
    "Keys in a slab, queries as a model lays them out, a mask that may hide all tokens of a row."
    (B, H, g, q, D), gen = shape, torch.Generator().manual_seed(seed)
    Dv = D + wider
    slab = SimpleVAttention(H, D, B, 1000, value_size=Dv, prefault=False)
    k, v = slab.append(torch.randn(B, H, n, D, generator=gen), torch.randn(B, H, n, Dv, generator=gen))
    queries = torch.randn(B, q, H * g, D, generator=gen).transpose(1, 2)
    mask = None
    if masked:
        mask = torch.rand(1 if masked == "shared" else B, 1 if masked == "shared" else H, q, n, generator=gen) > 0.7
    got = decode_attention(queries, k, v, mask, 0.3, n_threads=threads)
    assert got.shape == (B, q, H * g, Dv) and got.is_contiguous()
    assert (got - reference(queries, k, v, mask, 0.3).nan_to_num(0.0)).abs().max() < 1e-5


@pytest.mark.parametrize("D", [64, 72])
def test_bfloat16_is_rounded_once(D):
    "Within half of the last bit of what float64 computes from the same numbers, where torch rounds the weights, too."
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, n, D).bfloat16() for h, n in ((9, 1), (3, 1500), (3, 1500)))
    want = reference(q, k, v)
    got = decode_attention(q, k, v, n_threads=2)
    assert ((got.double() - want).abs() <= want.abs() * 2**-8 + 1e-5).all()


@pytest.mark.parametrize("size", [1e-3, 30.0, 1000.0])
def test_scores_of_any_size(size):
    "Scores of thousands neither overflow nor vanish, whether they rise or fall along the tokens."
    torch.manual_seed(0)
    q, k, v = size * torch.ones(1, 2, 1, 16), torch.randn(1, 1, 999, 16), torch.randn(1, 1, 999, 16)
    rising = k.sum(-1).argsort(-1)[..., None].expand(k.shape)
    for order in rising, rising.flip(2):
        keys, values = k.gather(2, order), v.gather(2, order)
        got, want = decode_attention(q, keys, values), reference(q, keys, values)
        assert (got - want).abs().max() < 1e-5 * max(1, size / 10)  # a score of 1000 has an error of 1e-4


def test_what_is_no_number_is_seen():
    "A key that is not a number spoils the rows that see it, and no other."
    k, v = torch.randn(1, 2, 400, 16), torch.randn(1, 2, 400, 16)
    k[0, 1, 7, 3] = torch.nan
    for threads in 1, 4:
        out = decode_attention(torch.randn(1, 4, 1, 16), k, v, n_threads=threads)
        assert out[0, 0, :2].isfinite().all() and out[0, 0, 2:].isnan().all()


def test_threads_of_python_do_not_disturb_each_other():
    torch.manual_seed(0)
    sets = [(torch.randn(1, 4, 1, 32), torch.randn(1, 2, 800, 32), torch.randn(1, 2, 800, 32)) for _ in range(8)]
    with ThreadPoolExecutor(4) as pool:
        got = [*pool.map(lambda s: decode_attention(*s, n_threads=2), sets * 4)]
    for out, s in zip(got, sets * 4):
        assert (out - reference(*s)).abs().max() < 1e-5


def test_without_numba_torch_attends(monkeypatch, calls):
    model, (ids, mask) = model_of("wide"), prompt(2)
    want = generate(model, dynamic(model.config), ids, mask, do_sample=False)
    monkeypatch.setattr(decode_kernel, "numba", None)
    with packed(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same(generate(model, SlabCache(model.config), ids, mask, do_sample=False), want, exact=False)
    assert calls == []


def test_what_the_kernel_leaves_to_torch(calls):
    "Gradients, half precision, strange masks, dropout and compiling: None, and nothing is read."
    q, k = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 300, 16)
    assert try_decode(q.requires_grad_(), k, k) is None
    q = q.detach()
    assert try_decode(q.half(), k.half(), k.half()) is None
    assert try_decode(q, k, k, torch.zeros(1, 1, 1, 300)) is None
    assert try_decode(q, k.expand(1, 2, 300, 16)[..., :15], k) is None
    assert calls == [] and try_decode(q, k, k).shape == (1, 1, 4, 16)


@pytest.mark.parametrize("n", [1, 127, 128, 129, 1024])
def test_reference_in_pieces_is_the_reference(n):
    q, k, v = torch.randn(1, 2, 2, 16), torch.randn(1, 2, n, 16), torch.randn(1, 2, n, 16)
    got = attention_in_pieces(q, k, v, 0.25).reshape(1, 4, 1, 16).transpose(1, 2)
    assert (got - reference(q.view(1, 4, 1, 16), k, v, None, 0.25)).abs().max() < 1e-5
