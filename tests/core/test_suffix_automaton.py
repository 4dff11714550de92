"The suffix automaton says what a search through the text says, for several texts and for texts that are not in it."

import random

import pytest

from llmopt.core.suffixes import SuffixAutomaton, longest_repeat


@pytest.mark.parametrize("seed", range(30))
def test_several_texts_and_one_that_is_not_among_them(seed):
    rng, automaton, text = random.Random(seed), SuffixAutomaton(), []
    for i in range(40):
        if rng.random() < 0.1:
            automaton.part()
            text.append(("border", i))  # unlike any other token
            continue
        text.append(rng.randrange(3))
        automaton.add(text[-1])
        length, end = automaton.match
        assert length == longest_repeat(text)[0]
        assert end < len(text) - 1 and text[end - length + 1 : end + 1] == text[len(text) - length :]
    assert len(automaton) <= 2 * len(text)
    place, other = (0, 0), []
    runs = {tuple(text[i : i + n]) for n in range(1, 13) for i in range(len(text) - n + 1)}
    for _ in range(12):
        other.append(rng.randrange(3))
        place = automaton.follow(place, other[-1])
        assert place[1] == max((n for n in range(1, len(other) + 1) if tuple(other[-n:]) in runs), default=0)
