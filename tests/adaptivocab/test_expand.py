"Expanded tokenizers and models: nothing is lost on odd texts, and what cannot be is refused in one line."

import copy
import json
import math

import numpy as np
import pytest
import torch
import transformers as T
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from helpers import tiny, tokenizer
from llmopt.adaptivocab import Expansion, expand, expand_tokenizer
from llmopt.adaptivocab.expansion import grouped_tokenizer, mine_merges, spare_tokens
from llmopt.adaptivocab.new_rows import add_rows, mean_state
from llmopt.core import LM, load, user
from llmopt.errors import ConfigError, UnsupportedModelError

ODD = [
    "",
    " ",
    "Don't panic, it's the dogs' \"it's\" '.' .' '. ''s ' s 'tis I'll,'d",
    "a  b   c\n\n  d \t e\r\n",
    "人工智能, 和机器学习。",
    "שלום עולם",
    "😀👩‍👩‍👧 of the 😀",
    "e\u0301 \x00 \ufffd\u2028\u0085",
    "42 of 4,200 (12.5%)",
    "<|user|>\nis the <|end|>\n",
    'for i in range(3): x[i] += "a\'b"',
    "''' '''",
    "rock 'n' roll; 'of the' -- and...",
    "ſ\u2019s x\u2019s",
    "\ufeffof the",
    "กขค ภาษาไทย",
    "x" * 3000,
]
DOCS = [
    "The heart attack is a disease of the heart. High blood pressure, and the risk of a heart attack, is high.",
    "Signs and symptoms of a heart attack, and of high blood pressure, are in the list of signs and symptoms.",
    "The risk of high blood pressure is high.",
]


def test_groups_keep_the_tokens_of_every_text():
    tok, rng = tokenizer(), np.random.default_rng(0)
    groups = grouped_tokenizer(tok)
    soup = ["".join(rng.choice([*"ab'st .,\n 1é"], 40)) for _ in range(300)]
    for t in ODD + DOCS + soup:
        assert groups.encode(t) == tok.encode(t)


def test_a_tokenizer_that_splits_in_another_way_is_refused():
    tok = tokenizer()
    d = json.loads(tok.backend_tokenizer.to_str())
    for change in (dict(pre_tokenizer=None), dict(normalizer=dict(type="NFC"))):
        other = T.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(d | change)))
        with pytest.raises(UnsupportedModelError, match="splits as GPT-2 does"):
            grouped_tokenizer(other)
    with pytest.raises(UnsupportedModelError, match="no fast tokenizer"):
        grouped_tokenizer(object())


@pytest.mark.parametrize("replace", [False, True])
def test_an_expanded_tokenizer_loses_nothing_and_saves(replace, tmp_path):
    tok = tokenizer()
    x = expand_tokenizer(tok, DOCS * 2, 60, replace)
    chat = [user(DOCS[0])]
    assert x.tokenizer.apply_chat_template(chat, tokenize=False) == tok.apply_chat_template(chat, tokenize=False)
    x.tokenizer.save_pretrained(tmp_path)
    again = T.AutoTokenizer.from_pretrained(tmp_path)
    for t in ODD + DOCS:
        ids = x.tokenizer.encode(t)
        assert again.encode(t) == ids
        assert x.tokenizer.decode(ids) == tok.decode(tok.encode(t))
        if not replace:
            assert [p for i in ids for p in x.pieces.get(i, [i])] == tok.encode(t)
    if replace:
        vocab = x.tokenizer.get_vocab()
        assert sorted(vocab.values()) == [*range(len(tok))]
        assert [vocab[t] for t in tok.all_special_tokens] == tok.all_special_ids
    else:
        assert max(x.pieces) == len(tok) + len(x.pieces) - 1 and len(x.pieces) > 20


def test_nothing_to_mine_leaves_the_tokenizer_as_it_is():
    tok = tokenizer()
    for corpus in (["xyzzy"], [], [""], ODD[:2]):
        x = expand_tokenizer(tok, corpus, 5)
        assert x.pieces == {} and x.tokenizer.encode(DOCS[0]) == tok.encode(DOCS[0])
    assert expand_tokenizer(tok, DOCS * 2, 0).pieces == {}


def test_a_corpus_may_be_an_iterator_with_odd_texts():
    tok = tokenizer()
    want = expand_tokenizer(tok, DOCS * 2, np.int64(9))
    assert expand_tokenizer(tok, iter(DOCS * 2), 9).pieces == want.pieces
    assert len(expand_tokenizer(tok, DOCS * 2 + ["a lone \ud800 surrogate"], 9, replace=True).pieces) == 9


def test_numbers_and_corpora_that_cannot_be():
    tok = tokenizer()
    for bad in (dict(n_new=-1), dict(max_len=1), dict(min_count=1)):
        with pytest.raises(ConfigError, match="an expansion needs"):
            expand_tokenizer(tok, DOCS, **bad)
    for bad in ("one text", b"bytes", [None], [b"x"]):
        with pytest.raises(ConfigError, match="list of texts"):
            expand_tokenizer(tok, bad)


def test_more_new_tokens_than_old_ones_can_be_spared():
    few = Tokenizer(models.BPE())
    few.pre_tokenizer, few.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    few.train_from_iterator(DOCS, trainers.BpeTrainer(vocab_size=260, initial_alphabet=letters))
    tok = T.PreTrainedTokenizerFast(tokenizer_object=few)
    assert len(expand_tokenizer(tok, DOCS * 2, 3, replace=True).tokenizer) == 260
    with pytest.raises(ConfigError, match="old tokens can be replaced"):
        expand_tokenizer(tok, DOCS * 2, 20, replace=True)


def test_sparing_none():
    assert spare_tokens([("a", "b")], {}, 0) == []
    assert spare_tokens([], {}, 3) == []


def test_the_bias_lies_on_the_mean_state():
    "On the mean state, the logits with a bias are those without, plus the bias."
    lm = tiny()
    x = expand_tokenizer(lm.tokenizer, DOCS * 2, 20)
    plain, biased = copy.deepcopy(lm.model), copy.deepcopy(lm.model)
    add_rows(plain, x)
    n = len(plain.get_input_embeddings().weight)
    assert n == 4096 + len(x.pieces)
    bias, state = torch.linspace(-1, 0, n), torch.randn(256, generator=torch.Generator().manual_seed(0))
    add_rows(biased, x, bias, state)
    with torch.no_grad():
        more = (biased.get_output_embeddings().weight - plain.get_output_embeddings().weight) @ state
    torch.testing.assert_close(more, bias, atol=1e-4, rtol=0)
    assert torch.equal(biased.get_input_embeddings().weight, plain.get_input_embeddings().weight)


def test_the_weights_of_the_paper():
    lm, model = tiny(), copy.deepcopy(tiny().model)
    old = lm.model.get_input_embeddings().weight.detach()
    add_rows(model, Expansion(None, {4096: [7, 8, 9], 4100: [7, 7]}))
    e, h = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    w = [math.exp(2 * i) for i in range(3)]
    torch.testing.assert_close(e[4096], sum(a * old[i] for a, i in zip(w, (7, 8, 9))) / sum(w))
    torch.testing.assert_close(h[4096], sum(a * old[i] for a, i in zip(w[::-1], (7, 8, 9))) / sum(w))
    assert len(e) == 4101


def test_the_mean_state_weighs_every_token():
    model = tiny().model
    with torch.no_grad():
        states = [model(torch.tensor([s]), output_hidden_states=True).hidden_states[-1][0] for s in ([5, 6, 7], [8])]
    torch.testing.assert_close(mean_state(model, [[5, 6, 7], [8]]), torch.cat(states).mean(0))


def test_expanding_inside_inference_mode_and_with_empty_texts_first():
    lm = load("llmopt-tiny", "cpu")
    corpus = [""] * 70 + DOCS * 2
    want = expand(lm, corpus, 12)
    with torch.inference_mode():
        inside = expand(lm, corpus, 12)
    assert torch.equal(inside.model.lm_head.weight, want.model.lm_head.weight)
    assert not inside.model.lm_head.weight.is_inference()
    assert len(want.tokenizer) == want.rows == 4108


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows():
    lm, tok = load("llmopt-tiny", "cpu"), tokenizer()
    tok.add_tokens(["<extra>"])
    with pytest.raises(UnsupportedModelError, match="fewer than its tokenizer has tokens"):
        expand(LM(lm.model, tok, "odd"), DOCS * 2, 5)


def test_mining_reads_each_text_once():
    "Twice the corpus: twice the texts that are tokenized."
    groups, read = grouped_tokenizer(tokenizer()), []
    call = type(groups).__call__

    class Counting(type(groups)):
        def __call__(self, texts, **kw):
            read.append(len(texts))
            return call(self, texts, **kw)

    groups.__class__ = Counting
    for n in (2, 4):
        read.clear()
        mine_merges(groups, DOCS * n, 5)
        assert sum(read) == 3 * n
