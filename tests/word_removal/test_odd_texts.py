"Texts of all scripts and origins: budgets are met or a warning says why, and no letter loses its marks."

import unicodedata

import pytest

from helpers import ODD_TEXTS, tokenizer
from llmopt.core import plain_text
from llmopt.errors import BudgetError
from llmopt.word_removal import (
    WordRemovalConfig,
    compress,
    remove_every_nth_word_advanced,
    segments,
    split_words,
    token_counter,
)

TOK = tokenizer()
COUNT = token_counter(TOK)
SCORERS = "coverage", "sentences", "every_nth"
every_text = pytest.mark.parametrize("text", ODD_TEXTS.values(), ids=ODD_TEXTS)
pytestmark = pytest.mark.filterwarnings("ignore:the text holds bytes")


def word_starts(text):
    "The characters that words of `text` begin with."
    return {text[w.start] for w in split_words(text)}


def results(text):
    "`text` shortened in several ways; what cannot be is left out."
    for rate in (0.3, 0.7):
        for scorer in SCORERS:
            for protect in ((), None):
                try:
                    yield compress(text, rate, tokenizer=TOK, scorer=scorer, protect=protect)
                except BudgetError:
                    assert protect is None


@every_text
def test_budgets_are_met_and_used_or_a_warning_says_why(text):
    found = [*results(text)]
    assert found
    for c in found:
        assert c.tokens_after == COUNT(c.text) <= c.target
        assert c.target - c.tokens_after <= max(8, c.target // 10) or c.warnings
        assert c.text.strip() or not c.source.strip() or c.warnings


@every_text
def test_no_word_begins_with_a_mark_that_began_none(text):
    "A mark that lost its letter would sit on the word before it."
    clean = plain_text(text)
    for short in [remove_every_nth_word_advanced(clean, 2), *(c.text for c in results(text))]:
        new = word_starts(short) - word_starts(clean)
        assert not [c for c in new if unicodedata.category(c)[0] == "M"]


@every_text
def test_what_is_kept_are_words_of_the_text_in_order(text):
    for c in results(text):
        words = [c.source[a:b] for (a, b), stayed in zip(c.spans, c.kept) if stayed]
        at = 0
        for w in split_words(c.text):
            core = c.text[w.start + w.lead : w.end - w.tail]
            at = next(i for i in range(at, len(words)) if core in words[i]) + 1


@every_text
def test_segments_and_lines_are_kept(text):
    assert "".join(segments(text)) == text
    for n in (2, 3):
        assert remove_every_nth_word_advanced(text, n).count("\n") == text.count("\n")
    assert WordRemovalConfig(rate=0.5).apply_to_turn(text, TOK).tokens_after <= COUNT(plain_text(text))


def test_syllables_of_tibetan_and_words_of_ethiopic_go_one_by_one():
    tibetan, ethiopic = ODD_TEXTS["Tibetan"], ODD_TEXTS["Ethiopic"]
    assert len(split_words(tibetan)) > 15 and len(split_words(ethiopic)) == 6
    c = compress(tibetan, 0.5, scorer="every_nth")
    assert c.tokens_after == c.target and not c.warnings and c.text.count(" ") == tibetan.count(" ")
    assert remove_every_nth_word_advanced("ሰላም፡ዓለም፡እንዴት፡ነህ።", 2) == "ሰላም፡እንዴት።"
