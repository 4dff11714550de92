"Phrases in texts of all scripts and origins: nothing is lost, and spans lead back to the text."

import pytest

from helpers import ODD_TEXTS, tokenizer
from llmopt.adaptivocab import SimpleAdaptiVocab
from llmopt.core import plain_text

pytestmark = pytest.mark.filterwarnings("ignore:the text holds bytes")


@pytest.fixture(scope="module")
def mined():
    "Phrases of all the texts, some of which then stand in each"
    return SimpleAdaptiVocab(tokenizer(), []).fit([*ODD_TEXTS.values()] * 2, n_new=400)


@pytest.mark.parametrize("text", ODD_TEXTS.values(), ids=ODD_TEXTS)
def test_decoding_gives_what_the_tokenizer_alone_gives(mined, text):
    clean = plain_text(text)
    plain = mined.tokenizer.encode(clean)
    ids = mined.encode(text)
    assert mined.unfold(ids) == plain and mined.decode(ids) == mined.tokenizer.decode(plain) == clean
    assert len(ids) < len(plain)


@pytest.mark.parametrize("text", ODD_TEXTS.values(), ids=ODD_TEXTS)
def test_spans_cover_the_text_in_order(mined, text):
    clean = plain_text(text)
    spans = mined(text, return_offsets_mapping=True)["offset_mapping"]
    assert all(a <= c and b <= d for (a, b), (c, d) in zip(spans, spans[1:]))
    assert {i for a, b in spans for i in range(a, b)} == {*range(len(clean))}


@pytest.mark.parametrize("text", ODD_TEXTS.values(), ids=ODD_TEXTS)
def test_phrases_of_one_text_hold_no_digits_and_shorten_it(text):
    v = SimpleAdaptiVocab(tokenizer(), []).fit([text] * 2, n_new=5)
    assert not any(c.isdecimal() for p in v.phrases for c in p)
    assert len(v.encode(text)) < len(v.tokenizer.encode(plain_text(text))) or not v.phrases
