"Measures of drafts, reading and tuning on inputs that are empty, single, long or odd."

import math

import numpy as np
import pytest

from helpers import tiny
from llmopt.adaptivocab import Drafts, PhraseReader, SimpleAdaptiVocab
from llmopt.benchmark.drafts import compare_drafts
from llmopt.benchmark.vocab_reading import delete_tokens, measure_reading, relative_increase, split_document
from llmopt.benchmark.vocab_tuning import count_tokens, document_bits, measure_tuning
from llmopt.core import load, user
from llmopt.core.pass_costs import measure_pass_costs
from llmopt.errors import ConfigError

DOCS = [
    "The heart attack is a disease of the heart. High blood pressure, and the risk of a heart attack, is high.",
    "Signs and symptoms of a heart attack, and of high blood pressure, are in the list of signs and symptoms.",
    "The risk of high blood pressure is high.",
]


def test_drafts_compared_on_no_prompts_and_empty_answers():
    lm = tiny()
    d = dict(none=Drafts())
    for prompts, n in (([], 4), ([lm.encode_chat([user("Why?")])], 0)):
        for r in compare_drafts(lm, prompts, d, n):
            assert (r["tokens"], r["forwards"], r["identical"]) == (0, 0, len(prompts))
    for bad in (dict(context=0), dict(rounds=0)):
        with pytest.raises(ConfigError, match="costs are measured behind"):
            measure_pass_costs(lm.model, **bad)


def test_drafts_are_compared_on_greedy_text_whatever_the_checkpoint_asks_for():
    lm = load("llmopt-tiny", "cpu")
    lm.model.generation_config.repetition_penalty, lm.model.generation_config.do_sample = 1.5, True
    prompts = [lm.encode_chat([user(q)]) for q in ("What is machine learning?", "Why is the sky blue?")]
    want = compare_drafts(tiny(), prompts, {}, 20)
    got = compare_drafts(lm, prompts, {}, 20)
    assert [(r["tokens"], r["forwards"], r["identical"]) for r in got] == [
        (r["tokens"], r["forwards"], r["identical"]) for r in want
    ]


def test_an_increase_over_one_text_has_no_interval():
    increase, low, high = relative_increase([3.0], [2.0])
    assert increase == 0.5 and math.isnan(low) and math.isnan(high)
    for a, b in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ConfigError, match="the same texts"):
            relative_increase(a, b)


def test_documents_are_cut_at_a_space():
    tok = tiny().tokenizer
    a, b, size = split_document(tok, "In the work.")
    assert (tok.decode(a[1:]), tok.decode(b), size) == ("In the", " work.", 6)
    assert [split_document(tok, d) for d in ("", "word", " word", "人工知能")] == [None] * 4
    assert split_document(tok, "a lone \ud800 one")[2] > 0


def test_reading_needs_texts_to_score():
    lm = tiny()
    for test in ([], ["word"], ["long " * 3000]):
        with pytest.raises(ConfigError, match="no text to score"):
            measure_reading(lm, DOCS, test, 5, 0)
    ways, run = measure_reading(lm, DOCS * 2, DOCS, 10, 0)
    by = {w["way"]: w for w in ways}
    assert "distilled" not in by and run["loss"] == []
    assert (by["plain"]["kl"], by["plain"]["top1"]) == (0, 1) and by["no prompt"]["kl"] > by["composed"]["kl"] > 0
    assert (by["plain"]["rise"], by["plain"]["saved"]) == (0, 0) and by["no prompt"]["rise"] > 0


def test_tokens_that_carry_the_chat_are_never_deleted():
    lm = tiny()
    r = PhraseReader(lm.model, SimpleAdaptiVocab(lm.tokenizer))
    ids = lm.encode_chat([user("Is machine learning a part of the work?")])
    never = {*lm.tokenizer.all_special_ids, *lm.tokenizer.added_tokens_decoder}
    for how in ("random", "even"):
        assert delete_tokens(r, ids, 0, how).ids == ids
        short = delete_tokens(r, ids, 6, how).ids
        assert [i for i in short if i in never] == [i for i in ids if i in never]
    for n, how in ((len(ids), "random"), (-1, "even"), (1, "all")):
        with pytest.raises(ConfigError, match="delet"):
            delete_tokens(r, ids, n, how)


def test_bits_of_documents_do_not_depend_on_the_batch():
    lm = tiny()
    docs = [" ".join(DOCS * 20), *DOCS, "High.", ""]
    assert len(lm.tokenizer.encode(docs[0])) > lm.context
    np.testing.assert_allclose(document_bits(lm, docs, 3), document_bits(lm, docs), atol=1e-2)
    assert document_bits(lm, docs)[-1] == 0 and len(document_bits(lm, [])) == 0
    assert count_tokens(lm.tokenizer, []) == 0


def test_tuning_measured_beside_no_new_tokens():
    lm = tiny()
    rows = {r["model"]: r for r in measure_tuning(lm, DOCS * 4, DOCS, 20, 2, per_step=2, progress=False)}
    plain = rows["no new tokens"]
    assert (plain["rise"], plain["saved_in"], rows["replaced"]["tokens"]) == (0, 0, 4096)
    assert rows["as bundled"]["over_bundled"] == 0
    assert rows["appended, with prior"]["saved_out"] > 0.2
    r = rows["replaced"]
    assert r["rise"] == pytest.approx(r["bits_per_byte"] / plain["bits_per_byte"] - 1, abs=1e-3)
    assert r["low"] <= r["rise"] <= r["high"] and r["bits_before"] > r["bits_per_byte"]
    with pytest.raises(ConfigError, match="unknown variant"):
        measure_tuning(lm, DOCS, DOCS, variants=("all",))
    with pytest.raises(ConfigError, match="no text"):
        measure_tuning(lm, DOCS, ["", ""])
