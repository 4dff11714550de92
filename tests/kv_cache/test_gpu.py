"The KV cache on a CUDA device: what `generate` does with it, budgets, restore, and a device that is full."

import gc
import math
import random
import threading
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
import transformers as T

from helpers import small_config
from llmopt.kv_cache.attention import packed, reference_attention
from llmopt.kv_cache.backends import backend
from llmopt.kv_cache.budget import EvictionConfig
from llmopt.kv_cache.cache import SlabCache
from llmopt.kv_cache.cuda import CudaRows
from llmopt.kv_cache.eviction import EvictingCache
from llmopt.kv_cache.hybrid import HybridKVCacheOptimizer
from llmopt.kv_cache.restore import PrefixStore
from llmopt.kv_cache.shape import cache_shape
from llmopt.kv_cache.slab import SimpleVAttention

from . import test_equality
from .test_equality import MODES, generate

SMALL = dict(vocab_size=256, hidden_size=64, num_hidden_layers=3, max_position_embeddings=4096)
CONFIGS = {
    "llama": lambda: small_config("llama", **SMALL),
    "qwen3": lambda: small_config("qwen3", **SMALL, head_dim=16),
    "qwen3_mixed": lambda: small_config(
        "qwen3", **SMALL, head_dim=16, sliding_window=16, use_sliding_window=True, max_window_layers=1
    ),
    "gpt2": lambda: small_config("gpt2", vocab_size=256, n_embd=64, n_layer=3, n_positions=4096, pad_token_id=5),
}
DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16)
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]
_models = {}


@pytest.fixture(autouse=True)
def cuda_python():
    pytest.importorskip("cuda.bindings", reason="cuda-python is not installed: pip install llmopt[cuda]")


def model_of(name="llama", dtype=torch.float32):
    "The model, made once; random weights large enough that its tokens differ."
    if (name, dtype) not in _models:
        torch.manual_seed(0)
        m = T.AutoModelForCausalLM.from_config(CONFIGS[name]())
        for p in m.parameters():
            p.data.add_(0.1 * torch.randn_like(p))
        _models[name, dtype] = m.to("cuda", dtype).eval()
    return _models[name, dtype]


def prompt(rows, n=20, seed=1):
    "Token ids with repetitions, on the device."
    return test_equality.prompt(rows, n, seed)[0].cuda()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("attention", ["stock", "packed"])
def test_generate_gives_what_it_gives_with_dynamic_cache(attention, name, mode, dtype):
    "To the bit with stock attention; with packed attention within 1e-5 in float32."
    if attention == "packed" and dtype == "bf16":
        pytest.skip("in bfloat16 the order of sums shows")
    model, ids = model_of(name, DTYPES[dtype]), prompt(1 if mode == "prompt_lookup" else 3)
    mask = torch.ones_like(ids)
    if mode.startswith("padded"):
        mask[1, :5] = 0
        mask[2, :11] = 0
    cache = SlabCache(model.config)
    with packed(model) if attention == "packed" else nullcontext():
        got = generate(model, cache, ids, mask, **MODES[mode])
    want = generate(model, T.DynamicCache(config=model.config), ids, mask, **MODES[mode])
    assert {r.backend for s in cache.slabs for r in s.storage} == {"cuda"} and torch.equal(got[0], want[0])
    if attention == "stock":
        assert torch.equal(got[1], want[1]), (got[1] - want[1]).abs().max()
    else:
        assert (got[1] - want[1]).abs().max() <= 1e-5 * max(1, want[1].abs().max())


def test_generate_makes_slabs_when_installed():
    "The caches that `generate` makes of itself are ours, on the device as well."
    from llmopt.kv_cache import installed

    model, ids = model_of(), prompt(2)
    want = generate(model, None, ids, torch.ones_like(ids), do_sample=False)
    with installed():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=14,
            min_new_tokens=14,
            pad_token_id=5,
            do_sample=False,
            return_dict_in_generate=True,
        )
    assert torch.equal(out.sequences, want[0]) and {l.slab.key_rows.backend for l in out.past_key_values.layers} == {
        "cuda"
    }


MARGIN = 2**24  # what the driver takes for itself: kernels it loads, page tables


def filled(r, n):
    "`r` with `n` tokens of ones."
    r.resize(n)
    r.data[:, :n] = 1
    return r


@pytest.mark.parametrize("dtype, longest", [(torch.float32, 100_000), (torch.bfloat16, 3000)])
def test_appending_is_cat(dtype, longest):
    "At a fixed address, and a cropped slab goes on from where it is."
    s = SimpleVAttention(3, 128, 2, longest, dtype, "cuda")
    k, v = torch.randn(2, 2, 3, 2900, 128, device="cuda").to(dtype)
    at = s.key_rows.data.data_ptr()
    assert s.key_rows.backend == "cuda"
    for a, b in (0, 1), (1, 900), (900, 901), (901, 2900):
        ks, vs = s.append(k[:, :, a:b], v[:, :, a:b])
        assert torch.equal(ks, k[:, :, :b]) and torch.equal(vs, v[:, :, :b])
    s.truncate(100)
    s.append(v[:, :, :50], k[:, :, :50])
    assert torch.equal(s.keys, torch.cat([k[:, :, :100], v[:, :, :50]], 2)) and s.keys.data_ptr() == at


def test_resident_bytes_are_what_the_device_misses():
    "It reports as much less free memory as the rows hold, and all of it after closing; reserving takes nothing."
    filled(CudaRows(16, 100, 128, torch.bfloat16), 100).close()
    before = free_bytes()
    r = CudaRows(16, 2**20, 128, torch.bfloat16, prefault=False)
    assert r.reserved == 2**32 and before - free_bytes() < MARGIN
    for n in 1, 20_480, 20_481, 400_000, 51_200, 0:
        filled(r, n)
        assert r.resident() == math.ceil(n * 16 * 256 / r.page) * r.page
        assert abs(before - free_bytes() - r.resident()) < MARGIN
    filled(r, 100_000).close()
    assert before - free_bytes() < MARGIN


def test_a_thousand_times_up_and_down_leaks_nothing():
    "And kernels that are still queued when their pages are given back have read the right numbers."
    filled(CudaRows(4, 100, 128), 100).data.sum().item()
    before = free_bytes()
    rnd, r = random.Random(0), CudaRows(4, 100_000, 128, prefault=False)
    for _ in range(1000):
        n = rnd.randint(1000, 30_000)
        ones = filled(r, n).data[:, :n].sum()
        r.resize(1)
        assert ones.item() == 4 * 128 * n  # nobody has waited for the sum before
    assert before - free_bytes() < MARGIN
    view = filled(r, 30_000).data[:, :9]
    r.close()
    assert r.resident() >= 30_000 * 4 * 512 and view.mean().item() == 1
    del view
    assert r.resident() == 0 and before - free_bytes() < MARGIN


def kept(cache):
    "For each layer (B, H, seen): what it still has."
    res = []
    for l in cache.slab_layers:
        s = l.slab
        k = torch.zeros(*s.lengths.shape, s.tokens_seen + 1, dtype=torch.bool, device="cuda")
        res.append(k.scatter_(2, s.positions.masked_fill(~s.filled, s.tokens_seen), True)[..., :-1])
    return res


@pytest.mark.parametrize(
    "policy, budget",
    [
        ("cake", "20%"),
        ("cake", 64),
        ("cake", "mass=0.7"),
        ("snapkv", "60KiB"),
        ("pyramidkv", 64),
        ("h2o", 64),
        ("streaming_llm", 64),
        ("random", 64),
    ],
)
def test_a_budget_equals_full_attention_under_its_mask(policy, budget):
    "A prompt in pieces, single tokens and guesses, a padded row, several rounds."
    model, ids = model_of(), prompt(2, 400, seed=2)
    pad, cuts = torch.ones_like(ids), [0, 100, 200, 205, 206, 290, *range(291, 305)]
    pad[1, :40] = 0
    cache, full, pos, gone = (
        EvictingCache(model.config, EvictionConfig(budget, policy, window=8, slack=4, unit=1)),
        T.DynamicCache(config=model.config),
        (pad.cumsum(-1) - 1).clamp(min=0),
        [],
    )

    def masked(module, q, k, v, mask, scaling=None, **kw):
        n = q.shape[2]
        see = (
            torch.ones(k.shape[2], k.shape[2], dtype=torch.bool, device="cuda").tril()[-n:][None, None]
            if mask is None
            else mask
        )
        if gone:
            see = see & F.pad(gone[module.layer_idx], (0, n), value=True)[:, :, None]
        see = see.expand(q.shape[0], k.shape[1], -1, -1).repeat_interleave(q.shape[1] // k.shape[1], 1)
        return reference_attention(q, k, v, see, scaling).nan_to_num(0.0).transpose(1, 2), None

    T.AttentionInterface.register("test_masked", masked)
    T.AttentionMaskInterface.register("test_masked", T.masking_utils.sdpa_mask)
    for a, b in zip(cuts, cuts[1:]):
        kw, gone = (
            dict(input_ids=ids[:, a:b], attention_mask=pad[:, :b], position_ids=pos[:, a:b]),
            kept(cache) if a else [],
        )
        with torch.no_grad():
            with packed(model):
                got = model(**kw, past_key_values=cache).logits[pad[:, a:b].bool()]
            model.set_attn_implementation("test_masked")
            try:
                want = model(**kw, past_key_values=full).logits[pad[:, a:b].bool()]
            finally:
                model.set_attn_implementation("sdpa")
        assert (got - want).abs().max() < 1e-5 * max(1, want.abs().max()), (a, b)
    assert cache.evictor.rounds > 2 and {s.key_rows.backend for s in cache.slabs} == {"cuda"}


def test_a_budget_gives_memory_back():
    "After a prompt, what is mapped are the pages of the budget; what the device reports agrees."
    c = small_config("llama", **SMALL | dict(hidden_size=512, max_position_embeddings=2**15, head_dim=128))
    with torch.device("cuda"):
        model = T.AutoModelForCausalLM.from_config(c, dtype=torch.bfloat16).eval()
    ids, sizes = prompt(1, 20_000), {}
    for name, make in dict(
        warm=lambda: SlabCache(c),
        all=lambda: SlabCache(c),
        tenth=lambda: EvictingCache(c, EvictionConfig("10%"), prefault=False),
    ).items():
        cache = make()
        with torch.no_grad(), packed(model):
            model(ids, past_key_values=cache, logits_to_keep=1)
        before = free_bytes()
        held = sum(r.resident() for s in cache.slabs for r in (s.key_rows, s.value_rows))
        sizes[name] = held, cache.kv_bytes().live
        cache.close()
        assert abs(free_bytes() - before - held) < 2**24
    page, token = 2**21, 3 * 2 * 2 * 128 * 2
    assert sizes["all"][0] >= sizes["all"][1] == 20_000 * token
    assert (
        sizes["tenth"][0] <= 2000 * token + 6 * page and sizes["tenth"][0] < 0.25 * sizes["all"][0]
    )  # each of the six slabs holds at least a page


def free_bytes():
    "What the device reports, with nothing queued and nothing kept back by PyTorch."
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def test_appending_takes_no_memory_but_the_token():
    "One more token at 30,000 allocates next to nothing; calls to the driver come with the pages."
    s, calls = SimpleVAttention(8, 128, 1, 40_000, torch.bfloat16, "cuda"), []
    k = torch.ones(1, 8, 30_000, 128, dtype=torch.bfloat16, device="cuda")
    s.append(k, k)
    real = type(s.key_rows.driver).create
    s.key_rows.driver.create = lambda n: calls.append(n) or real(s.key_rows.driver, n)
    try:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(3000):
            s.append(k[:, :, :1], k[:, :, :1])
        torch.cuda.synchronize()
    finally:
        del s.key_rows.driver.create
    assert torch.cuda.max_memory_allocated() - before < 2**20 < k.nbytes
    assert 0 < len(calls) <= 2 * (3000 * 8 * 256 // s.key_rows.page + 1)


def test_a_full_device_changes_nothing():
    "With no memory left, growing raises and what was there stays; memory that PyTorch has let go of is used."
    s, t = (
        SimpleVAttention(8, 128, 1, 400_000, torch.bfloat16, "cuda"),
        torch.ones(1, 8, 1000, 128, dtype=torch.bfloat16, device="cuda"),
    )
    s.append(t, t)
    held, free = s.resident(), free_bytes()
    hog = torch.empty(free - 2**27, dtype=torch.uint8, device="cuda")  # 128 MiB are left; 400,000 tokens take 1.5 GiB
    with pytest.raises(torch.OutOfMemoryError):
        s.key_rows.resize(400_000)
    assert (s.seq_len, s.key_rows.length, s.resident()) == (1000, 1000, held) and (s.keys == 1).all()
    s.append(2 * t, 2 * t)
    assert s.seq_len == 2000 and (s.keys[:, :, 1000:] == 2).all()
    del hog  # PyTorch keeps it for itself
    s.key_rows.resize(400_000)
    assert s.key_rows.resident() > 2**29 and (s.keys[:, :, :1000] == 1).all()
    s.close()
    assert s.resident() == 0


def test_in_a_thread_of_its_own():
    "A thread that has not used the device yet makes a cache, and another drops it."
    seen = []

    def work():
        s = SimpleVAttention(2, 64, 1, 50_000, torch.float32, "cuda")
        t = torch.ones(1, 2, 100, 64, device="cuda")
        s.append(t, t)
        seen.append((s, s.keys.sum().item()))

    th = threading.Thread(target=work)
    th.start()
    th.join()
    assert seen[0][1] == 100 * 128 and seen[0][0].key_rows.backend == "cuda"
    region = seen[0][0].key_rows
    th = threading.Thread(target=seen[0][0].close)
    th.start()
    th.join()
    assert region.resident() == 0


def test_restore_is_equal_at_every_meeting_point(tmp_path):
    "Chunks computed, chunks loaded: bit-identical keys and values."
    model, ids = model_of(), prompt(1, 97, seed=3)
    store, first = PrefixStore(tmp_path, chunk=16), SlabCache(model.config)
    store.prefill(model, first, ids)
    for meet in range(7):
        cache = SlabCache(model.config)
        store.meet_at = meet
        r = store.prefill(model, cache, ids)
        assert (r.computed, r.loaded) == (meet, 6 - meet) and cache.get_seq_length() == 96
        assert all(
            torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values) for a, b in zip(cache.slabs, first.slabs)
        )


def test_the_optimizer_measures_on_the_device():
    "Reserved, resident, live and savings of caches on the device."
    model, ids = model_of(dtype=torch.bfloat16), prompt(2, 3000)
    opt = HybridKVCacheOptimizer(**cache_shape(model), max_batch_size=2, max_seq_len=4000, device="cuda")
    cache = opt.make_cache(model)
    with torch.no_grad(), opt.attach(model):
        model(ids, past_key_values=cache, logits_to_keep=1)
    use, saved = opt.get_memory_usage(), opt.get_memory_savings()
    assert (
        use["backend"] == ["cuda"] == [backend("cuda")]
        and use["live"] == 2 * 3000 * 3 * 2 * 2 * 16 * 2 <= use["resident"] <= use["reserved"]
    )
    assert (
        saved["slab"] == use["resident"]
        and saved["static_exact"] >= use["live"]
        and saved["static_longest"] > saved["static_exact"]
    )
