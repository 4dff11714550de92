"""The plain alternatives on models of several families, on odd requests, and where they cannot run."""

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from helpers import small_model, tiny, tokenizer
from llmopt.core import LM
from llmopt.errors import ConfigError, ContextError, LlmoptError, ModelError, UnsupportedModelError
from llmopt.evaluation import llama_cpp, plain_engines
from llmopt.evaluation.alternatives import ALTERNATIVES, make_alternative, named_alternatives, unavailable
from llmopt.evaluation.llama_cpp import LlamaCppEngine
from llmopt.evaluation.plain_engines import CompiledEngine, Int8Linear, PlainEngine, int8_weights, time_limit

ASKED = "plain:int8", "plain:bf16", "plain:static_cache", "plain:prompt_lookup", "plain:kv_fp8"


def model_of(family):
    "A small random model with the bundled tokenizer."
    return LM(small_model(family), tokenizer(), f"small {family}")


@pytest.mark.parametrize("family", ["gpt2", "mistral", "phi2", "qwen3"])
def test_all_run_with_a_model_of_that_family(family):
    """Fused projections, biases, sliding windows and tied heads: each alternative writes as many tokens as it was
    asked for under its own name, and those that are lossless write the baseline's."""
    lm = model_of(family)
    base = PlainEngine(lm, "plain:baseline").run("What is rain?", max_new_tokens=6, fixed=True)
    for id in ASKED:
        engine = make_alternative(lm, id)
        if (family, id) == ("mistral", "plain:kv_fp8"):  # transformers quantizes no sliding window
            with pytest.raises(UnsupportedModelError, match="only full attention layers"):
                engine.run("What is rain?")
            continue
        answer = engine.run("What is rain?", max_new_tokens=6, fixed=True)
        assert (answer.method, answer.factors, len(answer.output_ids)) == (id, {}, 6)
        assert engine.score("What is rain?", base.output_ids[:2]).shape == (2, lm.rows)
        if ALTERNATIVES[id].lossless:
            assert answer.output_ids == base.output_ids


def test_the_model_keeps_its_weights_and_modules():
    """An alternative is made around a model that others go on using."""
    lm = model_of("gpt2")
    before, modules = {k: v.clone() for k, v in lm.model.state_dict().items()}, [type(m) for m in lm.model.modules()]
    for id in ASKED:
        make_alternative(lm, id).run("Hello", max_new_tokens=2)
    assert [type(m) for m in lm.model.modules()] == modules
    assert all(torch.equal(v, before[k]) for k, v in lm.model.state_dict().items())
    assert lm.model.dtype == torch.float32


def test_eight_bits_of_a_row_of_zeros_stay_zero():
    """A row without any weight has no scale of its own, which must not divide by zero."""
    layer = Int8Linear(torch.tensor([[0.0, 0.0], [1.0, -2.0]]), torch.tensor([3.0, 0.0]))
    found = layer(torch.tensor([[1.0, 1.0]]))
    assert torch.isfinite(found).all() and found[0, 0] == 3 and abs(found[0, 1] + 1) < 0.02


@pytest.mark.parametrize("inputs", [2, 32, 48, 64, 65, 96])
@pytest.mark.parametrize("outputs", [1, 3, 16, 17])
def test_eight_bits_of_any_shape(inputs, outputs):
    """The kernel of torch reads past the end of what is no multiple of its blocks, and ends the process."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(inputs, outputs)
    for rows in (1, 5, 17):
        x = torch.randn(2, rows, inputs)
        found, wanted = Int8Linear(layer.weight, layer.bias)(x), layer(x)
        assert found.shape == wanted.shape and (found - wanted).norm() < 0.03 * (wanted.norm() + 1)


def test_a_model_without_linear_layers_is_refused_in_a_line():
    """Whatever cannot be packed says so, and the refusal becomes an engine that repeats it."""
    lm = replace(tiny(), model=torch.nn.Sequential(torch.nn.Embedding(4, 4)))
    with pytest.raises(UnsupportedModelError, match="has no linear layers"):
        int8_weights(lm)


def test_what_does_not_fit_and_what_is_empty_is_refused_as_by_an_engine():
    """A prompt longer than the context, an empty one, and a wrong number of tokens: one line each, from all."""
    lm = model_of("gpt2")
    for id in ASKED:
        engine = make_alternative(lm, id)
        with pytest.raises(ContextError):
            engine.run("word " * 600)
        with pytest.raises(ConfigError):
            engine.run("  ")
        with pytest.raises(ConfigError):
            engine.run("Hello", max_new_tokens=0)


def test_a_static_cache_is_as_long_as_each_answer_needs():
    """An engine that answered something short must have room for something longer, and the other way round."""
    engine = make_alternative(tiny(), "plain:static_cache")
    for n in (2, 9, 3):
        answer = engine.run("Hello", max_new_tokens=n, fixed=True)
        per_token = answer.kv_bytes_live / (answer.prompt_tokens + n - 1)
        assert answer.kv_bytes_reserved == per_token * (answer.prompt_tokens + n)


def test_compiling_is_given_up_when_its_time_is_over(monkeypatch):
    """A compiler that does not come to an end must not hold up what else is measured."""

    def never(model):
        view = small_model()
        view.forward = lambda *args, **kw: time.sleep(60)
        return view

    monkeypatch.setattr(plain_engines, "compiled_steps", never)
    with pytest.raises(UnsupportedModelError, match="given up: it took longer than 0.05 s"):
        CompiledEngine(tiny(), "plain:compile", limit_s=0.05)


def test_a_time_limit_leaves_no_alarm_behind():
    """Whatever ends the block, nothing rings later."""
    with time_limit(0.05):
        pass
    with pytest.raises(KeyError), time_limit(0.05):
        raise KeyError
    time.sleep(0.08)


def test_an_unknown_id_is_the_users_mistake_and_the_rest_is_a_reason():
    """Names are checked at once; what a machine lacks comes as one line that says what to do."""
    with pytest.raises(ConfigError, match="unknown alternative 'int9'"):
        named_alternatives(["int8", "int9"])
    with pytest.raises(ConfigError, match="unknown alternative 3"):
        make_alternative(tiny(), 3)
    reasons = unavailable(tiny())
    assert "plain:llama_cpp" in reasons and all("\n" not in why and len(why) < 200 for why in reasons.values())
    with pytest.raises(LlmoptError, match="plain:llama_cpp cannot run here"):
        make_alternative(tiny(), "plain:llama_cpp").run("Hello")


def test_what_breaks_while_it_is_made_is_a_reason_too():
    """An alternative must not end a comparison of others by an error of its own."""
    broken = replace(ALTERNATIVES["plain:int8"], build=lambda lm, id: 1 / 0)
    with pytest.raises(UnsupportedModelError, match="plain:int8 cannot run with 'llmopt-tiny'"):
        broken.make(tiny())


@pytest.fixture
def llama(monkeypatch):
    "An engine of llama.cpp whose server is a function: three tokens in 20 ms, an even chance for the first two."

    def asked(address, prompt, n_predict, n_probs=0, **more):
        top = [dict(id=i, logprob=-0.7) for i in (0, 1)]
        said = dict(tokens=[5, 6, 7][:n_predict], stop_type="limit", timings=dict(predicted_ms=20.0))
        return said | (dict(completion_probabilities=[dict(top_logprobs=top)]) if n_probs else {})

    monkeypatch.setattr(llama_cpp, "gguf_of", lambda lm: __file__)
    monkeypatch.setattr(llama_cpp, "_server", lambda path, positions: SimpleNamespace(listening_address="nowhere"))
    monkeypatch.setattr(llama_cpp, "asked", asked)
    return LlamaCppEngine(tiny(), "plain:llama_cpp")


def test_llama_cpp_is_measured_as_an_engine_is(llama):
    """Times, tokens and bytes of its reply become the metrics of an answer."""
    answer = llama.run("Hello", max_new_tokens=3, fixed=True)
    assert (answer.method, answer.output_ids, answer.finish_reason) == ("plain:llama_cpp", [5, 6, 7], "length")
    assert abs(answer.tpot_ms - 10) < 10 and answer.ttft_ms >= answer.preprocess_ms >= 0
    assert answer.kv_bytes_live == (answer.prompt_tokens + 2) * 2 * 2 * numbers_per_key()
    rows = llama.score("Hello", [5, 6])
    assert rows.shape == (2, 4096) and torch.allclose(rows.exp().sum(-1), torch.ones(2))


def numbers_per_key():
    "Numbers in the keys of one token of the bundled model, over all layers."
    c = tiny().model.config
    return c.num_hidden_layers * c.num_key_value_heads * c.head_dim


def test_llama_cpp_refuses_what_it_cannot_do(llama):
    """Sampling, a closed server, and a file that is none are one line each."""
    with pytest.raises(ModelError, match="greedy"):
        llama.run("Hello", temperature=0.7)
    llama.close()
    with pytest.raises(ModelError, match="was closed"):
        llama.run("Hello")


def test_llama_cpp_that_does_not_answer_is_a_model_error():
    """A server that is not there, or that answers nonsense, must not end a comparison."""
    with pytest.raises(ModelError, match="llama.cpp did not answer"):
        llama_cpp.asked("http://127.0.0.1:9", prompt=[1])
