"No budget, no difference: whatever `generate` does, the slab cache gives what `DynamicCache` gives."

import copy
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
import transformers as T

from helpers import small_model, tiny
from llmopt.kv_cache.attention import packed
from llmopt.kv_cache.cache import SlabCache

SMALL = dict(vocab_size=256)
MODELS = {
    "llama": lambda: small_model("llama", **SMALL),
    "qwen3": lambda: small_model("qwen3", **SMALL),
    "qwen3_mixed": lambda: small_model(
        "qwen3", **SMALL, sliding_window=16, use_sliding_window=True, max_window_layers=1
    ),
    "mistral": lambda: small_model("mistral", **SMALL),
    "gpt2": lambda: small_model("gpt2", **SMALL, pad_token_id=5),
    "phi": lambda: small_model("phi2", **SMALL),
    "bundled": lambda: copy.deepcopy(tiny().model),
}
MODES = {
    "greedy": dict(do_sample=False),
    "sampling": dict(do_sample=True, temperature=1.3),
    "beams": dict(do_sample=False, num_beams=3),
    "beam_sampling": dict(do_sample=True, num_beams=2),
    "several": dict(do_sample=True, num_return_sequences=3),
    "prompt_lookup": dict(do_sample=False, prompt_lookup_num_tokens=3),
    "chunked_prefill": dict(do_sample=False, prefill_chunk_size=7),
    "padded": dict(do_sample=False),
    "padded_beams": dict(do_sample=False, num_beams=3),
    "padded_chunks": dict(do_sample=False, prefill_chunk_size=7),
}
F32, BF16 = torch.float32, torch.bfloat16
RUNS = [(name, mode, F32) for name in MODELS if name != "bundled" for mode in MODES]
RUNS += [(name, mode, BF16) for name in ("llama", "qwen3_mixed", "gpt2") for mode in [*MODES][:7]]
RUNS += [("bundled", mode, F32) for mode in ("greedy", "padded")]  # the other ways depend on no weights
pytestmark = pytest.mark.filterwarnings("ignore")
_models = {}


def model_of(name, dtype=F32):
    "The model, made once; random weights large enough that its tokens differ."
    if (name, dtype) not in _models:
        m = MODELS[name]()
        torch.manual_seed(0)
        for p in m.parameters() if name != "bundled" else ():
            p.data.add_(0.1 * torch.randn_like(p))
        _models[name, dtype] = m.to(dtype)
    return _models[name, dtype]


def prompt(rows, n=20, seed=1):
    "Token ids with repetitions, so that prompt lookup finds something, and a mask of ones."
    ids = torch.randint(10, 250, (rows, n), generator=torch.Generator().manual_seed(seed))
    ids[:, n // 2 : n // 2 + 6] = ids[:, :6]
    return ids, torch.ones_like(ids)


def dynamic(config):
    return T.DynamicCache(config=config)


def generate(model, cache, ids, mask, n=10, **kw):
    "Tokens and logits of one `generate`."
    torch.manual_seed(7)
    out = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=n,
        min_new_tokens=n,
        pad_token_id=5,
        output_logits=True,
        return_dict_in_generate=True,
        **kw,
    )
    return out.sequences, torch.stack(out.logits).float()


def same(a, b, exact=True):
    "Equal tokens; logits bit-identical, or within 1e-5 of their size."
    assert torch.equal(a[0], b[0])
    if exact:
        assert torch.equal(a[1], b[1])
    else:
        assert (a[1] - b[1]).abs().max() <= 1e-5 * max(1, b[1].abs().max())


@pytest.mark.parametrize("name, mode, dtype", RUNS)
def test_every_way_to_generate(name, mode, dtype):
    "Stock attention is bit-identical; packed attention equal within rounding, where float32 tells."
    model, (ids, mask) = model_of(name, dtype), prompt(dict(prompt_lookup=1, padded=3).get(mode, 2))
    if mode.startswith("padded"):
        mask[1, :5] = 0
        mask[2:, :11] = 0
    want = generate(model, dynamic(model.config), ids, mask, **MODES[mode])
    same(generate(model, SlabCache(model.config), ids, mask, **MODES[mode]), want)
    if dtype == F32:
        with packed(model):
            got = generate(model, SlabCache(model.config), ids, mask, **MODES[mode])
        same(got, want, exact=False)


@pytest.mark.parametrize("name", [n for n in MODELS if n != "bundled"])
def test_continuation_over_turns(name):
    "A conversation goes on in the same cache; each turn sends all tokens so far."
    model, (new, _) = model_of(name), prompt(2)
    caches = dynamic(model.config), SlabCache(model.config), SlabCache(model.config)
    ids = torch.empty(2, 0, dtype=torch.long)
    for _ in range(3):
        ids, outs = torch.cat([ids, new], 1), []
        for cache, read in zip(caches, (nullcontext, nullcontext, lambda: packed(model))):
            with read():
                outs.append(generate(model, cache, ids, torch.ones_like(ids), 5, do_sample=False))
        same(outs[1], outs[0])
        same(outs[2], outs[0], exact=False)
        ids = outs[0][0]
    assert len({c.get_seq_length() for c in caches}) == 1


@pytest.mark.parametrize("name", ["llama", "qwen3_mixed", "gpt2", "bundled"])
def test_packed_bf16_is_as_close_to_fp32_as_stock_bf16(name):
    "In bfloat16 the order of sums shows; packed attention must not be further from the truth than stock attention is."
    ids, mask = prompt(2, 40)

    def forced(dtype, read, make):
        model, rows = model_of(name, dtype), []
        cache = make(model.config)
        with torch.no_grad(), read(model):
            for a, b in ((0, 30), *((i, i + 1) for i in range(30, 40))):
                rows.append(model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits.float())
        return torch.cat(rows, 1)

    truth = forced(F32, nullcontext, dynamic)
    ours, theirs = (
        (forced(BF16, read, make) - truth).abs().mean() for read, make in ((packed, SlabCache), (nullcontext, dynamic))
    )
    assert ours <= 1.1 * theirs + 1e-6


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_batch_operations(name):
    "Repeating and selecting sequences, then going on, as with the stock cache."
    model, (ids, _) = model_of(name), prompt(2)
    caches = SlabCache(model.config), dynamic(model.config)
    with torch.no_grad():
        for c in caches:
            model(ids, past_key_values=c)
            c.batch_repeat_interleave(2)
            c.batch_select_indices(torch.tensor([3, 0, 1]))
            c.crop(-4)
            c.reorder_cache(torch.tensor([2, 2, 0]))
        a, b = (model(ids[:1, :3].repeat(3, 1), past_key_values=c).logits for c in caches)
    assert torch.equal(a, b)


def test_one_cache_for_every_thread():
    "Several threads with caches of their own do not disturb each other."
    model, (ids, mask) = model_of("llama"), prompt(2)

    def run(cache):
        return generate(model, cache, ids, mask, do_sample=False)

    want = run(dynamic(model.config))
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(run, [SlabCache(model.config) for _ in range(8)]):
            assert torch.equal(got[0], want[0])
