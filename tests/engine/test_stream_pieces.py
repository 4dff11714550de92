"The pieces of a stream join to the decoded text, for every kind of tokenizer; twice the answer costs twice the work."

import random

import pytest
import transformers as T
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from helpers import tokenizer
from llmopt.engine import text_pieces

BYTES = [f"<0x{b:02X}>" for b in range(256)]


def wordpiece(clean_up=True, decoder_cleans=False):
    "A vocabulary of the BERT kind: whole words, `##` continuations, punctuation."
    words = [
        "[UNK]",
        "[SEP]",
        "don",
        "do",
        "n",
        "'",
        "t",
        "stop",
        ".",
        ",",
        "!",
        "s",
        "ve",
        "a",
        "##b",
        "##n",
        "n't",
        "it",
    ]
    t = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    t.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    t.decoder = decoders.WordPiece(cleanup=decoder_cleans)
    return T.PreTrainedTokenizerFast(
        tokenizer_object=t, unk_token="[UNK]", sep_token="[SEP]", clean_up_tokenization_spaces=clean_up
    )


def sentencepiece():
    "A vocabulary of the Llama kind: spaces as `▁`, unknown characters as bytes, the first space dropped."
    words = ["<unk>", "</s>", *BYTES, "▁", "▁the", "▁a", "b", "é", "▁日", "本", "."]
    t = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    t.decoder = decoders.Sequence(steps)
    return T.PreTrainedTokenizerFast(tokenizer_object=t, unk_token="<unk>", eos_token="</s>")


def with_suffix():
    "A vocabulary of the GPT-1 kind: the end of a word is marked."
    words = ["<unk>", "he", "llo</w>", "the</w>", ".</w>", "a", "b</w>"]
    t = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>", end_of_word_suffix="</w>"))
    t.decoder = decoders.BPEDecoder(suffix="</w>")
    return T.PreTrainedTokenizerFast(tokenizer_object=t, unk_token="<unk>")


def metaspace():
    "A Unigram vocabulary with a decoder that drops the first space."
    words = [("<unk>", 0.0), ("▁the", -1.0), ("▁", -1.0), ("a", -2.0), ("▁b", -2.0), ("'", -3.0)]
    t = Tokenizer(models.Unigram(words, unk_id=0))
    t.decoder = decoders.Metaspace()
    return T.PreTrainedTokenizerFast(tokenizer_object=t, unk_token="<unk>")


def with_added_tokens():
    "The bundled tokenizer with an added token that is shown and one that is not."
    t = tokenizer()
    t.add_tokens(["<tool>"])
    t.add_special_tokens({"additional_special_tokens": ["<hidden>"]})
    return t


TOKENIZERS = dict(
    bundled=tokenizer,
    added=with_added_tokens,
    wordpiece=wordpiece,
    wordpiece_plain=lambda: wordpiece(False),
    wordpiece_decoder=lambda: wordpiece(False, True),
    sentencepiece=sentencepiece,
    suffix=with_suffix,
    metaspace=metaspace,
)


def joined(tok, ids, steps=1):
    "The pieces of `ids`, `steps` tokens at a time, as one text."
    pieces = list(text_pieces(tok, (ids[i : i + steps] for i in range(0, len(ids), steps))))
    assert all(pieces)
    return "".join(pieces)


def decoded(tok, ids):
    return tok.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_random_tokens(name):
    "Any tokens at all, most of them no text: 150 answers of up to 120 tokens."
    tok, rng = TOKENIZERS[name](), random.Random(0)
    for _ in range(150):
        ids = rng.choices(range(len(tok)), k=rng.randrange(1, 120))
        assert joined(tok, ids, rng.choice([1, 1, 3])) == decoded(tok, ids)


@pytest.mark.parametrize("name", ["sentencepiece", "bundled"])
def test_bytes_that_are_no_character(name):
    "Runs of bytes, valid and broken ones, which some decoders replace as a whole."
    tok, rng = TOKENIZERS[name](), random.Random(1)
    whole = "é€😀ก็ग्".encode()
    first = tok.convert_tokens_to_ids(BYTES[0]) if name == "sentencepiece" else None
    for _ in range(100):
        data = bytearray()
        for _ in range(rng.randrange(1, 12)):
            data += rng.choice([b"\xe2", b"\xe2\x82", "€".encode(), whole, b"\xff", b"a"])
        ids = [first + b for b in data] if first else tok.convert_tokens_to_ids([*_byte_level(data)])
        ids += rng.choice([[], tok("b.", add_special_tokens=False)["input_ids"]])
        assert joined(tok, ids) == decoded(tok, ids)


def _byte_level(data):
    "The tokens of the bytes `data` in a byte-level vocabulary."
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    chars = {b: chr(b) for b in plain}
    chars |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in chars)}
    return [chars[b] for b in data]


@pytest.mark.parametrize(
    "text",
    ["don ' t stop .", "do n't ' ' ' stop , a ' s it ' ve", "do n ' t", "' ' ' ' '", "a ##b ##b . it 's !", "stop"],
)
def test_clean_up_reaches_back(text):
    "Spaces before punctuation and in contractions vanish when the next token comes, so the words before it wait."
    tok = wordpiece()
    ids = tok.convert_tokens_to_ids(text.split())
    assert joined(tok, ids) == decoded(tok, ids)


def test_combining_marks_and_emoji():
    tok = tokenizer()
    for text in ("e\u0301 o\u0302\u0323", "👨‍👩‍👧‍👦 🏳️‍🌈", "नमस्ते ก็", "a\u200fב\u200e", "\r\n\u2028\x85 x"):
        ids = tok(text, add_special_tokens=False)["input_ids"]
        assert joined(tok, ids) == decoded(tok, ids) == text


def test_a_long_word_is_passed_on_before_it_ends():
    "Only what may still change waits: with clean-up the last word, with byte tokens their run, else nothing."
    tok = tokenizer()
    ids = tok("antidisestablishmentarianism", add_special_tokens=False)["input_ids"]
    assert len(list(text_pieces(tok, ([i] for i in ids)))) == len(ids)


class Counting:
    "A tokenizer that counts the tokens it decodes."

    def __init__(self, tok):
        self.tok, self.decoded = tok, 0

    def __getattr__(self, name):
        return getattr(self.tok, name)

    def decode(self, ids, **kw):
        self.decoded += len(ids)
        return self.tok.decode(ids, **kw)


@pytest.mark.parametrize("name", ["bundled", "wordpiece", "sentencepiece"])
@pytest.mark.parametrize("kind", ["text", "broken bytes", "one token"])
def test_twice_the_answer_twice_the_decoding(name, kind):
    tok, work = TOKENIZERS[name](), []
    byte = tok.convert_tokens_to_ids({"sentencepiece": "<0xE2>", "bundled": "â"}.get(name, "'"))
    for n in (500, 1000, 2000):
        counting, rng = Counting(tok), random.Random(2)
        ids = {"text": rng.choices(range(len(tok)), k=n), "broken bytes": [byte] * n, "one token": [len(tok) - 1] * n}
        joined(counting, ids[kind])
        work.append(counting.decoded)
    assert work[1] <= 2.3 * work[0] and work[2] <= 2.3 * work[1], work
