"What is found out about a model before it is made sparse, by which shortcut, and how it is kept."

import json
import multiprocessing
import os
import sys
import time
from dataclasses import replace

import pytest
import torch

from helpers import logits, small_model, tiny, tokenizer
from llmopt.core import LM
from llmopt.larosa import (
    BUNDLED,
    LaRoSAConfig,
    SimpleLaRoSA,
    calibrate,
    channel_costs,
    choose_rotations,
    convert,
    default_texts,
    load_calibration,
    projections,
    second_moments,
    sparsify,
    windows,
)
from llmopt.larosa import artifact as kept
from llmopt.larosa import config as prepared
from llmopt.larosa.allocation import costs_by_passes
from llmopt.larosa.calibration import clearly_less, shared_out
from llmopt.larosa.rotation import rotates

from .models import exact, random_heads


def ranks(x):
    "The rank of every entry of `x`."
    return x.argsort().argsort().double()


def of_half(costs):
    "What half sparsity costs each projection."
    return torch.stack([c[: len(c) // 2].sum() for c in costs.values()])


@pytest.mark.parametrize("rotation", ["none", "model"])
def test_one_backward_pass_ranks_as_a_pass_for_each_projection(rotation):
    "On the bundled model, in its own basis and in another; and the nats are about the same."
    lm = tiny()
    ids = windows(default_texts(lm.tokenizer), lm.tokenizer, 96, 2)
    q = choose_rotations(second_moments(lm.model, ids), rotation)
    new = sparsify(convert(lm.model, q))
    fast, slow = of_half(channel_costs(new, ids)), of_half(costs_by_passes(new, ids))
    assert torch.corrcoef(torch.stack([ranks(fast), ranks(slow)]))[0, 1] > 0.9
    assert 0.5 < (fast / slow).median() < 2


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt2", "phi2"])
def test_costs_in_a_basis_need_no_converted_model(family):
    "Turning inputs and gradients of the plain model gives what the converted model gives."
    model, ids = exact(family)
    q, r = choose_rotations(second_moments(model, ids), "block"), random_heads(model)
    want = channel_costs(sparsify(convert(model, q, r)), ids)
    got = channel_costs(model, ids, q, r)
    assert got.keys() == want.keys() == projections(model).keys()
    for name, c in want.items():
        assert (c.diff() >= 0).all() and c[-1] > 0
        torch.testing.assert_close(got[name], c, rtol=1e-3, atol=1e-3 * c[-1].item())


def test_costs_leave_the_model_alone():
    "No gradients, no hooks, parameters as they were; the same again for the same seed."
    model, ids = small_model(), torch.randint(4096, (2, 32))
    first, second = channel_costs(model, ids), channel_costs(model, ids)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_without_rotation_nothing_changes():
    "At sparsity 0 the logits are those of the plain model, bit for bit; the gains are where they were."
    model, ids = small_model(), torch.randint(4096, (4, 32))
    for config in (
        LaRoSAConfig(0.0, rotation="none", heads=False, tokens="all", when="always"),
        LaRoSAConfig(0.0, "neutral", "none", False, when="always"),
    ):
        new = SimpleLaRoSA(config).apply(model, ids)
        with torch.inference_mode():
            assert torch.equal(logits(new, ids), logits(model, ids))
        assert torch.equal(new.model.layers[0].input_layernorm.weight, model.model.layers[0].input_layernorm.weight)


def test_automatic_rotation():
    "It is one of two, its costs are there, and the windows of the test are not those of the costs."
    model, ids = small_model(), torch.randint(4096, (20, 32), generator=torch.Generator().manual_seed(0))
    c = calibrate(model, ids)
    assert c.info["rotation"] == "auto" and c.info["chosen"] in ("none", "model")
    assert rotates(c.q) == (c.info["chosen"] == "model") and c.costs.keys() == projections(model).keys()
    texts = shared_out(ids, "auto", 32)
    assert not {tuple(x) for x in texts.test.tolist()} & {tuple(x) for x in texts.costs.tolist()}


def test_interruption(monkeypatch):
    "Ctrl-C in the middle of a calibration leaves no hook behind."
    model, ids, calls = small_model(), torch.randint(4096, (8, 32)), []

    def interrupted(*args):
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt

    handle = model.lm_head.register_forward_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, ids)
    handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "A cache of its own, and a list that grows with each calibration."
    monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path / "cache"))
    made = []

    def counted(*args, **kwargs):
        made.append(1)
        return calibrate(*args, **kwargs)

    monkeypatch.setattr(prepared, "calibrate", counted)
    return tmp_path / "cache" / kept.KEPT, made


def fresh():
    "A small model that no engine has seen, always with the same weights."
    return LM(small_model(), tokenizer(), "small")


def entries(folder):
    "The kept calibrations in `folder`."
    return [p for p in folder.iterdir() if p.is_dir()]


def test_the_kept_calibration_is_the_fresh_one(cache):
    "The second start calibrates nothing, and its model computes the same, bit for bit."
    folder, made = cache
    config, ids = LaRoSAConfig(0.5, tokens="all", when="always"), torch.randint(4096, (2, 16))
    first, second = config.prepare(fresh()), config.prepare(fresh())
    assert made == [1] and len(entries(folder)) == 1 and first.model is not second.model
    with torch.inference_mode():
        assert torch.equal(logits(first.model, ids), logits(second.model, ids))
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters()))


@pytest.mark.parametrize("damage", ["truncated", "changed", "another format", "gone"])
def test_a_damaged_entry_is_made_again(cache, damage):
    "Whatever is wrong with it, and it is whole afterwards."
    folder, made = cache
    config = LaRoSAConfig(0.5, rotation="none", when="always")
    config.prepare(fresh())
    (entry,) = entries(folder)
    tensors, info = entry / "larosa.safetensors", entry / "larosa.json"
    if damage == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-9])
    elif damage == "changed":
        data = bytearray(tensors.read_bytes())
        data[-3] ^= 8
        tensors.write_bytes(data)
    elif damage == "another format":
        info.write_text(json.dumps(json.loads(info.read_text()) | dict(format=1)))
    else:
        info.unlink()
    config.prepare(fresh())
    assert made == [1, 1] and load_calibration(entry).costs
    config.prepare(fresh())
    assert made == [1, 1]


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    "A file is in the way: one warning, and the work goes on."
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot write in"):
        assert LaRoSAConfig(0.5, rotation="none", when="always").prepare(fresh()).model is not None
    assert (tmp_path / "file").read_text() == "mine"


def test_the_key_knows_everything(monkeypatch):
    "Each parameter, the weights, the text and the version of the code give another key; the sparsity does not."
    seen = []

    def asked(about, make):
        seen.append(json.dumps(about, sort_keys=True))
        return calibrate(lm.model, ids, **{k: about[k] for k in ("rotation", "heads", "measure")})

    monkeypatch.setattr(prepared, "kept_calibration", asked)
    base, ids = LaRoSAConfig(0.5, rotation="none", heads=False, when="always"), torch.randint(4096, (4, 32))
    changes = dict(rotation="model"), dict(heads=True), dict(allocation="neutral")
    for config in (base, *(replace(base, **c) for c in changes), replace(base, sparsity=0.3)):
        lm = fresh()
        config.prepare(lm)
    assert len(set(seen)) == 4 and seen[0] == seen[-1]
    lm = fresh()
    lm.model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    base.prepare(lm)
    monkeypatch.setattr(prepared, "MADE_BY", -1)
    lm = fresh()
    base.prepare(lm)
    monkeypatch.setattr(prepared, "calibration_ids", lambda *args: ids + 1 - ids // 4095)
    lm = fresh()
    base.prepare(lm)
    assert len(set(seen)) == 7


def _keep(folder, place):
    "In a process of its own: ask for a calibration that takes a moment to make, and leave a mark for making it."
    os.environ["LLMOPT_CACHE"] = folder

    def make():
        (place / str(os.getpid())).write_text("made here")
        time.sleep(0.5)
        return load_calibration(BUNDLED)

    assert kept.kept_calibration(dict(a=1), make).costs


def test_two_processes_at_once(tmp_path):
    "One makes it, the other waits and reads."
    marks = tmp_path / "marks"
    marks.mkdir()
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=_keep, args=(str(tmp_path / "cache"), marks)) for _ in range(2)]
    for p in both:
        p.start()
    for p in both:
        p.join(120)
    assert [p.exitcode for p in both] == [0, 0] and len(list(marks.iterdir())) == 1


def test_patched_code_is_another_model(cache, monkeypatch):
    "A `forward` patched in its class, or a function that it reads, is calibrated anew; without it the old is found."
    _, made = cache
    lm, config = fresh(), LaRoSAConfig(0.5, rotation="none", when="always")
    first = config.prepare(lm).model
    module = sys.modules[type(lm.model).__module__]
    with monkeypatch.context() as m:
        usual = module.LlamaMLP.forward
        m.setattr(module.LlamaMLP, "forward", lambda self, x: 2 * usual(self, x))
        assert config.prepare(lm).model is not first and len(made) == 2
    with monkeypatch.context() as m:
        turn = module.apply_rotary_pos_emb
        m.setattr(module, "apply_rotary_pos_emb", lambda q, k, *args, **kwargs: turn(k if q is None else q, k, *args))
        assert config.prepare(lm).model is not first and len(made) == 3
    assert config.prepare(lm).model is first and len(made) == 3


def test_a_rotation_must_win_clearly():
    "A lower mean is no reason for another basis, as long as the windows do not agree."
    assert clearly_less([0.1, 0.2, 0.3], [0.2, 0.31, 0.4])
    assert not clearly_less([0.1, 0.2, 0.3], [0.3, 0.1, 0.3]) and not clearly_less([0.2, 0.3], [0.1, 0.2])
    assert not clearly_less([0.1], [0.9])


def test_rotations_are_tested_on_text_that_nothing_has_seen():
    "With text of another kind the test is on that alone; without, on windows that the costs have not seen."
    ids, other = torch.zeros(20, 32, dtype=torch.long), torch.ones(40, 32, dtype=torch.long)
    texts = shared_out(ids, "auto", 32, other)
    assert texts.test.min() == 1 and max(x.max() for x in (texts.moments, texts.values, texts.costs)) == 0
    assert shared_out(ids, "auto", 32).test.max() == 0
