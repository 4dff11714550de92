"""Whatever changes keys and values changes the names of stored chunks; what cannot be looked into is not stored.

Each change must find nothing in a store that the model filled before it, and give the keys of a store of its own.
"""

import types
import warnings

import pytest
import torch
import transformers as T

from helpers import random_ids, small_config, small_model, tiny
from llmopt.errors import UnsupportedModelError
from llmopt.kv_cache import PrefixStore, SlabCache
from llmopt.kv_cache.attention import packed
from llmopt.kv_cache.prefix_key import model_key
from llmopt.larosa import SimpleLaRoSA, load_calibration
from llmopt.larosa.artifact import BUNDLED

IDS = random_ids(16 * 4 + 1)


def fill(model, store, ids=IDS):
    "Report of a prefill, and all keys."
    cache = SlabCache(model.config, 128)
    report = store.prefill(model, cache, ids)
    return report, torch.cat([s.keys.flatten().clone() for s in cache.slabs])


class Adapter(torch.nn.Module):
    "A projection with an addition that can be scaled and switched, as LoRA has it."

    def __init__(self, base):
        super().__init__()
        self.base, self.scaling, self.active, self.gains = (
            base,
            dict(default=1.0),
            ["default"],
            (1.0, torch.tensor(1.0)),
        )

    def forward(self, x):
        y = self.base(x)
        for name in self.active:
            y = y + self.scaling[name] * self.gains[0] * self.gains[1] * y
        return y


@pytest.fixture
def model():
    m = small_model()
    attention = m.model.layers[0].self_attn
    attention.k_proj = Adapter(attention.k_proj)
    return m


def data(m):
    m.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1


def numpy(m):
    m.model.layers[0].mlp.up_proj.weight.detach().numpy()[3] *= 2


def swapped_rows(m):
    w = m.model.layers[0].mlp.down_proj.weight.data
    w[[0, 1]] = w[[1, 0]]


def buffer(m):
    m.model.rotary_emb.inv_freq *= 1.5


def scale(m):
    m.model.layers[0].self_attn.k_proj.scaling["default"] = 0.5


def switch(m):
    m.model.layers[0].self_attn.k_proj.active.clear()


def number_in_a_tuple(m):
    m.model.layers[0].self_attn.k_proj.gains = (2.0, torch.tensor(1.0))


def tensor_in_a_tuple(m):
    m.model.layers[0].self_attn.k_proj.gains[1].mul_(2)


def attribute(m):
    m.model.layers[0].self_attn.scaling *= 2


def epsilon(m):
    m.model.layers[0].input_layernorm.variance_epsilon = 0.5


def forward_of_an_instance(m):
    mlp = m.model.layers[0].mlp
    mlp.forward = types.MethodType(lambda self, x: 3 * type(self).forward(self, x), mlp)


def attention(m):
    m.set_attn_implementation("eager")


def dtype(m):
    m.to(torch.bfloat16)


def adapter_removed(m):
    m.model.layers[0].self_attn.k_proj = m.model.layers[0].self_attn.k_proj.base


CHANGES = [data, numpy, swapped_rows, buffer, scale, switch, number_in_a_tuple, tensor_in_a_tuple, attribute, epsilon]
CHANGES += [forward_of_an_instance, attention, dtype, adapter_removed]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_change_finds_nothing(model, change, tmp_path):
    "And what is computed then is bit-identical to what the changed model stores in a folder of its own."
    store = PrefixStore(tmp_path, chunk=16)
    assert fill(model, store)[0].hits == 0 and fill(model, store)[0].hits == 4
    change(model)
    report, got = fill(model, store)
    _, want = fill(model, PrefixStore(tmp_path / "own", chunk=16))
    assert report.hits == 0 and torch.equal(got, want)


def test_weights_changed_in_a_model_made_in_inference_mode(tmp_path):
    "Tensors made in inference mode count no versions."
    store = PrefixStore(tmp_path, chunk=16)
    with torch.inference_mode():
        m = small_model()
        assert fill(m, store)[0].hits == 0 and fill(m, store)[0].hits == 4
        m.model.layers[0].self_attn.k_proj.weight.mul_(2)
        assert fill(m, store)[0].hits == 0


def test_numerics_are_part_of_the_key(model, tmp_path):
    "Autocast computes in another type, another number of threads adds up in another order."
    store = PrefixStore(tmp_path, chunk=16)
    fill(model, store)
    with packed(model):
        assert fill(model, store)[0].hits == 0
    assert fill(model, store)[0].hits == 4
    key, threads = model_key(model, 16), torch.get_num_threads()
    with torch.autocast("cpu", torch.bfloat16):
        assert model_key(model, 16) != key
    torch.set_num_threads(threads + 1)
    try:
        assert model_key(model, 16) != key
    finally:
        torch.set_num_threads(threads)
    assert model_key(model, 16) == key


def test_a_method_of_a_class(tmp_path, monkeypatch):
    "Replaced on the class, so that nothing in the model itself has changed."
    store, m = PrefixStore(tmp_path, chunk=16), small_model()
    fill(m, store)
    own = type(m.model.layers[0].mlp).forward
    monkeypatch.setattr(type(m.model.layers[0].mlp), "forward", lambda self, x: 2 * own(self, x))
    assert fill(m, store)[0].hits == 0


def test_an_attention_function_replaced_under_its_name(tmp_path):
    "The same name and code, another number in the closure: the first is found again, the second is not."
    store, m = PrefixStore(tmp_path, chunk=16), small_model()

    def make(factor):
        def attend(module, q, k, v, mask, **kw):
            return q.transpose(1, 2) * factor, None

        return attend

    hits = []
    for factor in (1.0, 1.0, 2.0):
        T.AttentionInterface.register("test_replaced", make(factor))
        m.set_attn_implementation("test_replaced")
        hits.append(fill(m, store)[0].hits)
    assert hits == [0, 4, 0]


@pytest.fixture
def fresh_class():
    "A class of models that nobody has used in this process."

    class Fresh(T.LlamaForCausalLM):
        pass

    torch.manual_seed(0)
    return Fresh(small_config())


def asks_for_attentions(m):
    m.set_attn_implementation("eager")
    m(IDS[:, :4], output_attentions=True, output_hidden_states=True)
    m.set_attn_implementation("sdpa")


def generates(m):
    m.generate(IDS[:, :4], max_new_tokens=3, num_beams=2, pad_token_id=5)


def is_packed(m):
    with packed(m):
        pass


def sets_an_attribute_again(m):
    attention = m.model.layers[0].self_attn
    scaling = attention.scaling
    del attention.scaling
    attention.scaling = scaling


@pytest.mark.parametrize("use", [asks_for_attentions, generates, is_packed, sets_an_attribute_again])
def test_what_was_done_with_a_model_is_no_part_of_its_key(fresh_class, use):
    "What transformers notes on a class at its first use, hooks of its own that stay, the order of attributes."
    key = model_key(fresh_class, 16)
    use(fresh_class)
    assert model_key(fresh_class, 16) == key


def test_other_hooks_of_the_same_model_are_still_seen(tmp_path):
    "The hooks with which transformers collects attentions are harmless; one beside them is not."
    m = small_model()
    asks_for_attentions(m)
    m.model.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModelError, match="has hooks"):
        model_key(m, 16)


def test_settings_that_round_products_are_part_of_the_key(monkeypatch):
    "Both ways to set them, and what the libraries below read from the environment."
    m, keys = small_model(), set()
    keys.add(model_key(m, 16))
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    keys.add(model_key(m, 16))
    monkeypatch.undo()
    try:
        torch.set_float32_matmul_precision("medium")
        keys.add(model_key(m, 16))
        if hasattr(torch.backends.mkldnn, "matmul"):
            torch.backends.mkldnn.matmul.fp32_precision = "tf32"
            keys.add(model_key(m, 16))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert len(keys) == 3 + hasattr(torch.backends.mkldnn, "matmul")
    assert model_key(m, 16) in keys


def test_the_same_model_twice_shares(tmp_path):
    "Nothing that differs between two equal models, or between two prefills of one, is part of the key."
    store = PrefixStore(tmp_path, chunk=16)
    for family in ("llama", "qwen3", "gpt2", "phi2"):
        assert fill(small_model(family), store)[0].hits == 0
        m = small_model(family)
        m.generate(IDS[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=5)
        assert fill(m, store)[0].hits == 4


@pytest.fixture(scope="module")
def sparse():
    "The bundled model by LaRoSA, sparse for all tokens."
    return SimpleLaRoSA(sparsity=0.6, tokens="all").apply(tiny().model, load_calibration(BUNDLED))


def test_larosa(sparse, tmp_path):
    "Sparsity, mode, dense first tokens, and being dense for a while: all of it changes keys."
    from llmopt.larosa import dense, projections, set_sparsity, set_tokens
    from llmopt.larosa.sparse_model import selector_of

    store = PrefixStore(tmp_path, chunk=16)
    assert fill(sparse, store)[0].hits == 0 and fill(sparse, store)[0].hits == 4
    with dense(sparse):
        report, got = fill(sparse, store)
        assert report.hits == 0 and torch.equal(got, fill(sparse, PrefixStore(tmp_path / "own", chunk=16))[1])
    assert fill(sparse, store)[0].hits == 4
    selector_of(sparse).first = 8
    assert fill(sparse, store)[0].hits == 0
    selector_of(sparse).first = 0
    was = set_tokens(sparse, "decode")
    assert fill(sparse, store)[0].hits == 0
    set_tokens(sparse, was)
    set_sparsity(sparse, {next(iter(projections(sparse))): 0.1})
    assert fill(sparse, store)[0].hits == 0


def test_what_cannot_be_looked_into_is_not_stored(tmp_path):
    "The prefill is that of a model without store, and the reason is said once."
    m, plain = small_model(), fill(small_model(), PrefixStore(tmp_path / "plain", chunk=16))[1]
    m.model.layers[1].mlp.secret = (i for i in range(3))
    store = PrefixStore(tmp_path / "store", chunk=16)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        reports = [fill(m, store) for _ in range(3)]
    assert len(said) == 1 and "secret holds a generator" in str(said[0].message) and "salt" in str(said[0].message)
    for r, keys in reports:
        assert (r.hits, r.bytes_written, r.computed) == (0, 0, 4) and "generator" in r.not_stored
        assert torch.equal(keys, plain)
    assert not [*(tmp_path / "store").iterdir()]
    vouched = PrefixStore(tmp_path / "store", chunk=16, salt="the generator only counts")
    assert [fill(m, vouched)[0].hits for _ in range(2)] == [0, 4]


def test_hooks_are_not_stored_without_a_salt(tmp_path):
    "One warning and a reason in the report; with a salt the user answers for them, and chunks are found again."
    m, store = small_model(), PrefixStore(tmp_path, chunk=16)
    m.model.layers[1].register_forward_pre_hook(lambda *_: None)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        reports = [fill(m, store)[0] for _ in range(2)]
    assert len(said) == 1 and all("hooks" in r.not_stored and not r.bytes_written for r in reports)
    assert [fill(m, PrefixStore(tmp_path, chunk=16, salt="it only looks"))[0].hits for _ in range(2)] == [0, 4]


def test_deep_and_circular_state_comes_to_an_end(tmp_path):
    "A circle is walked once; a list nested 5,000 deep is given up with a warning, and nothing is found."
    m, store = small_model(), PrefixStore(tmp_path, chunk=16)
    m.me = [m, dict(again=m.model)]
    assert [fill(m, store)[0].hits for _ in range(2)] == [0, 4]
    nest = []
    for _ in range(5000):
        nest = [nest]
    m.nest = nest
    with pytest.warns(UserWarning, match="no end"):
        assert fill(m, store)[0].hits == 0
