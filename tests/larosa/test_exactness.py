"A rotated model is the same model; a sparse one is the plain one with inputs rotated, cut and rotated back."

import copy
import random
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import transformers as T
from torch import nn
from transformers.pytorch_utils import Conv1D

from helpers import cached_logits, logits
from llmopt.core import kl, next_token_logprobs
from llmopt.errors import UnsupportedModelError
from llmopt.larosa import (
    BasisChange,
    choose_rotations,
    convert,
    family,
    keep_topk,
    learn_basis,
    projections,
    second_moments,
    set_sparsity,
    set_tokens,
    sparsify,
    value_bases,
)
from llmopt.larosa.allocation import allocate_by_cost, channel_costs, costs_by_passes
from llmopt.larosa.basis import block_inputs, dropped_error, weighted_readers
from llmopt.larosa.rotation import ROTATIONS

from .models import CHANGES, exact, random_heads, sparsified


@pytest.mark.parametrize("name", CHANGES)
def test_conversion_is_exact(name):
    "Every rotation, with heads turned and without, with a KV cache and without; the old model stays as it is."
    model, ids = exact(name)
    want, moments = logits(model, ids), second_moments(model, ids)
    for rotation in ROTATIONS:
        heads = random_heads(model) if rotation in ("none", "block") else None
        new = convert(model, choose_rotations(moments, rotation), heads)
        assert (logits(new, ids) - want).abs().max() < 1e-9, rotation
    assert (cached_logits(new, ids) - want).abs().max() < 1e-9
    assert torch.equal(logits(model, ids), want)
    assert sum(isinstance(m, BasisChange) for m in new.modules()) == (2 if name == "phi2" else 5)


@contextmanager
def simulated(model, q, r, allocation):
    "The plain `model`, whose inputs are rotated, cut, and rotated back by hooks."
    fam, handles = family(model), []

    def read(linear, args, norm, q, k):
        g, b = norm.weight, getattr(norm, "bias", torch.zeros(()))
        return (g * (keep_topk((args[0] - b) / g @ q, k) @ q.T) + b,)

    def write(linear, args, r, k):
        x = args[0]
        if r is None:
            return (keep_topk(x, k),)
        by_head = x.unflatten(-1, (len(r), -1, r.shape[-1]))  # (…, KV heads, group, d)
        return ((keep_topk((by_head @ r).flatten(-3), k).view_as(by_head) @ r.mT).flatten(-3),)

    for i, layer in enumerate(model.get_submodule(fam.layers)):
        for j, b in enumerate(fam.blocks):
            for p in (*b.read, b.write):
                linear = layer.get_submodule(p)
                width = linear.weight.shape[0 if isinstance(linear, Conv1D) else 1]
                k = width - round(allocation[f"{i}.{p}"] * width)
                if p == b.write:
                    hook = partial(write, r=r[i] if j == 0 else None, k=k)
                else:
                    hook = partial(read, norm=layer.get_submodule(b.norm), q=q[i, j], k=k)
                handles.append(linear.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", CHANGES)
def test_simulation_equals_absorption(name):
    "Any family, any sparsity, heads turned."
    model, ids = exact(name)
    q, r = choose_rotations(second_moments(model, ids)), random_heads(model)
    new = sparsify(convert(model, q, r), tokens="all")
    rng = random.Random(0)
    allocation = {n: rng.choice([0.0, 0.1, 0.3, 0.5, 0.8]) for n in projections(new)}
    with simulated(model, q, r, allocation):
        want = logits(model, ids)
    plain = logits(model, ids)
    assert (logits(new, ids) - plain).abs().max() < 1e-9
    got = logits(set_sparsity(new, allocation), ids)
    assert (got - want).abs().max() < 1e-9 and (got - plain).abs().max() > 0.1


@pytest.mark.parametrize("name", CHANGES)
def test_every_family_generates(name):
    "Stock `generate`, in batches and in half precision too."
    model, ids = exact(name)
    new = sparsified(model, ids)
    kwargs = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(new.generate(ids, **kwargs), model.generate(ids, **kwargs))
    half = set_sparsity(new, dict.fromkeys(projections(new), 0.5)).bfloat16()
    assert half.generate(ids, **kwargs).shape == (3, 46)


def test_a_prompt_is_dense_and_what_follows_sparse():
    "By default, and with every mode; the first tokens of a sparse text can be left dense."
    model, ids = exact("llama")
    new, plain = sparsified(model, ids), logits(model, ids)
    set_sparsity(new, dict.fromkeys(projections(new), 0.5))
    got = cached_logits(new, ids, 9)
    assert (got[:, :9] - plain[:, :9]).abs().max() < 1e-9 and (got[:, 9:] - plain[:, 9:]).abs().max() > 0.1
    assert (logits(new, ids) - plain).abs().max() < 1e-9
    set_tokens(new, "none")
    assert (cached_logits(new, ids, 9) - plain).abs().max() < 1e-9
    set_tokens(new, "all")
    sparse = logits(new, ids)
    assert (cached_logits(new, ids, 9) - sparse).abs().max() < 1e-9
    part = sparsified(model, ids, tokens="all", first=3)
    got = logits(set_sparsity(part, dict.fromkeys(projections(part), 0.5)), ids)
    assert (got[:, :3] - plain[:, :3]).abs().max() < 1e-9 and (got[:, 3:] - plain[:, 3:]).abs().max() > 0.1


def test_value_bases_diagonalize():
    "In these bases the moments of the attention's output are diagonal, head by head, and fall."
    model, ids = exact("qwen2")
    r, seen = value_bases(model, ids), []
    new = convert(model, choose_rotations(second_moments(model, ids), "none"), r)
    new.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    logits(new, ids)
    x = seen[0].flatten(0, 1).unflatten(-1, (2, 2, 8))
    for h in range(2):
        c = x[:, h].reshape(-1, 8).T @ x[:, h].reshape(-1, 8)
        assert (c - c.diagonal().diag()).abs().max() < 1e-9 * c.max() and (c.diagonal().diff() <= 0).all()


def error_of(basis, model, q, costs, z):
    "The objective of a learned basis at half sparsity, relative to that of `q`."
    start, total = q[0, 0].float(), 0.0
    for key, (k, readers) in weighted_readers(model, costs, 0.5).items():
        for lost, w in readers:
            gram = w.T @ w
            total += (
                lost * dropped_error(z[key], basis.float(), gram, k) / dropped_error(z[key], start, gram, k)
            ).item()
    return total


@pytest.mark.parametrize("name", ["qwen2", "phi2", "gpt2"])
def test_a_learned_basis(name):
    "It is orthogonal, the model in it is the same, and the error has fallen, even without structure to find."
    model, ids = exact(name)
    moments = second_moments(model, ids)
    q = choose_rotations(moments, "model")
    costs = channel_costs(model, ids, q)
    got = learn_basis(model, ids, q[0, 0], costs, steps=40, tokens=64)
    assert (got.T @ got - torch.eye(32)).abs().max() < 1e-12 and (got - q[0, 0]).abs().max() > 0.05
    assert (logits(convert(model, dict.fromkeys(q, got)), ids) - logits(model, ids)).abs().max() < 1e-9
    z = block_inputs(model, ids)
    for key, c in moments.items():
        torch.testing.assert_close(z[key].T @ z[key] / len(z[key]), c.float(), atol=1e-3, rtol=1e-3)
    assert error_of(got, model, q, costs, z) < 0.97 * error_of(q[0, 0], model, q, costs, z)


def test_costs_are_measured_and_spread():
    "The costs of the lower half of the channels add up to what half sparsity costs, and rise; the budget is met."
    model, ids = exact("llama")
    new = sparsified(model, ids)
    costs, name = costs_by_passes(new, ids), "1.mlp.up_proj"
    assert all((c.diff() >= 0).all() and (c > 0).any() for c in costs.values())
    assert all(m.sparsity == 0 for m in projections(new).values())
    dense = next_token_logprobs(new, ids)
    set_sparsity(new, {name: 0.5})
    assert set_tokens(new, "all") == "decode"
    half = kl(dense, next_token_logprobs(new, ids)).mean()
    torch.testing.assert_close(costs[name][:16].sum(), half, atol=1e-4, rtol=1e-4)
    last = dict.fromkeys(costs, 0.0)
    for p in (0, 0.1, 0.3, 0.5, 0.8, 0.95):
        allocation = allocate_by_cost(new, costs, p)
        assert all(0 <= last[n] <= s <= 1 for n, s in allocation.items())
        last = allocation


class Linear4bit(nn.Linear):
    "Stands for the classes of quantization libraries."


def test_refused_models():
    "What cannot be converted is refused, and told why."
    model, ids = exact("llama")

    def refused(m, why):
        with pytest.raises(UnsupportedModelError, match=why):
            family(m)

    quantized = copy.deepcopy(model)
    quantized.model.layers[0].mlp.up_proj = Linear4bit(32, 64)
    refused(quantized, "layer 0, mlp.up_proj is a Linear4bit")
    refused(copy.deepcopy(model).to("meta"), "on one device")
    refused(convert(model, choose_rotations(second_moments(model, ids))), "already converted")
    refused(sparsified(model, ids), "already converted")
    refused("llmopt-tiny", "'str' models")
    cross = T.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=96, add_cross_attention=True)
    refused(T.AutoModelForCausalLM.from_config(cross), "cross-attention")
    for path in ("lm_head", "model.embed_tokens", "model.layers.2.self_attn.o_proj"):
        for dtype in (torch.int8, torch.float8_e4m3fn):
            low = copy.deepcopy(model)
            low.get_submodule(path).weight = nn.Parameter(torch.zeros(96, 32).to(dtype), requires_grad=False)
            refused(low, f"of {dtype}")


def test_families_that_are_not_known():
    "Gemma normalizes otherwise, Mixtral has experts, Mamba no attention, OPT projects its embeddings."
    small = dict(vocab_size=96, hidden_size=32, num_hidden_layers=1)
    for config in (
        T.GemmaConfig(**small, intermediate_size=56, num_attention_heads=4, num_key_value_heads=2, head_dim=8),
        T.MixtralConfig(**small, intermediate_size=56, num_attention_heads=4, num_local_experts=2),
        T.MambaConfig(**small),
        T.OPTConfig(**small, ffn_dim=64, num_attention_heads=4, word_embed_proj_dim=32),
    ):
        with pytest.raises(UnsupportedModelError, match=f"cannot convert '{config.model_type}'"):
            family(T.AutoModelForCausalLM.from_config(config))
