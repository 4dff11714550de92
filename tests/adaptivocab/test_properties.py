"What must hold of phrases for every text, every table and every tokenizer at hand."

import json
import random
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llmopt.adaptivocab.reader import EMBEDS, piece_weights
from llmopt.adaptivocab.tokenizer import (
    PhraseTable,
    SimpleAdaptiVocab,
    algorithm_1,
    join_pairs,
    mine,
    saved_share,
    show_phrases,
    static_phrases,
)
from llmopt.core import ASSETS
from llmopt.errors import LlmoptError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "tokenizers"
NAMES = "llmopt-tiny", "gpt2", "qwen"
BASE = 6
relaxed = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
ids = st.lists(st.integers(0, BASE - 1), max_size=40)
tables = st.sets(st.lists(st.integers(0, BASE - 1), min_size=2, max_size=5).map(tuple), max_size=15).map(
    lambda ps: PhraseTable(sorted(ps), BASE)
)
corpora = st.lists(st.lists(st.integers(0, 3), max_size=25), max_size=5)


@cache
def tokenizer(name):
    if name == "llmopt-tiny":
        return AutoTokenizer.from_pretrained(ASSETS / name)
    path = SHARED / name / "tokenizer.json"
    if not path.exists():
        pytest.skip(f"no tokenizer at ../shared/data/tokenizers/{name}")
    return PreTrainedTokenizerFast(tokenizer_file=str(path))


@cache
def vocab(name, how):
    "Default phrases and phrases of a few texts in several scripts"
    v = SimpleAdaptiVocab(tokenizer(name), segmentation=how)
    texts = [
        "the sum of the parts of the whole",
        "人工知能と機械学習と人工知能",
        "שלום עולם שלום עולם",
        "😀😀😀😀 👩‍👩‍👧 👩‍👩‍👧",
        " \n \n  \n\n ",
        "aaaaaaaa\x00\x00\x00\x00",
    ] * 3
    mined = SimpleAdaptiVocab(tokenizer(name), []).fit(texts, n_new=80).table.pieces
    v.table = PhraseTable(dict.fromkeys(v.table.pieces + mined), v.base)
    return v


def brute(table, seq):
    "Fewest tokens, by trying all ways"
    if not seq:
        return 0
    return 1 + min(brute(table, seq[k:]) for k in [1, *(len(p) for p in table.pieces if tuple(seq[: len(p)]) == p)])


def recount(seqs, n, max_len, min_count, barrier=()):
    "Joins of the most frequent pair, with counts from scratch each time"
    seqs, parts, made = [[*s] for s in seqs], {}, []

    def piece(x):
        return parts.get(x, (x,))

    def replaced(s, ab, new):
        out, i, times = [], 0, 0
        while i < len(s):
            hit = tuple(s[i : i + 2]) == ab
            out.append(new if hit else s[i])
            i, times = i + 1 + hit, times + hit
        return out, times

    for new in range(BASE, BASE + n):
        pairs = {
            ab
            for s in seqs
            for ab in zip(s, s[1:])
            if not {*ab} & {*barrier} and len(piece(ab[0]) + piece(ab[1])) <= max_len
        }
        count, best = min(((-sum(replaced(s, ab, new)[1] for s in seqs), ab) for ab in pairs), default=(0, None))
        if -count < min_count:
            break
        parts[new] = piece(best[0]) + piece(best[1])
        made.append(parts[new])
        seqs = [replaced(s, best, new)[0] for s in seqs]
    return [*dict.fromkeys(made)]


@given(tables, ids)
@relaxed
def test_folding_is_lossless_and_the_optimum_is_never_longer_than_greedy(table, seq):
    best, greedy = table.fold(seq), table.fold(seq, "greedy")
    for f in (best, greedy):
        assert table.unfold(f.ids) == seq and f.span.sum() == len(seq)
        assert all(table.unfold([i]) == seq[s : s + k] for i, s, k in zip(f.ids, f.start.tolist(), f.span.tolist()))
    assert len(best.ids) <= len(greedy.ids) <= len(seq)


@given(tables, st.lists(st.integers(0, BASE - 1), max_size=11))
@relaxed
def test_the_optimum_equals_brute_force(table, seq):
    assert len(table.fold(seq).ids) == brute(table, seq)


@given(tables, ids, ids)
@relaxed
def test_greedy_is_prefix_stable(table, head, tail):
    a, b = table.fold(head, "greedy"), table.fold(head + tail, "greedy")
    sure = int((a.start + table.max_len <= len(head)).sum())
    assert a.ids[:sure].tolist() == b.ids[:sure].tolist()


@given(corpora, st.integers(2, 6), st.integers(2, 3), st.sampled_from([(), (2,)]))
@relaxed
def test_joins_equal_a_recount(seqs, max_len, min_count, barrier):
    forbidden = np.isin(np.arange(BASE), barrier)
    assert join_pairs(seqs, 12, forbidden, max_len, min_count) == recount(seqs, 12, max_len, min_count, barrier)


@given(corpora, st.integers(0, 8))
@relaxed
def test_mined_phrases_keep_the_rules(seqs, n):
    forbidden = np.arange(BASE) == 1
    for f in (mine, static_phrases, algorithm_1):
        found = f(seqs, n, forbidden)
        assert len(found) <= n and len({*found}) == len(found) and not any(1 in p for p in found)
        assert 0 <= saved_share(PhraseTable(found, BASE), seqs) < 1


@pytest.mark.parametrize("how", ("optimal", "greedy"))
@pytest.mark.parametrize("name", NAMES)
@given(text=st.text(max_size=80))
@relaxed
def test_any_text_decodes_as_without_phrases(name, how, text):
    v, tok = vocab(name, how), tokenizer(name)
    got, base = v.encode(text), tok.encode(text)
    assert v.unfold(got) == base and v.decode(got) == tok.decode(base) and len(got) <= len(base)
    spans = v(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    assert all(0 <= a <= e <= len(text) for a, e in spans)
    show_phrases(v, text)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "text", ["", "one", "😀👩‍👩‍👧", "人工知能と機械学習", "שלום עולם", "e\u0301", "\x00", "12 345", " " * 50]
)
def test_texts_of_all_kinds(name, text):
    v, tok = vocab(name, "optimal"), tokenizer(name)
    assert v.decode(v.encode(text)) == tok.decode(tok.encode(text))
    assert v([text, "of the of the"], padding=False)["input_ids"] == [v.encode(text), v.encode("of the of the")]


def test_five_megabytes():
    v, rng = vocab("llmopt-tiny", "optimal"), random.Random(0)
    words = [p.strip() for p in v.phrases] + ["zyx", "7", "and", "\n"]
    text = " ".join(rng.choices(words, k=5_500_000 * len(words) // sum(len(w) + 1 for w in words)))
    base = v._base_ids(text)
    f = v.fold(base)
    assert len(text) > 5e6 and len(f.ids) < 0.8 * len(base) and v.unfold(f.ids.tolist()) == base


@pytest.mark.parametrize("name", NAMES)
def test_phrases_keep_clear_of_digits_and_special_tokens(name):
    v = vocab(name, "optimal")
    special = {*tokenizer(name).all_special_ids, *tokenizer(name).added_tokens_decoder}
    assert not any(c.isdecimal() for p in v.phrases for c in p) and not any(special & {*p} for p in v.table.pieces)
    assert min(range(v.base, len(v))) == v.base > max(i for p in v.table.pieces for i in p)


@pytest.mark.parametrize("name", NAMES)
def test_save_and_load(name, tmp_path):
    v = vocab(name, "greedy")
    v.save(tmp_path / "p.json")
    w = SimpleAdaptiVocab.load(tmp_path / "p.json", tokenizer(name))
    assert (w.table.pieces, w.base, w.segmentation) == (v.table.pieces, v.base, v.segmentation)


@given(damage=st.sampled_from(["format", "vocabulary", "phrases", "segmentation", "ids", "special", "range", "twice"]))
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_refused(damage, tmp_path):
    v = vocab("llmopt-tiny", "optimal")
    v.save(tmp_path / "p.json")
    d = json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))
    if damage in d:
        del d[damage]
    elif damage == "ids":
        d["phrases"][0] = {}
    else:
        d["phrases"][0]["ids"] = dict(special=[0, 3], range=[5, 10**6], twice=d["phrases"][1]["ids"])[damage]
    (tmp_path / "p.json").write_text(json.dumps(d), encoding="utf-8")
    with pytest.raises(LlmoptError):
        SimpleAdaptiVocab.load(tmp_path / "p.json", tokenizer("llmopt-tiny"))


def test_the_tokenizer_is_not_changed():
    tok = AutoTokenizer.from_pretrained(ASSETS / "llmopt-tiny")
    before = tok.backend_tokenizer.to_str()
    v = SimpleAdaptiVocab(tok).fit(["of the of the"] * 3, n_new=5)
    v(["of the", ""], padding="max_length", max_length=9, truncation=True, return_tensors="pt")
    assert tok.backend_tokenizer.to_str() == before


@given(st.integers(1, 12), st.floats(0.1, 20), st.sampled_from(EMBEDS))
@relaxed
def test_weights_sum_to_one_and_never_fall(k, ratio, embed):
    w = piece_weights(k, embed, ratio)
    assert abs(w.sum().item() - 1) < 1e-5 and (w >= 0).all()
    if ratio >= 1:
        assert (w[1:] - w[:-1] >= -1e-6).all()
