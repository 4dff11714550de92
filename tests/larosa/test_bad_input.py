"What cannot be meant is refused in one line, and what can be meant works: types, places, numbers, files."

import json
import random
import shutil

import numpy as np
import pytest
import torch

from helpers import small_model, tiny, tokenizer
from llmopt.core import ASSETS, load
from llmopt.errors import ConfigError, LlmoptError, ModelError, UnsupportedModelError
from llmopt.larosa import (
    BUNDLED,
    ChannelSelector,
    LaRoSAConfig,
    MaskedLinear,
    SimpleLaRoSA,
    choose_rotations,
    load_calibration,
    second_moments,
    self_draft,
    set_sparsity,
    set_tokens,
    sparsify,
    topk_channels,
    windows,
)
from llmopt.larosa.allocation import allocate_by_rule
from llmopt.larosa.calibration import default_texts

BAD = {
    "sparsity": [1, -0.1, True, "0.4", float("nan"), float("inf"), None, [0.4]],
    "allocation": ["even", None, 3],
    "rotation": ["pca", None],
    "tokens": ["some", None, 1],
    "first": [-1, 1.5, True, "2", None],
    "heads": ["yes", None, 2],
    "artifact": [3, True],
}


@pytest.mark.parametrize("field, value", [(f, v) for f, values in BAD.items() for v in values])
def test_a_bad_field(field, value):
    with pytest.raises(ConfigError, match=field):
        LaRoSAConfig(**{field: value})


def test_numbers_of_numpy():
    "They are numbers, and the configuration is the same, in JSON too."
    config = LaRoSAConfig(np.float32(0.5), first=np.int64(2))
    assert config == LaRoSAConfig(0.5, first=2) and hash(config) == hash(LaRoSAConfig(0.5, first=2))
    assert json.dumps(config.first) == "2"
    assert topk_channels(torch.randn(5), np.int64(2)).shape == (2,)


def test_a_configuration_and_keywords():
    with pytest.raises(ConfigError, match="not both"):
        SimpleLaRoSA(LaRoSAConfig(0.5), rotation="layer")
    with pytest.raises(ConfigError, match="unexpected keyword"):
        SimpleLaRoSA(0.5, level="measured")


def test_nothing_made_yet(tmp_path):
    for use in (lambda s: s.skipped_weight_bytes, lambda s: s.save(tmp_path)):
        with pytest.raises(ConfigError, match="call apply"):
            use(SimpleLaRoSA())


CALIBRATIONS = [
    (["Too short."], "at least 512"),
    ([], "0 tokens"),
    (["a", None], "not a NoneType"),
    ([b"bytes"] * 3, "not a bytes"),
    ([[1, 2, 3]], "not a list"),
    (5, "not a int"),
    (torch.zeros(600, dtype=torch.long), "of shape"),
    (torch.zeros(4, 256, dtype=torch.bool), "of shape"),
    (torch.zeros(1, 5000, dtype=torch.long), "longer than the context"),
    (torch.full((4, 256), 5000), "below 4,096"),
    (torch.full((4, 256), -1), "below 4,096"),
    (np.full((4, 256), 5000), "below 4,096"),
]


@pytest.mark.parametrize("calibration, why", CALIBRATIONS)
def test_a_bad_calibration(calibration, why):
    with pytest.raises(ConfigError, match=why):
        SimpleLaRoSA(0.5).apply(tiny().model, calibration, tiny().tokenizer)


def test_texts_need_a_tokenizer():
    with pytest.raises(ConfigError, match="needs the tokenizer"):
        SimpleLaRoSA(0.5).apply(tiny().model, ["A text."])


@pytest.mark.filterwarnings("ignore")
def test_texts_with_lone_surrogates():
    "Are read as U+FFFD, as everywhere."
    assert windows(["a \ud800 b"] * 40, tokenizer(), length=8, most=2).shape == (2, 8)


def test_no_calibration_text_is_a_query():
    "What is asked by default was not calibrated on."
    queries = [json.loads(line)["text"] for line in (ASSETS / "queries.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = default_texts(tokenizer())
    assert not any(q.strip() in t for t in texts for q in queries)


def test_an_array_of_token_ids():
    "An array of numpy, and a tensor of a small model: both calibrate."
    model, ids = small_model(), np.random.default_rng(0).integers(0, 4096, (4, 32))
    a, b = SimpleLaRoSA(0.5), SimpleLaRoSA(0.5)
    a.apply(model, ids)
    b.apply(model, torch.tensor(ids))
    assert a.calibration.info == b.calibration.info


@pytest.mark.parametrize("loaded_inside", [False, True])
def test_inside_inference_mode(loaded_inside):
    "A model is calibrated, converted and used there, wherever it was made."
    with torch.inference_mode():
        model = small_model() if loaded_inside else None
    model, ids = model or small_model(), torch.randint(4096, (4, 32), generator=torch.Generator().manual_seed(0))
    larosa = SimpleLaRoSA(0.5)
    with torch.inference_mode():
        new = larosa.apply(model, ids)
        assert new.generate(ids[:1], max_new_tokens=3, min_new_tokens=3, pad_token_id=0).shape == (1, 35)
    outside = SimpleLaRoSA(0.5)
    outside.apply(small_model(), ids)
    assert torch.allclose(outside.calibration.q[0, 0], larosa.calibration.q[0, 0], atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_types_of_the_bundled_model(dtype):
    "The bundled calibration fits the checkpoint in every type, and a model that is converted afterwards still answers."
    lm = load("llmopt-tiny", "cpu", dtype)
    prepared = LaRoSAConfig(when="always").prepare(lm)
    x = torch.tensor([[5, 6, 7]])
    kwargs = dict(max_new_tokens=2, min_new_tokens=2, do_sample=False, pad_token_id=0)
    assert prepared.model.generate(x, **kwargs).shape == (1, 5)
    other = SimpleLaRoSA(0.5).apply(lm.model, load_calibration(BUNDLED))
    for convert in (torch.nn.Module.half, torch.nn.Module.bfloat16, torch.nn.Module.float):
        assert convert(other).generate(x, **kwargs).shape == (1, 5)


def test_weights_that_are_not_finite():
    "One line that says what to do, before anything is measured."
    model = small_model()
    model.model.layers[1].mlp.up_proj.weight.data[3] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        SimpleLaRoSA(0.5).apply(model, torch.randint(4096, (4, 32)))
    with pytest.raises(ModelError, match="not finite"):
        SimpleLaRoSA(0.5, allocation="neutral", rotation="none").apply(model, torch.randint(4096, (4, 32)))


def test_what_was_not_sparsified():
    for use in (lambda m: set_tokens(m, "all"), lambda m: self_draft(m, torch.tensor([[5]]))):
        with pytest.raises(UnsupportedModelError, match="not sparsified"):
            use(small_model())
    with pytest.raises(UnsupportedModelError, match="convert the plain model first"):
        sparsify(small_model("gpt2"))
    with pytest.raises(UnsupportedModelError, match="convert the plain model first"):
        sparsify(sparsify(small_model()))


def test_bad_numbers_of_a_sparse_model():
    new = sparsify(small_model())
    for allocation, why in (({"9.mlp.up_proj": 0.5}, "no projection"), ({"0.mlp.up_proj": 1.5}, "between 0 and 1")):
        with pytest.raises(ConfigError, match=why):
            set_sparsity(new, allocation)
    assert all(m.sparsity == 0 for m in new.modules() if hasattr(m, "sparsity"))
    with pytest.raises(ConfigError, match="tokens are one of"):
        set_tokens(new, "some")
    with pytest.raises(ConfigError, match="tokens are one of"):
        ChannelSelector("some")
    with pytest.raises(ConfigError, match="rule is one of"):
        allocate_by_rule(new, 0.4, "even")
    with pytest.raises(ConfigError, match="rotation is one of"):
        choose_rotations({(0, 0): torch.eye(2)}, "pca")


def test_numbers_of_a_self_draft():
    new = SimpleLaRoSA(0.5, allocation="neutral").apply(small_model(), torch.randint(4096, (4, 32)))
    x = torch.tensor([[5, 6, 7]])
    assert torch.equal(self_draft(new, x, 0).ids, x)
    want = self_draft(new, x, 6).ids
    for drafts in (0, 1, np.int64(3)):
        assert torch.equal(self_draft(new, x, np.int64(6), drafts).ids, want)
    end = want[0, 5].item()
    for eos in (end, [end], np.int64(end), {end, 0}, torch.tensor([end])):
        got = self_draft(new, x, 6, eos=eos).ids
        assert torch.equal(got, want[:, : got.shape[1]]) and got[0, -1] == end
    assert torch.equal(self_draft(new, x, 6, eos=None).ids, want)
    for bad in (dict(max_new_tokens=-1), dict(max_new_tokens=1.5), dict(drafts=-1), dict(drafts="4"), dict(eos="a")):
        with pytest.raises(ConfigError):
            self_draft(new, x, **bad)
    with pytest.raises(ConfigError, match="one prompt at a time"):
        self_draft(new, x.repeat(2, 1))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    "A folder with the calibration of a small model, and that model."
    model, folder = small_model(), tmp_path_factory.mktemp("artifact")
    larosa = SimpleLaRoSA(0.5)
    larosa.apply(model, torch.randint(4096, (4, 32), generator=torch.Generator().manual_seed(0)))
    return larosa.save(folder / "a"), model, larosa


@pytest.mark.parametrize("name", ["larosa.json", "larosa.safetensors"])
def test_a_damaged_artifact(artifact, name, tmp_path):
    "One byte is changed, a hundred times: refused in one line, or equal (a space of the JSON)."
    folder, _, larosa = artifact
    broken, rng, refused = tmp_path / "b", random.Random(0), 0
    shutil.copytree(folder, broken)
    data = (folder / name).read_bytes()
    for _ in range(100):
        at = rng.randrange(len(data))
        (broken / name).write_bytes(data[:at] + bytes([data[at] ^ rng.randrange(1, 256)]) + data[at + 1 :])
        try:
            assert load_calibration(broken).info == larosa.calibration.info
        except ModelError as e:
            refused += 1
            assert "\n" not in str(e) and "no LaRoSA artifact" in str(e)
    assert refused > (60 if name == "larosa.json" else 99)


def test_artifacts_that_are_none(artifact, tmp_path):
    "Cut off, empty, of another format, with entries of wrong types, or not there."
    folder = artifact[0]
    info = json.loads((folder / "larosa.json").read_text())
    for i, text in enumerate(["", "[]", "null", "{", "9" * 5000, "[" * 5000, json.dumps(info | dict(format=1))]):
        bad = tmp_path / str(i)
        shutil.copytree(folder, bad)
        (bad / "larosa.json").write_text(text)
        with pytest.raises(ModelError, match="no LaRoSA artifact"):
            load_calibration(bad)
    for path in (tmp_path / "none", folder / "larosa.json", "\0", None):
        with pytest.raises(ModelError, match="no LaRoSA artifact"):
            load_calibration(path)


def test_places_where_nothing_can_be_saved(artifact, tmp_path):
    "A file in the way, a device, an impossible name: one line, and nothing half-written."
    larosa, file = artifact[2], tmp_path / "file"
    file.write_text("mine")
    for place in (file, file / "below", "/dev/null/x", "\0", "x" * 300, None):
        with pytest.raises(ModelError, match="cannot be written") as e:
            larosa.save(place)
        assert "\n" not in str(e.value)
    assert file.read_text() == "mine"
    assert sorted(p.name for p in larosa.save(tmp_path / "good").iterdir()) == ["larosa.json", "larosa.safetensors"]


def test_a_calibration_that_does_not_fit(artifact):
    "Another model, other weights, another rotation, or no costs."
    folder, model, larosa = artifact
    calibration = load_calibration(folder)
    with pytest.raises(ConfigError, match="made for another model"):
        SimpleLaRoSA(0.5).apply(small_model("qwen2"), calibration)
    changed = small_model()
    changed.model.layers[1].mlp.up_proj.weight.data[7, 1] += 0.01
    with pytest.raises(ConfigError, match="made for another model"):
        SimpleLaRoSA(0.5).apply(changed, calibration)
    with pytest.raises(ConfigError, match="asks for 'layer'"):
        SimpleLaRoSA(0.5, rotation="layer").apply(model, calibration)
    with pytest.raises(ConfigError, match="holds no costs"):
        SimpleLaRoSA(0.5).apply(model, calibration._replace(costs={}))
    with pytest.raises(LlmoptError, match="made for another model"):
        LaRoSAConfig(artifact=str(BUNDLED)).prepare(tiny().__class__(model, tokenizer(), "small"))


@pytest.mark.parametrize("rotation", ["learned", "model", "layer", "block"])
def test_an_artifact_serves_every_sparsity_and_type(rotation, tmp_path):
    "What is loaded gives the same model, exact where nothing is dropped, in half precision too."
    model, ids = small_model().double(), torch.randint(4096, (4, 32), generator=torch.Generator().manual_seed(0))
    larosa = SimpleLaRoSA(0.5, rotation=rotation, tokens="all", linear=MaskedLinear)
    with torch.inference_mode():
        want = larosa.apply(model, ids)(ids).logits
        larosa.save(tmp_path)
        again = SimpleLaRoSA(0.5, rotation=rotation, tokens="all", artifact=str(tmp_path), linear=MaskedLinear)
        got = again.apply(model)
        assert again.calibration.info == larosa.calibration.info and again.traffic == larosa.traffic
        assert (got(ids).logits - want).abs().max() < 1e-3
        set_tokens(got, "none")
        assert (got(ids).logits - model(ids).logits).abs().max() < 1e-5
        again.apply(small_model().double().bfloat16())


def test_moments_of_one_text_and_many():
    "Batches do not matter."
    model, ids = small_model(), torch.randint(4096, (5, 16), generator=torch.Generator().manual_seed(0))
    for key, c in second_moments(model, ids, batch_size=1).items():
        torch.testing.assert_close(c, second_moments(model, ids, batch_size=5)[key], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.array([1, 2]), torch.tensor([1, 2]), ["auto"], None])
@pytest.mark.parametrize("field", ["allocation", "rotation", "heads", "tokens", "first", "sparsity"])
def test_fields_of_several_numbers(field, bad):
    "An array has no truth value; it is refused as any other wrong value."
    with pytest.raises(ConfigError, match=f"^{field} "):
        LaRoSAConfig(**{field: bad})


@pytest.mark.parametrize("linear", [None, "MaskedLinear", 1, np.array([1, 2]), lambda: 1, object()])
def test_a_linear_map_that_cannot_be_made(linear):
    "It is called with a weight and a bias."
    with pytest.raises(ConfigError, match="linear is a class made from weight and bias"):
        SimpleLaRoSA(0.5, linear=linear)
