"What must hold for every text: words are whole, protected spans untouched, budgets exact, results repeatable."

import re
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from helpers import tokenizer
from llmopt.errors import BudgetError
from llmopt.word_removal import (
    MODEL_FREE,
    PATTERNS,
    WordRemovalConfig,
    compress,
    protected_spans,
    remove_every_nth_word_advanced,
    segments,
    split_words,
    token_counter,
)
from llmopt.word_removal.text import BLANK, LINE_BREAK

TOK = tokenizer()
settings.register_profile("words", deadline=None, suppress_health_check=[HealthCheck.too_slow])
quick = settings(settings.get_profile("words"), max_examples=100)

PIECES = [
    "the",
    "of",
    "not",
    "and",
    "river",
    "energy",
    "Energy",
    "Maria",
    "NASA",
    "3",
    "1,200",
    "$5.50",
    "7%",
    "two million",
    "don't",
    "Dr.",
    "e.g.",
    "it.",
    "end!",
    "why?",
    '"a quote"',
    "(in",
    "brackets)",
    "[1]",
    "-",
    "—",
    "...",
    "*bold*",
    "`code x`",
    "https://a.org/b?c=1",
    "me@site.org",
    "<b>",
    "{{x y}}",
    "<|user|>",
    "| a | b |",
    "日本",
    "我们。",
    "カメラを",
    "שלום",
    "مرحبا",
    "नमस्ते",
    "cafe\u0301",
    "😀",
    "👩‍👩‍👧",
    "\u200f",
    "a_b",
    "naïve,",
    "end;",
    "cat's",
    "’tis",
    "\ufeff",
    "น้ำเดือดที่อุณหภูมิ",
    "QUJDRA" * 9,
    "ម៉ោង",
]
GAPS = [" "] * 12 + ["\n", "\n\n", "\n\n\n", "  ", "\t", "\n  ", "\r\n", "\u2028", "\u200b", "\x85", "\r\n\r\n", ""]
mixed = st.lists(st.tuples(st.sampled_from(PIECES), st.sampled_from(GAPS)), max_size=60).map(
    lambda ps: "".join(a + b for a, b in ps)
)
texts = st.one_of(mixed, st.text(max_size=120), st.text(alphabet="ab.,!?\"()' \n", max_size=80))


def words_of(text):
    return [text[w.start + w.lead : w.end - w.tail] for w in split_words(text)]


def is_subsequence(short, long):
    "Are the items of `short` in `long`, in that order?"
    rest = iter(long)
    return all(x in rest for x in short)


@pytest.fixture(scope="module")
def bpe():
    "A small byte-level BPE, for which the tokens of words do not add up to the tokens of texts"
    tokenizers = pytest.importorskip("tokenizers")
    tok = tokenizers.ByteLevelBPETokenizer()
    corpus = [
        "the river and the energy of the sea, of the sun and of the wind",
        "Maria does not know why it is the end of it all.",
    ] * 8
    tok.train_from_iterator(corpus, vocab_size=400, show_progress=False)
    return tok._tokenizer


def cut(text, **kw):
    "`compress`, or no example if what is protected is over the budget"
    try:
        return compress(text, **kw)
    except BudgetError:
        assume(False)


@quick
@given(texts)
@example("\x1c\x85\u2028\u3000")
@example("。日。")
@example("a日b\ufe00本")
@example("日\U0003134b゛\u3099")
def test_segmentation_loses_nothing(text):
    parts = segments(text)
    assert "".join(parts) == text
    assert all(not p.strip(BLANK) for p in parts[::2] if not p.isspace()) and not any(
        re.search(r"\s", p) for p in parts[1::2]
    )
    words = split_words(text)
    assert all(w.lead >= 0 and w.tail >= 0 and w.start + w.lead < w.end - w.tail for w in words)
    assert all(a.end <= b.start for a, b in pairwise(words))
    assert all(w.mark != any(c.isalnum() for c in text[w.start : w.end]) for w in words)


@quick
@given(texts, st.floats(0.05, 1), st.sampled_from(MODEL_FREE))
def test_what_is_kept_is_a_subsequence(text, rate, scorer):
    c = cut(text, rate=rate, scorer=scorer)
    before, after = words_of(text), words_of(c.text)
    assert len(c.kept) == len(c.spans) == len(before)
    assert is_subsequence(after, before)
    assert len(after) == sum(c.kept) == c.tokens_after
    assert after == [w for w, k in zip(before, c.kept) if k]


@quick
@given(texts, st.floats(0.2, 0.95), st.sampled_from(MODEL_FREE), st.sets(st.sampled_from([*PATTERNS]), min_size=1))
@example('the "a quote" of 3, and it.', 0.8, "idf", {"quotes", "numbers"})
def test_protected_spans_survive(text, rate, scorer, protect):
    protect = sorted(protect)
    c = cut(text, rate=rate, scorer=scorer, protect=protect)
    at = 0
    for s, e in protected_spans(text, protect):
        found = c.text.find(text[s:e], at)
        assert found >= 0, text[s:e]
        at = found + e - s


@quick
@given(mixed, st.integers(1, 12), st.integers(0, 30))
def test_own_patterns_survive(text, length, start):
    span = text[start : start + length].strip(BLANK)
    assume(span)
    c = cut(text, rate=0.6, protect=[re.compile(re.escape(span))])
    assert span in c.text


def check_budget(text, rate, scorer, tokenizer):
    "The budget holds in real tokens, and what is left of it is less than another word would take"
    count = token_counter(tokenizer)
    c = cut(text, rate=rate, scorer=scorer, tokenizer=tokenizer)
    assert c.tokens_before == count(text) and c.tokens_after == count(c.text) <= c.target
    assert c.target < rate * c.tokens_before + 1
    return c


@quick
@given(texts, st.floats(0.05, 1), st.sampled_from(MODEL_FREE))
def test_budget_is_met_with_a_small_tokenizer(bpe, text, rate, scorer):
    check_budget(text, rate, scorer, bpe)


@quick
@given(texts, st.floats(0.05, 1), st.sampled_from(MODEL_FREE))
def test_budget_is_met_with_the_bundled_tokenizer(text, rate, scorer):
    check_budget(text, rate, scorer, TOK)


@settings(quick, max_examples=60)
@given(
    st.lists(
        st.sampled_from("the sea and sun of wind river it all know end is why a".split()), min_size=20, max_size=80
    ),
    st.floats(0.2, 0.95),
)
def test_budget_is_used_up(bpe, words, rate):
    c = check_budget(" ".join(words), rate, "coverage", bpe)
    assert c.target - c.tokens_after <= 1


@quick
@given(texts, st.sampled_from(MODEL_FREE))
def test_rate_1_is_the_identity(text, scorer):
    c = compress(text, rate=1, scorer=scorer)
    assert c.text == text and all(c.kept) and c.rate == 1
    assert compress(text, target_tokens=len(c.kept) + 1, scorer=scorer).text == text


@quick
@given(texts, st.floats(0.1, 1), st.sampled_from(MODEL_FREE), st.integers(0, 5))
def test_results_repeat(text, rate, scorer, seed):
    kw = dict(rate=rate, scorer=scorer, seed=seed)
    c = cut(text, **kw)
    assert c == compress(text, **kw)
    if c.text.strip() and not c.warnings:
        assert WordRemovalConfig(**kw).apply(text) == c


@quick
@given(
    texts,
    st.lists(st.floats(0.1, 1), min_size=2, max_size=2),
    st.sampled_from(["random", "stop_list", "idf", "bigram", "coverage", "sentences"]),
)
def test_more_budget_keeps_all_that_less_kept(text, rates, scorer):
    a, b = (cut(text, rate=r, scorer=scorer).kept for r in sorted(rates))
    assert all(y or not x for x, y in zip(a, b))


@quick
@given(texts, st.floats(0.3, 0.95), st.sampled_from(MODEL_FREE))
def test_line_breaks_between_kept_words_stay(text, rate, scorer):
    c = cut(text, rate=rate, scorer=scorer)
    stay = [s for s, k in zip(c.spans, c.kept) if k]
    for (a, b), (x, y) in zip(pairwise(stay), pairwise(split_words(c.text))):
        assert bool(LINE_BREAK.search(text[a[1] : b[0]])) == bool(LINE_BREAK.search(c.text[x.end : y.start]))


@quick
@given(texts, st.integers(2, 6))
def test_the_naive_method_counts_words(text, n):
    short = remove_every_nth_word_advanced(text, n)
    before = [w for w in split_words(text) if not w.mark]
    kept = [w for i, w in enumerate(before, 1) if i % n]
    after = [w for w in split_words(short) if not w.mark]
    assert len(after) == len(kept)
    assert [short[w.start + w.lead : w.end - w.tail].lower() for w in after] == [
        text[w.start + w.lead : w.end - w.tail].lower() for w in kept
    ]
    assert short.count("\n") == text.count("\n")
    if len(kept) == len(before):
        assert short == text
    assert short == remove_every_nth_word_advanced(text, n)


@quick
@given(texts)
def test_a_long_stride_is_the_identity(text):
    assert remove_every_nth_word_advanced(text, len(text) + 2) == text


@pytest.mark.parametrize("scorer", MODEL_FREE)
def test_a_large_text(scorer):
    "Five hundred lines, and every budget in words is met exactly"
    text = 'The sea was calm on the 3rd of May, and Maria did not sail; she read "Emma" at home.\n' * 500
    c = compress(text, rate=0.6, scorer=scorer)
    assert c.tokens_after == c.target


@pytest.mark.parametrize(
    "unit",
    [
        "a",
        "!",
        " ",
        "\n",
        "(",
        '"',
        "`",
        "```\n",
        "{{",
        "<",
        "<a ",
        "|",
        "| ",
        "1,",
        "a@",
        "a.",
        "A",
        "A ",
        "日",
        "\t",
        "a\t",
        "😀",
        "<|",
        "Ab ",
    ],
)
def test_repeated_characters(unit):
    text = unit * (20_000 // len(unit))
    try:
        assert compress(text, rate=0.5).tokens_after <= max(1, -(-len(split_words(text)) // 2))
    except BudgetError as e:
        assert "protect" in str(e)
    assert remove_every_nth_word_advanced(text, 3).count("\n") == text.count("\n")
