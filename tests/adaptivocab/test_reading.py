"Reading phrases: what holds for every family of models, for penalties, and for models that cannot."

import pytest
import torch
import transformers as T
from hypothesis import given
from hypothesis import strategies as st

from helpers import FAMILIES, small_model, tiny, tokenizer
from llmopt.adaptivocab import PhraseReader, SimpleAdaptiVocab, VocabConfig, phrase_costs
from llmopt.adaptivocab.reader import EMBEDS, fold_where, piece_weights
from llmopt.core import kl, prompt_inputs, user
from llmopt.errors import ConfigError, UnsupportedModelError

QUESTION = "What is machine learning, and what is the difference between the two of them in the United States?"


@given(st.integers(1, 12), st.floats(0.1, 20), st.sampled_from(EMBEDS))
def test_weights_sum_to_one_and_never_fall(k, ratio, embed):
    w = piece_weights(k, embed, ratio)
    assert abs(w.sum().item() - 1) < 1e-5 and (w >= 0).all()
    if ratio >= 1:
        assert (w[1:] - w[:-1] >= -1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reads_vectors_as_it_reads_ids(family, dtype):
    m, tok = small_model(family).to(dtype), tokenizer()
    ids = tok.encode(QUESTION)
    plain, r = PhraseReader(m, SimpleAdaptiVocab(tok, [])), PhraseReader(m, SimpleAdaptiVocab(tok))
    with torch.inference_mode():
        want = m(torch.tensor([ids])).logits
        assert torch.equal(m(**plain.read(ids).inputs).logits, want)
        assert torch.equal(m(**plain.compose(ids, fold_where(ids, [])).inputs).logits, want)
    assert r.read(ids).inputs["inputs_embeds"].dtype == dtype
    assert len(r.generate(ids, max_new_tokens=3, min_new_tokens=3, pad_token_id=0, do_sample=False)) == 3


def test_where_nothing_is_folded_the_prompt_is_read_as_ids():
    "So a cache, a penalty or a streamer sees exactly what it sees without this method."
    ids = tokenizer().encode("Xyzzy plugh.")
    prompt, want = VocabConfig().reader(tiny()).read(ids), prompt_inputs(ids)
    assert prompt.inputs.keys() == want.inputs.keys() and prompt[1:] == want[1:]
    assert all(torch.equal(prompt.inputs[k], want.inputs[k]) for k in want.inputs)


@pytest.mark.parametrize("settings", [dict(repetition_penalty=1.3), dict(no_repeat_ngram_size=2)], ids=str)
def test_penalties_see_the_prompt_that_was_folded(settings):
    "With `embed='last'` and every phrase twice in the prompt, a penalty acts as a loop by hand says."
    lm = tiny()
    ids = lm.encode_chat([user(QUESTION + " " + QUESTION)])
    r = VocabConfig().reader(lm)
    prompt, out = r.read(ids), []
    penalty = T.generation.RepetitionPenaltyLogitsProcessor(1.3)
    if "no_repeat_ngram_size" in settings:
        penalty = T.generation.NoRepeatNGramLogitsProcessor(2)
    x, cache = prompt.inputs, T.DynamicCache(config=lm.model.config)
    with torch.inference_mode():
        for i in range(12):
            scores = lm.model(**x, past_key_values=cache, use_cache=True).logits[:, -1]
            out.append(penalty(torch.tensor([[*ids, *out]]), scores).argmax().item())
            at = torch.tensor([[prompt.next_position + i]])
            mask = torch.ones(1, len(prompt.ids) + i + 1)
            x = dict(input_ids=torch.tensor([out[-1:]]), attention_mask=mask, position_ids=at)
    kw = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert len(prompt.ids) < len(ids)
    assert r.generate(ids, **kw, **settings) == out
    assert r.generate(ids, **kw, generation_config=T.GenerationConfig(**settings)) == out


def test_penalties_of_the_checkpoint_are_the_same_with_an_empty_vocabulary():
    lm = tiny()
    ids = lm.encode_chat([user("What is a glacier? What is a glacier made of?")])
    kw = dict(max_new_tokens=12, do_sample=False, repetition_penalty=1.1)
    x = prompt_inputs(ids).inputs
    want = lm.model.generate(**x, **kw)[0, len(ids) :].tolist()
    assert PhraseReader(lm.model, SimpleAdaptiVocab(lm.tokenizer, [])).generate(ids, **kw) == want


def bloom():
    return T.BloomForCausalLM(T.BloomConfig(vocab_size=4096, hidden_size=16, n_layer=1, n_head=2)).eval()


def test_a_model_without_positions_is_refused_unless_they_are_contiguous():
    v = SimpleAdaptiVocab(tokenizer())
    with pytest.raises(UnsupportedModelError, match="takes no position_ids; use positions='contiguous'"):
        PhraseReader(bloom(), v)
    r = PhraseReader(bloom(), v, VocabConfig(positions="contiguous"))
    ids = tokenizer().encode(QUESTION)
    assert len(r.generate(ids, max_new_tokens=2, min_new_tokens=2)) == 2
    assert r.score(ids, [8, 9]).shape == (2, 4096)


def test_a_model_with_fewer_embeddings_than_tokens_is_refused():
    few = T.AutoModelForCausalLM.from_config(T.GPT2Config(vocab_size=10, n_embd=8, n_layer=1, n_head=1, n_positions=8))
    with pytest.raises(UnsupportedModelError, match="10 embedding rows"):
        PhraseReader(few, SimpleAdaptiVocab(tokenizer()))


class IdsOnly(torch.nn.Module):
    def forward(self, input_ids):
        return input_ids


def test_a_model_that_takes_no_vectors_is_refused():
    with pytest.raises(UnsupportedModelError, match="IdsOnly takes no inputs_embeds"):
        PhraseReader(IdsOnly(), SimpleAdaptiVocab(tokenizer()))


def test_a_model_that_looks_up_embeddings_in_every_layer_is_refused():
    "Gemma 4 says so itself, deep inside; Gemma 3n would answer without them."
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8)
    config = T.Gemma4TextConfig(
        vocab_size=4096, hidden_size_per_layer_input=8, vocab_size_per_layer_input=4096, **sizes
    )
    with pytest.raises(UnsupportedModelError, match="in every layer"):
        PhraseReader(T.AutoModelForCausalLM.from_config(config), SimpleAdaptiVocab(tokenizer()))


def test_an_empty_prompt_is_refused():
    with pytest.raises(ConfigError, match="nothing to read"):
        VocabConfig().reader(tiny()).read([])
    with pytest.raises(ConfigError, match="empty answer"):
        VocabConfig().reader(tiny()).score([5, 6], [])


def test_costs_do_not_depend_on_the_batch_and_are_what_one_measures_by_hand():
    lm = tiny()
    r = VocabConfig().reader(lm)
    text = "In the study of machine learning there is more than one way."
    one, many = (phrase_costs(r, [text, QUESTION], batch_size=n, progress=False) for n in (1, 16))
    assert [*one] == [*many] and all(c > 0 for c in one.values()) and len(one) < len(r.vocab.phrases)
    assert all(abs(a - b) < 1e-4 for a, b in zip(one.values(), many.values()))
    j = next(j for j in one if r.vocab.phrases[j] == " machine learning")
    ids, pieces = r.vocab.tokens([text])[0].tolist(), r.vocab.table.pieces[j]
    start = next(i for i in range(len(ids)) if tuple(ids[i : i + len(pieces)]) == pieces)
    cut = start + len(pieces)
    only = PhraseReader(lm.model, SimpleAdaptiVocab(lm.tokenizer, ["machine learning"]))
    plain, short = (only.score(ids[:cut], ids[cut:], fold=f)[:16] for f in (False, True))
    assert abs(phrase_costs(r, [text], progress=False)[j] - kl(plain, short).mean().item()) < 1e-4
    with pytest.raises(ConfigError, match="batch_size"):
        phrase_costs(r, [text], batch_size=0)
