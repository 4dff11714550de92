"Every text, in every script and with every line end, decodes as the tokenizer alone would decode it."

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from helpers import tokenizer
from llmopt.adaptivocab.phrases import PhraseTable
from llmopt.adaptivocab.tokenizer import SimpleAdaptiVocab
from llmopt.errors import ConfigError, UnsupportedModelError

TEXTS = {
    "empty": "",
    "a space": " ",
    "CRLF": "of the\r\n of the\r\n\r\nof the",
    "lone CR": "of the\rof the",
    "byte order mark": "\ufeffof the parts",
    "line and paragraph separators": "of the\u2028of the\u2029of the\x85of the",
    "combining marks": "e\u0301 of the e\u0301 of the \u0915\u094d\u0937",
    "many marks on one letter": "a" + "\u0301" * 50 + " of the",
    "Chinese": "人工智能和机器学习和人工智能和机器学习。",
    "Japanese": "人工知能と機械学習と人工知能と機械学習",
    "Thai": "น้ำเดือดที่อุณหภูมิหนึ่งร้อยองศาน้ำเดือด",
    "Hindi": "नमस्ते दुनिया नमस्ते दुनिया",
    "Arabic, right to left": "مرحبا بالعالم \u200fمرحبا بالعالم",
    "Hebrew with marks": "שָׁלוֹם עולם שָׁלוֹם עולם",
    "emoji of several code points": "😀👩‍👩‍👧 of the 😀👩‍👩‍👧",
    "no characters at all": "\x00\x01\ufffd\U0010ffff",
    "base64": "QUJDRA" * 40,
    "a very long word": "of" * 3000,
    "blanks": " \t\n" * 50,
    "marks of the template": "<|endoftext|> is the <|end|> is the <|user|>",
    "digits": "due to 42 of the 4,200 ٤٢ of the",
}


@cache
def corpus():
    return [" ".join(TEXTS.values())] * 3


def trained(model, trainer, pre=None, decoder=None, normalizer=None):
    "A tokenizer of another kind than the bundled one, trained on the texts above."
    t = Tokenizer(model)
    for part, value in dict(pre_tokenizer=pre, decoder=decoder, normalizer=normalizer).items():
        if value:
            setattr(t, part, value)
    t.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=t, unk_token="[UNK]", pad_token="[UNK]")


KINDS = {
    "bundled": tokenizer,
    "wordpiece, as BERT": lambda: trained(
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"]),
        pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece(),
        normalizers.BertNormalizer(),
    ),
    "unigram, as SentencePiece": lambda: trained(
        models.Unigram(),
        trainers.UnigramTrainer(vocab_size=300, special_tokens=["[UNK]"], unk_token="[UNK]"),
        pre_tokenizers.Metaspace(),
        decoders.Metaspace(),
    ),
    "byte-level, no splitting at spaces": lambda: trained(
        models.BPE(),
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=["[UNK]"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        decoders.ByteLevel(),
    ),
}
relaxed = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@cache
def vocab(kind, segmentation):
    "The default phrases and phrases of the texts above"
    tok = KINDS[kind]()
    v = SimpleAdaptiVocab(tok, segmentation=segmentation)
    mined = SimpleAdaptiVocab(tok, []).fit(corpus(), n_new=80).table.pieces
    v.table = PhraseTable(dict.fromkeys(v.table.pieces + mined), v.base)
    return v


def check(v, text):
    ids, base = v.encode(text), v.tokenizer.encode(text)
    assert v.unfold(ids) == base and v.decode(ids) == v.tokenizer.decode(base) and len(ids) <= len(base)
    spans = v(text, return_offsets_mapping=True)["offset_mapping"]
    assert len(spans) == len(ids) and all(0 <= a <= e <= len(text) for a, e in spans)


@pytest.mark.parametrize("segmentation", ("optimal", "greedy"))
@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_all_kinds(kind, segmentation):
    v = vocab(kind, segmentation)
    for text in TEXTS.values():
        check(v, text)
    assert v([*TEXTS.values()])["input_ids"] == [v.encode(t) for t in TEXTS.values()]
    assert v.batch_decode([v.encode(t) for t in TEXTS.values()]) == [
        v.tokenizer.decode(v.tokenizer.encode(t)) for t in TEXTS.values()
    ]


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(max_size=80))
@relaxed
def test_any_text(kind, text):
    check(vocab(kind, "optimal"), text)


@pytest.mark.parametrize("name", ["Chinese", "Thai", "Hindi", "Arabic, right to left", "CRLF", "combining marks"])
def test_phrases_are_found_in_every_script(name):
    "What repeats is worth a token, spaces or not."
    v = SimpleAdaptiVocab(tokenizer(), []).fit([TEXTS[name]] * 2, n_new=20)
    base = v.tokenizer.encode(TEXTS[name])
    assert len(v.encode(TEXTS[name])) <= 0.7 * len(base) and v.decode(v.encode(TEXTS[name])) == v.tokenizer.decode(base)


@pytest.mark.filterwarnings("ignore:the text holds bytes")
def test_lone_surrogates_are_read_as_the_replacement_character():
    "Text from a file with bytes that are no UTF-8; every way in takes it."
    v, bad, clean = SimpleAdaptiVocab(tokenizer()), "of the \ud800 of the", "of the \ufffd of the"
    assert v.encode(bad) == v.encode(clean) and v(bad)["input_ids"] == v.encode(clean)
    chats = [v.apply_chat_template([dict(role="user", content=t)], return_dict=False) for t in (bad, clean)]
    assert chats[0] == chats[1]
    assert SimpleAdaptiVocab(tokenizer(), [bad]).phrases == SimpleAdaptiVocab(tokenizer(), [clean]).phrases
    assert v.fit([bad] * 3, n_new=5).phrases == v.fit([clean] * 3, n_new=5).phrases


@pytest.mark.parametrize("kind", KINDS)
def test_phrases_keep_clear_of_digits_and_special_tokens(kind):
    v = vocab(kind, "optimal")
    special = {*v.tokenizer.all_special_ids, *v.tokenizer.added_tokens_decoder}
    assert v.phrases and not any(c.isdecimal() for p in v.phrases for c in p)
    assert not any(special & {*p} for p in v.table.pieces)
    assert v.base > max(i for p in v.table.pieces for i in p) and len(v) == v.base + len(v.phrases)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokenizer_is_not_changed(kind):
    tok = KINDS[kind]()
    before = tok.backend_tokenizer.to_str()
    v = SimpleAdaptiVocab(tok).fit(["of the of the"] * 3, n_new=5)
    v(["of the", ""], padding="max_length", max_length=9, truncation=True, return_tensors="pt")
    assert tok.backend_tokenizer.to_str() == before


def test_one_id_is_decoded_in_whatever_form_it_comes():
    v = SimpleAdaptiVocab(tokenizer())
    ids = v.encode("machine learning")
    want = v.decode(ids)
    for form in (tuple(ids), np.array(ids), torch.tensor(ids)):
        assert v.decode(form) == want
    for one in (ids[0], np.int64(ids[0]), torch.tensor(ids[0])):
        assert v.decode(one) == v.decode(ids[:1])
    assert v.decode([]) == ""


@pytest.mark.parametrize("wrong", [None, 5, b"text", ["a", None], ["a", 3], {"a": 1}])
def test_what_is_no_text_is_refused(wrong):
    v = SimpleAdaptiVocab(tokenizer())
    for call in (v, v.encode):
        with pytest.raises(ConfigError, match="text"):
            call(wrong)
    with pytest.raises(ConfigError, match="text"):
        v.fit([wrong])


@pytest.mark.parametrize(
    "numbers", [dict(n_new=-1), dict(n_new=2.5), dict(max_len=1), dict(min_count=1), dict(n_new="9")]
)
def test_fit_refuses_numbers_that_cannot_be(numbers):
    with pytest.raises(ConfigError, match=next(iter(numbers))):
        SimpleAdaptiVocab(tokenizer()).fit(["a"], **numbers)


def test_fit_takes_integers_of_numpy():
    v = SimpleAdaptiVocab(tokenizer()).fit(["of the sea and of the sky"] * 3, n_new=np.int64(3), max_len=np.int32(4))
    assert v.phrases and max(len(p) for p in v.table.pieces) <= 4


@pytest.mark.parametrize(
    "arguments",
    [
        dict(return_tensors="pt"),  # rows of different lengths
        dict(padding="sometimes"),
        dict(return_tensors="jx", padding=True),
        dict(truncation=True, max_length=-1),
        dict(truncation=True, max_length=2.5),
    ],
)
def test_batches_that_cannot_be_are_refused(arguments):
    with pytest.raises(ConfigError):
        SimpleAdaptiVocab(tokenizer())(["of", "of the sea"], **arguments)


def test_padding_without_a_padding_token_is_refused():
    tok = tokenizer()
    tok.pad_token = None
    with pytest.raises(ConfigError, match="padding"):
        SimpleAdaptiVocab(tok)(["of", "of the sea"], padding=True)


def test_truncation_keeps_special_tokens_on_either_side():
    "A tokenizer that puts a token before and after each text keeps both, however little room there is."
    tok = tokenizer()
    front, back = tok.convert_tokens_to_ids(["<|user|>", "<|end|>"])
    around = processors.TemplateProcessing(
        "<|user|> $A <|end|>", special_tokens=[("<|user|>", front), ("<|end|>", back)]
    )
    tok.backend_tokenizer.post_processor = around
    v, text = SimpleAdaptiVocab(tok), "machine learning is a part of computer science"
    whole = v.encode(text)
    assert whole[0] == front and whole[-1] == back
    for side, middle in (("right", whole[1:3]), ("left", whole[-3:-1])):
        tok.truncation_side = side
        assert v(text, truncation=True, max_length=4)["input_ids"] == [front, *middle, back]
    assert v(text, truncation=True, max_length=1)["input_ids"] == [front]
    assert v(text, truncation=True, max_length=0)["input_ids"] == []
    assert v(text, truncation=True, max_length=99)["input_ids"] == whole


def test_padding_on_the_left():
    v, texts = SimpleAdaptiVocab(tokenizer()), ["machine learning is a part of it", "Why?", ""]
    v.tokenizer.padding_side = "left"
    b = v(texts, padding=True, return_offsets_mapping=True)
    for text, ids, mask, spans in zip(texts, b["input_ids"], b["attention_mask"], b["offset_mapping"]):
        n = sum(mask)
        assert ids[len(ids) - n :] == v.encode(text) and spans[: len(ids) - n] == [(0, 0)] * (len(ids) - n)


class Words(dict):
    "A mapping of words to ids is no tokenizer."


class SlowTokenizer:
    all_special_ids, added_tokens_decoder, is_fast = [], {}, False

    def get_vocab(self):
        return {}

    def decode(self, ids):
        return ""

    def __call__(self, text):
        return {}


def test_tokenizers_that_cannot_be_wrapped_are_refused_by_name():
    with pytest.raises(ConfigError, match="Words cannot be wrapped: it has no __call__, decode"):
        SimpleAdaptiVocab(Words())
    with pytest.raises(ConfigError, match="NoneType cannot be wrapped"):
        SimpleAdaptiVocab(None)
    with pytest.raises(UnsupportedModelError, match="SlowTokenizer cannot be wrapped: it is not a fast"):
        SimpleAdaptiVocab(SlowTokenizer())
    with pytest.raises(ConfigError, match="segmentation"):
        SimpleAdaptiVocab(tokenizer(), segmentation="dp")


@pytest.mark.parametrize(
    "template", [None, "{{ raise_exception('no') }}", "{{ messages[0].missing.deeper }}", "{% for %}"]
)
def test_templates_that_fail_are_one_line(template):
    tok = tokenizer()
    tok.chat_template = template
    with pytest.raises(ConfigError, match="chat template"):
        SimpleAdaptiVocab(tok).apply_chat_template([dict(role="user", content="of the")])
    with pytest.raises(ConfigError, match="padding is not for chats"):
        SimpleAdaptiVocab(tok).apply_chat_template([], padding=True)
