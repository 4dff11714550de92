"Sparse products where they are faster: what is chosen, what the model then computes, and what keeps the choice."

import json

import pytest
import torch

from helpers import logits, small_model, tiny, tokenizer
from llmopt.core import LM
from llmopt.engine import EnhancedFusedLLMEngine, Recipe
from llmopt.errors import ConfigError
from llmopt.larosa import (
    Choice,
    LaRoSAConfig,
    MaskedLinear,
    SimpleLaRoSA,
    SparsifiedLinear,
    choose,
    projections,
    set_sparsity,
    sparse_shapes,
    traffic,
)
from llmopt.larosa import choice as measured
from llmopt.larosa import config as prepared
from llmopt.larosa.calibration import calibrate
from llmopt.larosa.choice import Product

IDS = torch.randint(4096, (8, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "A cache of its own."
    monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path))


@pytest.fixture
def faster(cache, monkeypatch):
    "Let sparse products be faster in layers with as many outputs as a list names, at as many inputs as it names."
    wins, asked = set(), []

    def times(linears, sparsity, bits=16):
        shape = linears[0].out_features, linears[0].in_features
        asked.append((shape, sparsity))
        return [2.0, 1.0] if shape in wins else [1.0, 2.0]

    monkeypatch.setattr(measured, "product_times", times)
    monkeypatch.setattr(
        "llmopt.engine.step_model.why_not_converted", lambda model: "here products are chosen one by one"
    )
    return wins, asked


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize("rotation", ["none", "layer"])
def test_a_mixture_computes_what_masks_in_the_same_places_compute(family, rotation, faster, monkeypatch):
    "Rotated and not: plain layers beside sparse ones are the reference with nothing dropped in the plain ones."
    monkeypatch.setattr(measured, "change_time", lambda weight: 0.01)
    model, (wins, _) = small_model(family), faster
    some = projections(model)["0.mlp.down_proj"]
    wins.add((some.out_features, some.in_features))
    larosa = SimpleLaRoSA(0.5, allocation="neutral", rotation=rotation, heads=False, tokens="all", when="faster")
    got = larosa.apply(model, IDS)
    assert sparse_shapes(got) == [f"{some.out_features}x{some.in_features}"]
    assert 0 < larosa.skipped_weight_bytes < 0.5 * larosa.traffic.linears
    whole = SimpleLaRoSA(0.5, MaskedLinear, allocation="neutral", rotation=rotation, heads=False, tokens="all")
    want = whole.apply(model, larosa.calibration)
    sparse = [n for n, m in projections(got).items() if isinstance(m, SparsifiedLinear)]
    assert sparse == [n for n in projections(got) if n.endswith("down_proj")]
    set_sparsity(want, {n: 0.0 for n in projections(want) if n not in sparse})
    with torch.inference_mode():
        torch.testing.assert_close(logits(got, IDS[:2]), logits(want, IDS[:2]), rtol=1e-4, atol=1e-4)
        assert (logits(got, IDS[:2]) - logits(model, IDS[:2])).abs().max() > 1e-3
    with pytest.raises(ConfigError, match="is not sparse in this model"):
        set_sparsity(got, {"0.self_attn.o_proj": 0.5})


def test_where_nothing_pays_the_model_is_the_plain_one(faster, monkeypatch):
    "The very same object: nothing is calibrated, rotated or hooked, and the engine says why."
    monkeypatch.setattr(prepared, "calibrate", None)
    lm = LM(small_model(), tokenizer(), "small")
    e = EnhancedFusedLLMEngine(lm, recipe="larosa", max_new_tokens=4)
    plain = EnhancedFusedLLMEngine(lm, max_new_tokens=4)
    assert e.lm.model is lm.model and e.queue is plain.queue and e.reuse == plain.reuse
    m = e.run("Why?")
    assert m.output_ids == plain.run("Why?").output_ids and m.skipped_weight_bytes == 0
    assert e.notes == m.notes and "the model is the plain one" in m.notes[0] and not e.sparse_shapes
    larosa = SimpleLaRoSA(LaRoSAConfig())
    assert larosa.apply(lm.model, None, lm.tokenizer) is lm.model and larosa.skipped_weight_bytes == 0
    assert str(larosa.choice) == m.notes[0]


def test_what_the_engine_says_of_a_mixture(faster):
    "Which shapes run sparse with which ratio, in each answer; phrases are read in the basis of the model."
    lm, (wins, asked) = tiny(), faster
    wins.add((704, 256))
    e = EnhancedFusedLLMEngine(lm, recipe="vocab+larosa:sparsity=0.5", max_new_tokens=4)
    m = e.run("What is machine learning, and what is artificial intelligence?")
    assert e.sparse_shapes == ["704x256"] and "sparse in 704x256 (0.50) and dense in" in m.notes[0]
    assert 0 < m.skipped_weight_bytes < traffic(e.lm.model).linears / 2
    first, last = (dict(asked)[704, 256] for asked in (asked[:4], asked[4:]))
    assert first == 0.5 != last  # the second time with the sparsity that the calibration gives to the shape


def test_nothing_to_skip_is_nothing_to_measure(faster):
    "At sparsity 0, and where no pass is sparse."
    lm, (_, asked) = LM(small_model(), tokenizer(), "small"), faster
    for config in (LaRoSAConfig(0.0), LaRoSAConfig(0.5, tokens="none")):
        assert config.prepare(lm) is lm
    assert not asked


def test_changes_of_basis_are_paid_for(faster, monkeypatch, tmp_path):
    "A rotation for each layer adds a dense product; where that costs more than is saved, the model stays plain."
    model, (wins, _) = small_model(), faster
    wins |= {(m.out_features, m.in_features) for m in projections(model).values()}
    calibration = calibrate(model, IDS, "layer", False, False)
    larosa = SimpleLaRoSA(0.5, allocation="neutral", rotation="layer", heads=False, when="faster")
    for us, sparse in ((0.1, True), (1000.0, False)):
        monkeypatch.setattr(measured, "change_time", lambda weight, us=us: us)
        monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path / str(us)))
        assert (larosa.apply(model, calibration) is model) != sparse
    assert larosa.choice.changes == 1000.0 * (model.config.num_hidden_layers - 1)


def test_a_second_start_measures_nothing(faster, monkeypatch):
    "The times are kept for the machine, the threads and the shapes; a damaged file is measured again."
    model, (_, asked) = small_model(), faster
    allocation = dict.fromkeys(projections(model), 0.5)
    first, n = choose(model, allocation), len(asked)
    assert choose(model, allocation) == first and len(asked) == n
    choose(model, dict.fromkeys(projections(model), 0.4))
    assert len(asked) == 2 * n
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    choose(model, allocation)
    assert len(asked) == 3 * n
    for file in measured.writable_dir(measured.KEPT_TIMES).glob("*/times.json"):
        file.write_text(json.dumps([[1.0, -1.0]] * n))
    assert choose(model, allocation) == first and len(asked) == 4 * n


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_real_times_of_a_small_model(family, cache):
    "Without anything replaced: a model this small gains nothing, and torch's random numbers are left alone."
    model, before = small_model(family), torch.get_rng_state()
    choice = choose(model, dict.fromkeys(projections(model), 0.4))
    assert choice.products and not choice.sparse and torch.equal(torch.get_rng_state(), before)
    assert all(p.dense > 0 and p.sparse > 0 for p in choice.products.values())
    assert all(p.requires_grad for p in model.parameters())


def test_a_tie_is_no_gain():
    "Only what is clearly faster runs sparse."
    assert Choice({(4, 4): Product(3, 100.0, 91.0)}).sparse == set()
    assert Choice({(4, 4): Product(3, 100.0, 89.0)}).sparse == {(4, 4)}


def test_the_choice_is_part_of_what_a_comparison_depends_on(faster):
    "Rows of another choice are not mixed with these: the shapes stand in the settings that resuming compares."
    from llmopt.evaluation.comparison import compare

    wins, _ = faster
    wins.add((704, 256))
    kw = dict(methods=["larosa:sparsity=0.5"], model=tiny(), rounds=1, max_new_tokens=2, memory=False, progress=False)
    results = compare(["Why?"], **kw)
    assert results.config["sparse_shapes"] == {"baseline": [], "larosa:sparsity=0.5": ["704x256"], "baseline*": []}
    assert any("sparse in 704x256" in w for w in results.warnings)
    assert "sparse_shapes" not in compare(["Why?"], **kw | dict(methods=["kv"])).config


def test_recipes_name_it():
    "`when` is a parameter like others, and another value is refused with the known ones."
    assert Recipe.parse("larosa:when=always").larosa.when == "always"
    assert Recipe.parse("larosa").larosa.when == "faster" and LaRoSAConfig.published().when == "always"
    assert SimpleLaRoSA(0.4).config.when == "always" and SimpleLaRoSA(0.4, when="faster").config == LaRoSAConfig()
    with pytest.raises(ConfigError, match="when is one of faster, always"):
        Recipe.parse("larosa:when=never")
