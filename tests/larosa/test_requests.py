"Nothing of a request lives on a shared model: threads, streams in turn, exceptions; what is kept follows the weights."

import copy
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from helpers import logits, small_model, tiny, tokenizer
from llmopt.core import LM, load, user
from llmopt.engine import EnhancedFusedLLMEngine
from llmopt.errors import LlmoptError, ModelError
from llmopt.larosa import BUNDLED, LaRoSAConfig, SimpleLaRoSA, dense, projections, second_moments, self_draft
from llmopt.larosa.sparse_model import SparsifiedLinear, selector_of

QUERIES = ["What is rain?", "What is a glacier?", "How do vaccines work?", "What is ice?"] * 3


@pytest.fixture
def restless():
    "Threads take turns after a tenth of a millisecond."
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


@pytest.fixture(scope="module")
def sparse():
    "The bundled model at half sparsity."
    return SimpleLaRoSA(0.5, artifact=str(BUNDLED)).apply(tiny().model)


def test_four_threads_on_one_model(restless):
    "Each thread makes an engine and asks; all share the converted model, and get what one thread gets."
    lm = load("llmopt-tiny", "cpu")

    def ask(query):
        return EnhancedFusedLLMEngine(lm, larosa_sparsity=0.4).run(query, max_new_tokens=8).output_ids

    want = [ask(q) for q in QUERIES]
    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(ask, QUERIES)] == want


def test_passes_in_threads(restless, sparse):
    "Single-token passes of different texts, on one model."
    ids = torch.randint(4096, (40, 1, 1), generator=torch.Generator().manual_seed(0))
    want = [logits(sparse, x) for x in ids]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(pool.map(lambda x: logits(sparse, x), ids), want))


def test_two_streams_in_turn():
    "Two streams of one engine's model are read in turn."
    lm = load("llmopt-tiny", "cpu")

    def stream(query):
        return EnhancedFusedLLMEngine(lm, larosa_sparsity=0.4, max_new_tokens=8).stream(query)

    want = ["".join(stream(q)) for q in QUERIES[:2]]
    got, streams = ["", ""], dict(enumerate(map(stream, QUERIES[:2])))
    while streams:
        for i in [*streams]:
            piece = next(streams[i], None)
            if piece is None:
                del streams[i]
            else:
                got[i] += piece
    assert got == want


def test_dense_is_for_one_thread(sparse):
    "While one thread decodes without loss, another one still gets the sparse model; an exception ends it."
    x = torch.tensor([[7]])
    plain, cut = logits(tiny().model, x), logits(sparse, x)
    assert (plain - cut).abs().max() > 0.1
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(ZeroDivisionError), dense(sparse):
            assert (logits(sparse, x) - plain).abs().max() < 1e-3
            assert torch.equal(pool.submit(logits, sparse, x).result(), cut)
            with dense(sparse, on=False):
                assert torch.equal(logits(sparse, x), cut)
            raise ZeroDivisionError
    assert torch.equal(logits(sparse, x), cut) and selector_of(sparse).mode == "decode"


def test_self_drafts_in_threads(restless, sparse):
    "Two lossless answers at a time beside a sparse one."
    lm = tiny()
    prompts = [torch.tensor([lm.encode_chat([user(q)])]) for q in QUERIES[:3]]
    want = [self_draft(sparse, x, 8).ids for x in prompts]
    with ThreadPoolExecutor(4) as pool:
        sparse_pass = pool.submit(logits, sparse, torch.tensor([[7]]))
        assert all(torch.equal(a, b) for a, b in zip(pool.map(lambda x: self_draft(sparse, x, 8).ids, prompts), want))
    assert torch.equal(sparse_pass.result(), logits(sparse, torch.tensor([[7]])))


def test_a_calibration_sees_its_own_text_alone():
    "Another thread uses the model while moments are collected: they stay the same, and no hook stays behind."
    model = load("llmopt-tiny", "cpu").model
    ids = torch.arange(1024).view(16, 64)
    want = second_moments(model, ids, batch_size=1)
    with ThreadPoolExecutor(1) as pool:
        jobs = [pool.submit(logits, model, torch.full((1, 32), 9)) for _ in range(30)]
        got = second_moments(model, ids, batch_size=1)
    assert all(job.result() is not None for job in jobs)
    assert all(torch.equal(got[k], want[k]) for k in want)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_state_key_tells_what_changes_an_output(sparse):
    "Sparsity, tokens and first are in the key of every projection; so is `dense`."
    maps = [m for m in sparse.modules() if isinstance(m, SparsifiedLinear)]
    keys = [m.state_key() for m in maps]
    assert len(keys) == len(projections(sparse)) and len({k["sparsity"] for k in keys}) > 5
    assert all(k["tokens"] == "decode" and k["first"] == 0 for k in keys)
    with dense(sparse):
        assert {m.state_key()["tokens"] for m in maps} == {"none"}


def test_a_converted_model_is_not_saved_as_a_plain_one(sparse, tmp_path):
    "Neither it nor a copy of it."
    for model in (sparse, copy.deepcopy(sparse)):
        with pytest.raises(ModelError, match="save its calibration"):
            model.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_prepared_models_follow_the_weights():
    "The same model for the same weights and configuration; another one after a change in place or of an attribute."
    lm = LM(small_model(), tokenizer(), "small")
    config = LaRoSAConfig(0.5, allocation="neutral", rotation="none", heads=False, when="always")
    first = config.prepare(lm).model
    assert config.prepare(lm).model is first
    lm.model.model.layers[0].self_attn.v_proj.weight.data[0] += 0.01
    second = config.prepare(lm).model
    assert second is not first
    lm.model.model.layers[1].self_attn.scaling *= 0.5
    third = config.prepare(lm).model
    assert third is not second and third.model.layers[1].self_attn.scaling < 0.2
    lm.model.set_attn_implementation("eager")
    assert config.prepare(lm).model is not third


def test_other_weights_of_the_bundled_model():
    "The calibration that ships is not used for them."
    lm = load("llmopt-tiny", "cpu")
    lm.model.model.layers[0].self_attn.v_proj.weight.data[0] += 0.01
    with pytest.raises(LlmoptError, match="made for another model"):
        LaRoSAConfig(artifact=str(BUNDLED)).prepare(lm)
