"The compiled step computes what the model computes: every family it knows, all bits, sparse and dense, in any thread."

import copy
import threading
from functools import partial

import pytest
import torch
from transformers import DynamicCache

from helpers import small_model, tiny
from llmopt.core import speculative_decode
from llmopt.core.compilation import numba
from llmopt.engine import EnhancedFusedLLMEngine, step_model
from llmopt.engine.decode_step import DecodeStep, why_no_step
from llmopt.engine.step_loops import step_function
from llmopt.engine.step_model import loop_for, step_of, with_step, without_step
from llmopt.errors import ModelError, UnsupportedModelError
from llmopt.kv_cache import EvictingCache, EvictionConfig, SlabCache
from llmopt.kv_cache.attention import packed
from llmopt.larosa import SimpleLaRoSA, dense, projections, set_sparsity

pytestmark = pytest.mark.skipif(numba is None, reason="numba is not installed: pip install numba")
FAMILIES = {
    "llama": dict(attention_bias=True, mlp_bias=True),
    "mistral": dict(sliding_window=None),
    "qwen2": dict(),
    "qwen3": dict(head_dim=16),
}


def converted(model, bits=16):
    "`model` in rows, nothing dropped."
    return SimpleLaRoSA(0.0, bits=bits, rotation="none", heads=False).apply(model)


@torch.inference_mode()
def worst(model, steps=5, before=4, make_cache=DynamicCache):
    """The largest difference of logits between the step and the modules, over some tokens, by their size; and between
    one token after another and all at once."""
    step, usual, found, alone = DecodeStep(model), without_step(copy.copy(model)), 0, []
    caches = DynamicCache(), make_cache()
    ids = torch.randint(5, 90, (1, before + steps), generator=torch.Generator().manual_seed(0))
    for cache in caches:
        usual(ids[:, :before], past_key_values=cache)
    for i in range(before, before + steps):
        want = usual(ids[:, i : i + 1], past_key_values=caches[0]).logits[0, -1].float()
        got = step(int(ids[0, i]), i, caches[1])
        alone.append(got)
        found = max(found, float((got - want).abs().max() / want.abs().max()))
    same = [torch.allclose(a.keys, b.keys, atol=2e-2) for a, b in zip(caches[0].layers, caches[1].layers)]
    assert all(same) and caches[1].get_seq_length() == before + steps
    caches[1].crop(-steps)
    together = step.several(ids[0, before:].tolist(), before, caches[1])
    assert caches[1].get_seq_length() == before + steps
    return max(found, float((together - torch.stack(alone)).abs().max() / together.abs().max()))


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_bits_and_sparsity(family, bits, share):
    model = converted(small_model(family, **FAMILIES[family]), bits)
    set_sparsity(model, dict.fromkeys(projections(model), share))
    assert worst(model) < 1e-4


@pytest.mark.parametrize("bits", [16, 8])
def test_bfloat16(bits):
    "Within the rounding of bfloat16, which the step does once where modules do it after every operation."
    assert worst(converted(small_model().bfloat16(), bits)) < 0.06


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_any_number_of_threads(threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert worst(converted(small_model("qwen3", head_dim=16), 8)) < 1e-4


@pytest.mark.parametrize("page_after", [0, 7])
def test_slabs(page_after):
    "Keys and values in pages, and in ordinary memory that is left in the middle of an answer."
    model = converted(small_model("qwen3", head_dim=16), 8)
    assert worst(model, make_cache=partial(SlabCache, model.config, page_after=page_after)) < 1e-4
    half = converted(small_model().bfloat16())
    assert worst(half, make_cache=partial(SlabCache, half.config, page_after=page_after)) < 0.06


@pytest.mark.parametrize("policy, share", [("cake", None), ("snapkv", "heads")])
@torch.inference_mode()
def test_caches_that_evict(policy, share):
    "Logits, evictions and the tokens that stay are those of the modules; so they are after a crop and in a copy."
    model = with_step(converted(small_model()))
    usual, ids = (
        without_step(copy.copy(model)),
        torch.randint(5, 90, (1, 130), generator=torch.Generator().manual_seed(1)),
    )
    with_step(model)
    cfg = EvictionConfig("30%", policy, window=8, slack=4, unit=4, share=share)
    caches = [EvictingCache(model.config, cfg) for _ in range(2)]
    for a, b in [(0, 80), *((i, i + 1) for i in range(80, 110)), (110, 114), *((i, i + 1) for i in range(114, 125))]:
        found = []
        for m, cache in zip((model, usual), caches):
            with packed(m):
                found.append(m(input_ids=ids[:, a:b], past_key_values=cache).logits[:, -1])
        assert (found[0] - found[1]).abs().max() < 1e-4
        if a == 110:
            caches[0] = copy.deepcopy(caches[0])
            [cache.crop(-1) for cache in caches]
    for s, t in zip(*(cache.slabs for cache in caches)):
        assert torch.equal(s.positions[s.filled], t.positions[t.filled])
    assert caches[0].evictor.rounds == caches[1].evictor.rounds > 3


@torch.inference_mode()
def test_slabs_live_on():
    "What was decoded by the step is cropped, copied, read by modules and decoded again, as in a stock cache."
    model = with_step(converted(small_model()))
    usual, config, ids = without_step(copy.copy(model)), model.config, torch.arange(5, 55)[None]
    with_step(model)
    slab, stock = SlabCache(config, page_after=20), DynamicCache()
    for m, cache in ((model, slab), (usual, stock)):
        m(ids[:, :9], past_key_values=cache)
        for i in range(9, 30):
            m(input_ids=ids[:, i : i + 1], past_key_values=cache)
        cache.crop(-4)
    both = (model, copy.deepcopy(slab)), (usual, slab), (usual, stock)
    for a, b in ((26, 27), (27, 30), (30, 49), (49, 50)):
        found = [m(input_ids=ids[:, a:b], past_key_values=cache).logits for m, cache in both]
        assert max((f - found[-1]).abs().max() for f in found) < 1e-4
    assert slab.peak == slab.kv_bytes().live


@torch.inference_mode()
def test_what_is_not_finite_is_seen():
    "NaN and infinity in an embedding reach the logits."
    for bad in (float("nan"), float("inf")):
        model = converted(copy.deepcopy(small_model()))
        step, cache = DecodeStep(model), DynamicCache()
        model(torch.tensor([[5, 6]]), past_key_values=cache)
        model.get_input_embeddings().weight.data[7, 3] = bad
        assert not step(7, 2, cache).isfinite().all()
        assert step(8, 2, cache).isfinite().sum() <= step(8, 2, cache).numel()


@torch.inference_mode()
def test_sparsities_may_change_and_dense_is_dense():
    model = with_step(converted(small_model()))
    usual, ids = without_step(copy.copy(model)), torch.arange(5, 9)[None]
    with_step(model)
    for share in (0.0, 0.5, 0.2):
        set_sparsity(model, dict.fromkeys(projections(model), share))
        for context in (False, True):
            logits = []
            for m in (model, usual):
                cache = DynamicCache()
                m(ids, past_key_values=cache)
                with dense(model, context):
                    logits.append(m(input_ids=ids[:, :1], past_key_values=cache).logits)
            assert (logits[0] - logits[1]).abs().max() < 1e-4, (share, context)


def test_compiled_once():
    "For all models of a process; another one, which begins without, reads it from disk."
    assert step_function() is step_function()
    assert step_function.__wrapped__().compiled.cache_hits == 1


@torch.inference_mode()
def test_drafts_are_verified_by_the_step(monkeypatch):
    "A pass of a few tokens over a cache goes through the step, dense as by modules; what is wrong is cropped."
    model = converted(small_model(), 8)
    set_sparsity(model, dict.fromkeys(projections(model), 0.4))
    ids, passes, several = list(range(5, 12)), [], DecodeStep.several
    with dense(model):
        want = speculative_decode(model, ids, lambda *a: [], 20)
    monkeypatch.setattr(DecodeStep, "several", lambda s, t, *a, **kw: passes.append(len(t)) or several(s, t, *a, **kw))

    def propose(text, cache, room):  # the third of four is wrong
        return [t + (i == 2) for i, t in enumerate(want.ids[len(text) - len(ids) :][:4])]

    with dense(with_step(model)):
        got = speculative_decode(model, ids, propose, 20)
    assert got.ids == want.ids and got.passes < want.passes and max(passes) == 5


def test_drafts_of_a_sparse_model(tmp_path, monkeypatch):
    "Answers are those without drafts where channels are dropped, sampled too; without the step there are no drafts."
    monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path))
    monkeypatch.setattr(step_model, "_kept_decode_times", lambda *a: [9.0, 3.0])
    lm, larosa = tiny(), "larosa:sparsity=0.5,when=always+kv"
    plain, drafts = (EnhancedFusedLLMEngine(lm, recipe=r) for r in (larosa, f"vocab:drafts=true+{larosa}"))
    assert step_of(drafts.lm.model) and drafts.sparse_shapes
    drafts.drafts.extra = [0.0] * len(drafts.drafts.extra)  # free: as many as there can be
    for more in (dict(), dict(temperature=0.7, seed=2)):
        a, b = (e.run("One. Two. One. Two. One. Two. One.", 24, True, **more) for e in (plain, drafts))
        assert a.output_ids == b.output_ids and len(b.itl_ms) < len(a.itl_ms)
    rounded = EnhancedFusedLLMEngine(lm, recipe=f"vocab:drafts=true+{larosa}:bits=8")
    assert any("no drafts: LaRoSA drops" in note for note in rounded.notes)


def test_copies_begin_without_a_step():
    model = with_step(converted(small_model()))
    again = copy.deepcopy(model)
    assert step_of(model) is not None and step_of(again) is None
    kw = dict(max_new_tokens=5, do_sample=False)
    ids = torch.arange(5, 9)[None]
    assert torch.equal(model.generate(ids, **kw), again.generate(ids, **kw))


def test_two_threads_at_once():
    model = with_step(converted(small_model()))
    kw, found = dict(max_new_tokens=20, do_sample=False), {}
    prompts = {i: torch.arange(5 + i, 9 + i)[None] for i in range(4)}
    want = {i: model.generate(ids, **kw) for i, ids in prompts.items()}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: model.generate(prompts[i], **kw)})) for i in prompts
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(found[i], want[i]) for i in prompts)


def test_a_long_answer_outgrows_the_room():
    "The buffers grow; a crop in the middle is noticed."
    model = with_step(converted(small_model(max_position_embeddings=1024)))
    usual, ids = without_step(copy.copy(model)), torch.arange(5, 9)[None]
    with_step(model)
    kw = dict(max_new_tokens=600, min_new_tokens=600, do_sample=False)
    cache = DynamicCache()
    a = model.generate(ids, past_key_values=cache, **kw)
    assert a.shape == usual.generate(ids, **kw).shape and cache.get_seq_length() == 603
    cache.crop(-200)
    b = model.generate(a[:, :404], past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert torch.equal(b, model.generate(a[:, :404], max_new_tokens=8, do_sample=False))


@pytest.mark.parametrize(
    "family, changes, why",
    [
        ("phi3", {}, "phi3"),
        ("gpt2", {}, "gpt2"),
        ("mistral", dict(sliding_window=4), "sliding"),
        ("llama", dict(hidden_act="gelu"), "gelu"),
    ],
)
def test_models_that_it_does_not_know(family, changes, why):
    model = converted(small_model(family, **changes), 8)
    assert why in why_no_step(model)
    with pytest.raises(UnsupportedModelError, match=why):
        with_step(model)
    assert not loop_for(model, DynamicCache())


def test_a_plain_model_and_other_precisions():
    assert "rows" in why_no_step(small_model())
    assert "float64" in why_no_step(converted(small_model().double()))


@pytest.mark.parametrize(
    "recipe",
    ["larosa", "larosa:sparsity=0,bits=8,when=always+kv", "larosa:sparsity=0.4,bits=8", "vocab+larosa:bits=4+kv"],
)
def test_in_an_engine(recipe, tmp_path, monkeypatch):
    "The engine says what decodes, and answers as the same model does by its modules, sampled too."
    monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path))
    e = EnhancedFusedLLMEngine(tiny(), recipe=recipe, max_new_tokens=12)
    said = " ".join(e.run("What is rain?").notes)
    assert "compiled step" in said
    if step_of(e.lm.model) is None:
        return  # no gain on this machine, which the note says
    question = "Why is the sky blue?"
    answers = [e.run(question).output_ids, e.run(question, temperature=0.8, seed=3).output_ids]
    without_step(e.lm.model)
    assert answers == [e.run(question).output_ids, e.run(question, temperature=0.8, seed=3).output_ids]
    with_step(e.lm.model)


def test_the_faster_of_plain_and_step(monkeypatch, tmp_path):
    "By times given here: all channels, some, or the plain model; a cache that was rounded takes the modules' way."
    monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path))
    lm, said = tiny(), {}
    for times in ([9.0, 3.0, 2.99], [9.0, 3.0, 2.0], [2.0, 3.0, 2.5]):
        monkeypatch.setattr(step_model, "_kept_decode_times", lambda *a, times=times: times)
        said[str(times)] = e = EnhancedFusedLLMEngine(lm, recipe="larosa")
    whole, some, plain = said.values()
    assert step_of(whole.lm.model) and not whole.sparse_shapes and "none is dropped" in whole.notes[0]
    assert step_of(some.lm.model) and some.sparse_shapes and plain.lm.model is lm.model
    monkeypatch.setattr(step_model, "_kept_decode_times", lambda *a: [9.0, 3.0])
    e = EnhancedFusedLLMEngine(lm, recipe="larosa:when=always+kv")
    assert step_of(e.lm.model) and "one compiled step" in e.notes[-1]
    e = EnhancedFusedLLMEngine(lm, recipe="larosa:when=always+kv:bits=8")
    assert step_model.OTHER_CACHE in e.notes


def reads_of(monkeypatch):
    "The heads that steps read from now on: 0 for the whole one, 1 for 8 bits."
    heads, read = [], DecodeStep._read
    monkeypatch.setattr(DecodeStep, "_read", lambda s, *a: heads.append(a[4] if len(a) > 4 else 0) or read(s, *a))
    return heads


@pytest.mark.parametrize(
    "recipe, threads", [("larosa", 1), ("larosa+kv", 2), ("larosa+words:method=prefill,rate=0.5,floor=0", 1)]
)
def test_half_a_head(recipe, threads, tmp_path, monkeypatch):
    "A greedy answer is the same with the shortlist; whoever wants more than the likeliest token gets the whole head."
    monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(step_model, "_kept_decode_times", lambda *a: [9.0, 3.0, 2.99])
    question, found = "The sky is blue. Why is it so at noon, and red in the evening?", []
    for times in ([3.0, 2.0], [3.0, 2.99]):
        monkeypatch.setattr(step_model, "_kept_greedy_times", lambda *a, times=times: times)
        e = EnhancedFusedLLMEngine(tiny(), recipe=recipe, max_new_tokens=6)
        short = times[1] == 2.0
        assert short == (step_of(e.lm.model).shortlist is not None) == ("8 bits and read exactly" in " ".join(e.notes))
        heads = reads_of(monkeypatch)
        found.append([e.run(question, fixed=fixed, top_k=5).output_ids for fixed in (False, True)])
        assert heads and set(heads) == {int(short)}
        for more in (dict(temperature=0.5, seed=1), dict(logprobs=2)) if recipe == "larosa" else ():
            heads.clear()
            found[-1].append(e.run(question, **more).output_ids)
            assert set(heads) == {0}
    assert found[0] == found[1]


def test_half_a_head_and_damaged_weights(tmp_path, monkeypatch):
    "Scores that are not numbers raise what they always raise, in the middle of an answer, too."
    monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path))
    monkeypatch.setattr(step_model, "_kept_decode_times", lambda *a: [9.0, 3.0, 2.99])
    monkeypatch.setattr(step_model, "_kept_greedy_times", lambda *a: [3.0, 2.0])
    e = EnhancedFusedLLMEngine(tiny(), recipe="larosa", max_new_tokens=8)
    gains = step_of(e.lm.model).arrays["gains"]
    assert step_of(e.lm.model).shortlist
    for bad in (float("nan"), float("inf")):
        kept, gains[-3] = gains[-3], bad
        with pytest.raises(ModelError, match="not numbers"):
            e.run("What is rain?")
        gains[-3] = kept
    assert e.run("What is rain?").output_ids


def test_heads_without_a_shortlist(monkeypatch):
    "Rows of 8 bits, and a weight that 8 bits cannot hold: nothing is measured, or nothing is used."
    notes = ["said"]
    for bits, scale in ((8, 1.0), (16, 1e9)):
        model = small_model()
        model.lm_head.weight.data *= scale
        model = with_step(converted(model, bits))
        step_model._shorten_head(model, notes)
        assert step_of(model).shortlist is None and notes == ["said"]
