"No budget, no difference: whatever `generate` does, the slab cache gives what `DynamicCache` gives."

import copy
from contextlib import nullcontext

import pytest
import torch
import transformers as T

from helpers import small_config, tiny
from llmopt.kv_cache.attention import packed
from llmopt.kv_cache.cache import SlabCache

CONFIGS = {
    "llama": lambda: small_config("llama"),
    "qwen3": lambda: small_config("qwen3"),
    "qwen3_mixed": lambda: small_config("qwen3", sliding_window=16, use_sliding_window=True, max_window_layers=1),
    "mistral": lambda: small_config("mistral"),
    "gpt2": lambda: small_config("gpt2", pad_token_id=5),
    "phi": lambda: small_config("phi2"),
    "bundled": None,
}
MODES = {
    "greedy": dict(do_sample=False),
    "sampling": dict(do_sample=True, temperature=1.3),
    "beams": dict(do_sample=False, num_beams=3),
    "beam_sampling": dict(do_sample=True, num_beams=2),
    "several": dict(do_sample=True, num_return_sequences=3),
    "prompt_lookup": dict(do_sample=False, prompt_lookup_num_tokens=3),
    "chunked_prefill": dict(do_sample=False, prefill_chunk_size=7),
}
pytestmark = pytest.mark.filterwarnings("ignore")
_models = {}


def model_of(name, dtype=torch.float32):
    "The model, made once; random weights large enough that its tokens differ."
    if (name, dtype) not in _models:
        torch.manual_seed(0)
        if name == "bundled":
            m = copy.deepcopy(tiny().model)
        else:
            m = T.AutoModelForCausalLM.from_config(CONFIGS[name]())
            for p in m.parameters():
                p.data.add_(0.1 * torch.randn_like(p))
        _models[name, dtype] = m.to(dtype).eval()
    return _models[name, dtype]


def prompt(rows, n=20, seed=1):
    "Token ids with repetitions, so that prompt lookup finds something, and a mask of ones."
    ids = torch.randint(10, 250, (rows, n), generator=torch.Generator().manual_seed(seed))
    ids[:, n // 2 : n // 2 + 6] = ids[:, :6]
    return ids, torch.ones_like(ids)


def dynamic(config):
    return T.DynamicCache(config=config)


def generate(model, make, ids, mask, cache=None, **kw):
    "Tokens and logits of one `generate`."
    torch.manual_seed(7)
    out = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache or make(model.config),
        max_new_tokens=14,
        min_new_tokens=14,
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


def both(attention, model):
    return packed(model) if attention == "packed" else nullcontext()


TYPES = [(name, torch.float32) for name in CONFIGS] + [(n, torch.bfloat16) for n in ("llama", "qwen3_mixed", "gpt2")]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name, dtype", TYPES)
def test_stock_attention_is_bit_identical(name, mode, dtype):
    model, (ids, mask) = model_of(name, dtype), prompt(1 if mode == "prompt_lookup" else 2)
    same(generate(model, SlabCache, ids, mask, **MODES[mode]), generate(model, dynamic, ids, mask, **MODES[mode]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_attention_is_equal_within_rounding(name, mode):
    model, (ids, mask) = model_of(name), prompt(1 if mode == "prompt_lookup" else 2)
    with packed(model):
        got = generate(model, SlabCache, ids, mask, **MODES[mode])
    same(got, generate(model, dynamic, ids, mask, **MODES[mode]), exact=False)


@pytest.mark.parametrize("attention", ["stock", "packed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_left_padding(name, attention):
    model, (ids, mask) = model_of(name), prompt(3)
    mask[1, :5] = 0
    mask[2, :11] = 0
    for kw in (MODES["greedy"], MODES["beams"], MODES["chunked_prefill"]):
        with both(attention, model):
            got = generate(model, SlabCache, ids, mask, **kw)
        same(got, generate(model, dynamic, ids, mask, **kw), exact=attention == "stock")


@pytest.mark.parametrize("attention", ["stock", "packed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_continuation_over_turns(name, attention):
    "A conversation goes on in the same cache; each turn sends all tokens so far."
    model, (new, _) = model_of(name), prompt(2)
    texts, caches = [torch.empty(2, 0, dtype=torch.long)] * 2, [SlabCache(model.config), dynamic(model.config)]
    for _ in range(3):
        outs = []
        for i, how in enumerate((attention, "stock")):
            ids = torch.cat([texts[i], new], 1)
            with both(how, model):
                outs.append(generate(model, None, ids, torch.ones_like(ids), caches[i], do_sample=False))
        same(*outs, exact=attention == "stock")
        texts = [o[0] for o in outs]
    assert caches[0].get_seq_length() == caches[1].get_seq_length()


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_bf16_is_as_close_to_fp32_as_stock_bf16(name):
    "In bfloat16 the order of sums shows; packed attention must not be further from the truth than stock attention is."
    ids, mask = prompt(2, 40)

    def forced(dtype, how, make):
        model, rows = model_of(name, dtype), []
        cache = make(model.config)
        with torch.no_grad(), both(how, model):
            for a, b in ((0, 30), *((i, i + 1) for i in range(30, 40))):
                rows.append(model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits.float())
        return torch.cat(rows, 1)

    truth = forced(torch.float32, "stock", dynamic)
    ours, theirs = (
        (forced(torch.bfloat16, how, make) - truth).abs().mean()
        for how, make in (("packed", SlabCache), ("stock", dynamic))
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
    from concurrent.futures import ThreadPoolExecutor

    model, (ids, mask) = model_of("llama"), prompt(2)
    want = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=5)

    def run(_):
        return model.generate(
            ids,
            attention_mask=mask,
            past_key_values=SlabCache(model.config),
            max_new_tokens=20,
            do_sample=False,
            pad_token_id=5,
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(o, want) for o in pool.map(run, range(8)))
