"Speculative decoding writes what plain greedy decoding writes, whatever is proposed, and refuses what it cannot do."

import numpy as np
import pytest
import torch
import transformers as T

from helpers import FAMILIES, random_ids, small_model
from llmopt.core import PromptInputs, speculative_decode
from llmopt.errors import ConfigError, ContextError, UnsupportedModelError

PROMPT = random_ids(9)[0].tolist()


def nothing(ids, cache, room):
    "No drafts: plain greedy decoding"
    return []


def greedy(model, ids, n):
    "The slow reference: the whole text again for each token, and no cache"
    ids = [*ids]
    with torch.inference_mode():
        for _ in range(n):
            ids.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
    return ids


def half_right(want, seed=0):
    "Drafts from the text `want` of which every third token is wrong; now and then none, or more than asked for"
    rng = np.random.default_rng(seed)
    bent = [t if i % 3 else (t + 1) % 4096 for i, t in enumerate(want)]
    return lambda ids, cache, room: bent[len(ids) : len(ids) + rng.integers(0, 8)]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_text_is_that_of_plain_greedy_decoding_in_every_family(family):
    model = small_model(family)
    want = greedy(model, PROMPT, 40)  # Mistral's window of 16 is long full by then
    got = speculative_decode(model, PROMPT, half_right(want), 40)
    assert got.ids == want[len(PROMPT) :]
    assert 0 < got.accepted < got.drafted
    assert got.passes == 40 - got.accepted


def test_the_generation_config_of_the_checkpoint_changes_nothing():
    model = small_model()
    want = greedy(model, PROMPT, 20)
    config = model.generation_config
    config.repetition_penalty, config.no_repeat_ngram_size, config.do_sample, config.num_beams = 1.5, 1, True, 4
    assert speculative_decode(model, PROMPT, half_right(want), 20).ids == want[len(PROMPT) :]


def test_the_cache_holds_all_but_the_last_token():
    model = small_model()
    want = greedy(model, PROMPT, 20)
    for propose in (nothing, half_right(want), lambda ids, cache, room: want[len(ids) :]):
        for eos in ((), want[-5:-4]):
            cache = T.DynamicCache(config=model.config)
            got = speculative_decode(model, PROMPT, propose, 20, eos, cache)
            assert cache.get_seq_length() == len(PROMPT) + len(got.ids) - 1


@pytest.mark.parametrize("at", range(6))
def test_the_end_of_a_text_may_lie_anywhere_in_a_draft(at):
    model = small_model()
    want = greedy(model, PROMPT, 8)
    end = want[len(PROMPT) + at]
    stop = want.index(end, len(PROMPT)) + 1
    for propose in (
        nothing,
        lambda ids, cache, room: want[len(ids) :],
        lambda ids, cache, room: [*want[len(ids) :], 7],
    ):
        assert speculative_decode(model, PROMPT, propose, 8, [end, 4095]).ids == want[len(PROMPT) : stop]


def test_drafts_of_a_model_in_the_same_cache():
    model, other = small_model(), small_model()
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.mul_(0.5)
    want = greedy(model, PROMPT, 24)

    def propose(ids, cache, room):
        draft = [ids[-1]]
        for _ in range(min(3, room)):
            out = other(torch.tensor([draft[-1:]]), past_key_values=cache, use_cache=True)
            draft.append(out.logits[0, -1].argmax().item())
        if len(draft) > 1:
            cache.crop(1 - len(draft))
        return draft[1:]

    got = speculative_decode(model, PROMPT, propose, 24)
    assert got.ids == want[len(PROMPT) :]
    assert got.accepted > 0


def test_prompts_as_embeddings_with_gaps_in_their_positions():
    model = small_model()
    x = torch.tensor([PROMPT])
    positions = torch.arange(len(PROMPT))[None] * 3
    inputs = dict(
        inputs_embeds=model.get_input_embeddings()(x), attention_mask=torch.ones_like(x), position_ids=positions
    )
    prompt = PromptInputs(inputs, PROMPT, int(positions[0, -1]) + 1)
    want = model.generate(**inputs, max_new_tokens=20, do_sample=False, eos_token_id=None)[0].tolist()
    assert speculative_decode(model, prompt, nothing, 20).ids == want
    assert speculative_decode(model, prompt, half_right(PROMPT + want), 20).ids == want


def test_two_answers_at_a_time_do_not_disturb_one_another():
    "One answer is written in the middle of another, by the same model."
    model = small_model()
    want = greedy(model, PROMPT, 20)
    other = greedy(model, PROMPT[::-1], 6)
    inner = []

    def propose(ids, cache, room):
        inner.append(speculative_decode(model, PROMPT[::-1], half_right(other), 6).ids)
        return want[len(ids) : len(ids) + 3]

    assert speculative_decode(model, PROMPT, propose, 20).ids == want[len(PROMPT) :]
    assert inner and all(ids == other[len(PROMPT) :] for ids in inner)


def test_an_exception_in_the_middle_leaves_the_model_as_it_was():
    model = small_model()
    want, modules = greedy(model, PROMPT, 10), [*model.modules()]

    def propose(ids, cache, room):
        raise KeyError("no draft today")

    with pytest.raises(KeyError):
        speculative_decode(model, PROMPT, propose, 10)
    assert [*model.modules()] == modules
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
    assert greedy(model, PROMPT, 10) == want and torch.is_grad_enabled()


def test_nothing_one_token_and_numpy_numbers():
    model = small_model()
    want = greedy(model, PROMPT, 4)[len(PROMPT) :]
    assert speculative_decode(model, PROMPT, nothing, 0) == ([], 0, 0, 0)
    assert speculative_decode(model, PROMPT, nothing, 1).ids == want[:1]
    got = speculative_decode(model, np.array(PROMPT), lambda ids, cache, room: np.array(want[1:]), np.int64(4))
    assert got.ids == want and {type(i) for i in got.ids} == {int}
    assert speculative_decode(model, torch.tensor(PROMPT), nothing, 4).ids == want
    assert speculative_decode(model, PROMPT[:1], nothing, 3).ids == greedy(model, PROMPT[:1], 3)[1:]


def test_a_draft_of_tokens_that_the_model_does_not_know_is_cut():
    model = small_model()
    want = greedy(model, PROMPT, 6)[len(PROMPT) :]
    for token in (4096, 10**9, -1):
        assert speculative_decode(model, PROMPT, lambda ids, cache, room, t=token: [t], 6).ids == want


@pytest.mark.parametrize("bad", [-1, 2.5, None, "8"])
def test_a_length_that_is_none_is_refused(bad):
    with pytest.raises(ConfigError, match="whole number"):
        speculative_decode(small_model(), PROMPT, nothing, bad)


def test_what_cannot_be_decoded_so_is_refused():
    model = small_model()
    with pytest.raises(ConfigError, match="empty"):
        speculative_decode(model, [], nothing)
    for bad in ([1, None], torch.tensor([PROMPT]), [1.5], 7, [-1, 2], [4096]):
        with pytest.raises(ConfigError, match="token ids"):
            speculative_decode(model, bad, nothing)
    with pytest.raises(ContextError, match="the model has 512"):
        speculative_decode(model, PROMPT, nothing, 510)
    with pytest.raises(UnsupportedModelError, match="StaticCache cannot be cropped"):
        speculative_decode(model, PROMPT, nothing, cache=T.StaticCache(config=model.config, max_cache_len=99))
    bart = T.BartForConditionalGeneration(
        T.BartConfig(vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2)
    )
    with pytest.raises(UnsupportedModelError, match="has an encoder"):
        speculative_decode(bart, [1, 2], nothing)
    mamba = T.MambaForCausalLM(T.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(UnsupportedModelError, match="cannot be cropped"):
        speculative_decode(mamba, [1, 2], nothing)


def test_work_grows_in_step_with_the_answer():
    "Twice the answer: twice the passes, each over one token, and twice the calls for a draft."
    model, calls = small_model(), []
    read = []
    hook = model.register_forward_pre_hook(lambda m, args, kw: read.append(kw["input_ids"].numel()), with_kwargs=True)
    for n in (50, 100):
        read.clear(), calls.clear()
        speculative_decode(model, PROMPT, lambda ids, cache, room: calls.append(1) or [], n)
        assert (sum(read), len(calls)) == (len(PROMPT) + n - 1, n - 1)
    hook.remove()
