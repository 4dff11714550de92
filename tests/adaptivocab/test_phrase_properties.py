"What must hold of folding and mining for every table and every sequence."

import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmopt.adaptivocab.mining import bpe_phrases, mine_phrases, saved_share, usage_counts
from llmopt.adaptivocab.phrases import PhraseTable, Trie
from llmopt.errors import ConfigError

BASE = 6
relaxed = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
sequences = st.lists(st.integers(0, BASE - 1), max_size=40)
tables = st.sets(st.lists(st.integers(0, BASE - 1), min_size=2, max_size=5).map(tuple), max_size=15).map(
    lambda phrases: PhraseTable(sorted(phrases), BASE)
)
corpora = st.lists(st.lists(st.integers(0, 3), max_size=25), max_size=5)


def fewest(table, seq):
    "Fewest tokens for `seq`, by trying all ways."
    if not seq:
        return 0
    spans = [1, *(len(p) for p in table.pieces if tuple(seq[: len(p)]) == p)]
    return 1 + min(fewest(table, seq[k:]) for k in spans)


def replaced(seq, pair, new):
    "`seq` with each `pair` replaced by `new`, and how often that was."
    out, i, times = [], 0, 0
    while i < len(seq):
        hit = tuple(seq[i : i + 2]) == pair
        out.append(new if hit else seq[i])
        i, times = i + 1 + hit, times + hit
    return out, times


def recounted(seqs, n, max_len, min_count, barrier):
    "Merges of the most frequent pair, with counts from scratch each time."
    seqs, parts = [[*s] for s in seqs], {}

    def pieces(x):
        return parts.get(x, (x,))

    for new in range(BASE, BASE + n):
        pairs = {ab for s in seqs for ab in zip(s, s[1:]) if not {*ab} & {*barrier}}
        pairs = {(a, b) for a, b in pairs if len(pieces(a) + pieces(b)) <= max_len}
        counts = {ab: sum(replaced(s, ab, new)[1] for s in seqs) for ab in pairs}
        best = min(counts, key=lambda ab: (-counts[ab], ab), default=None)
        if best is None or counts[best] < min_count:
            break
        parts[new] = pieces(best[0]) + pieces(best[1])
        seqs = [replaced(s, best, new)[0] for s in seqs]
    return [*dict.fromkeys(parts.values())]


@given(tables, sequences)
@relaxed
def test_folding_is_lossless_and_the_optimum_is_never_longer_than_greedy(table, seq):
    best, greedy = table.fold(seq), table.fold(seq, "greedy")
    for f in (best, greedy):
        assert table.unfold(f.ids) == seq
        assert f.span.sum() == len(seq) and f.start.tolist() == [0, *f.span.cumsum()[:-1]][: len(f.ids)]
        assert all(table.unfold([i]) == seq[s : s + k] for i, s, k in zip(f.ids, f.start.tolist(), f.span.tolist()))
    assert len(best.ids) <= len(greedy.ids) <= len(seq)


@given(tables, st.lists(st.integers(0, BASE - 1), max_size=11))
@relaxed
def test_the_optimum_equals_brute_force(table, seq):
    assert len(table.fold(seq).ids) == fewest(table, seq)


@given(tables, sequences, sequences)
@relaxed
def test_greedy_is_prefix_stable(table, head, tail):
    "All but the last `max_len - 1` tokens of a prefix are tokens of every longer sequence."
    a, b = table.fold(head, "greedy"), table.fold(head + tail, "greedy")
    sure = int((a.start + table.max_len <= len(head)).sum())
    assert a.ids[:sure].tolist() == b.ids[:sure].tolist()


@given(tables, sequences)
@relaxed
def test_matches_are_all_places_where_a_phrase_stands(table, seq):
    start, span, phrase = (a.tolist() for a in table.matches(seq))
    found = [*zip(start, span, phrase)]
    places = [
        (i, len(p), j) for i in range(len(seq)) for j, p in enumerate(table.pieces) if tuple(seq[i:][: len(p)]) == p
    ]
    assert found == sorted(places)


@given(corpora, st.integers(2, 6), st.integers(2, 3), st.sampled_from([(), (2,)]))
@relaxed
def test_merges_equal_a_recount(seqs, max_len, min_count, barrier):
    forbidden = np.isin(np.arange(BASE), barrier)
    assert bpe_phrases(seqs, 12, forbidden, max_len, min_count) == recounted(seqs, 12, max_len, min_count, barrier)


@given(corpora, st.integers(0, 8))
@relaxed
def test_mined_phrases_keep_the_rules(seqs, n):
    found = mine_phrases(seqs, n, np.arange(BASE) == 1)
    table = PhraseTable(found, BASE)
    assert len(found) <= n and not any(1 in p for p in found)
    assert 0 <= saved_share(table, seqs) < 1
    assert (usage_counts(table, seqs) >= 0).all()


def test_edges_of_a_trie_are_its_steps_below_the_first_token():
    parent, token, child = (a.tolist() for a in Trie([(1, 2), (1, 2, 3), (2, 3)], BASE).edges)
    assert sorted(zip(parent, token, child)) == [(1, 2, 2), (2, 3, 3), (4, 3, 5)]


@pytest.mark.parametrize(
    "pieces", [[(1,)], [()], [(1, 10)], [(-1, 2)], [(1, 2), (1, 2)], [(1, 2.0)], [("1", "2")], [5]]
)
def test_what_is_no_phrase_is_refused(pieces):
    with pytest.raises(ConfigError, match="phrase"):
        PhraseTable(pieces, 10)


@pytest.mark.parametrize("ids", [[1, 10], [-1], ["a"], [1.5], [[1]], [[1], [1, 2]], None, 5, "12", [None]])
def test_what_cannot_be_folded_is_refused(ids):
    table = PhraseTable([(1, 2)], 10)
    with pytest.raises(ConfigError):
        table.fold(ids)


@pytest.mark.parametrize("ids", [[1, 12], [-1], ["a"], [0.5], None])
def test_what_cannot_be_unfolded_is_refused(ids):
    with pytest.raises(ConfigError):
        PhraseTable([(1, 2)], 10).unfold(ids)


def test_an_unknown_segmentation_is_refused():
    with pytest.raises(ConfigError, match="greedy"):
        PhraseTable([], 10).fold([1], "fast")


def test_long_phrases_of_a_user_are_entered_in_linear_time():
    "Nodes are made one a token, so a phrase of 200,000 tokens is no trouble."
    rng = random.Random(0)
    phrase = tuple(rng.choices(range(BASE), k=200_000))
    assert len(Trie([phrase], BASE).ends) == 200_001
