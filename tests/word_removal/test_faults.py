"Inputs that used to fail, by kind: text of any script and any origin, parameters of any type, texts of any length."

import re
import sys
import tracemalloc

import numpy as np
import pytest

from helpers import tokenizer
from llmopt.errors import BudgetError, ConfigError
from llmopt.word_removal import (
    Statistics,
    WordRemovalConfig,
    compress,
    protected_spans,
    remove_every_nth_word_advanced,
    segments,
    token_counter,
    trailing_question,
)
from llmopt.word_removal.text import LINE_BREAK

TOK = tokenizer()
THAI = "น้ำเดือดที่อุณหภูมิหนึ่งร้อยองศาเซลเซียสที่ระดับน้ำทะเล"
RUNS = {
    "Thai": THAI,
    "Khmer": "ទឹកពុះនៅសីតុណ្ហភាពមួយរយអង្សាសេ",
    "Burmese": "ရေသည်အပူချိန်တစ်ရာဒီဂရီတွင်ဆူပွက်သည်",
    "Lao": "ນ້ຳຟົດທີ່ອຸນຫະພູມໜຶ່ງຮ້ອຍອົງສາ",
    "base64": "QUJDRA" * 40,
    "one letter": "x" * 3000,
    "combining marks": "e\u0301\u0302" * 200,
}
ODD = [
    "東京は2024年に、カメラを売る。本当ですか？",
    "한국어는 띄어쓰기를 합니다. 그래서 괜찮습니다.",
    "مرحبا بالعالم الجميل جدا، كيف حالك اليوم؟ أنا بخير.",
    "שלום לכל העולם הזה, מה שלומך היום?",
    "कृपया इसे हिन्दी में अनुवाद करें। यह बहुत अच्छा है।",
    "Ở Việt Nam, mọi người nói tiếng Việt và ăn phở.",
    "ฉันไม่ชอบกินผัก " * 10,
    "👩‍👩‍👧‍👦 " * 20,
    "\ufeffHello there my friend of old times",
    "\u200f\u202bright to left\u202c and back \u2067again\u2069",
    "one\u2028two three\u2029four\x85five\x0bsix\x0cseven\x1ceight nine",
    "\u200b\u200b \ufeff",
    "a\ud800 b c d \udfff\udfff e",
    "\x00 \x01 null and void",
]


def used_or_said(c, slack=8):
    "Is the budget kept, and used but for a few tokens or a warning?"
    return c.tokens_after <= c.target and (c.target - c.tokens_after <= max(slack, c.target // 10) or c.warnings)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_run_without_spaces_is_kept_or_the_warning_names_it(run):
    text = f"Please look at {run} and tell me in a few plain words of English what you think that it is good for."
    for rate in (0.1, 0.3, 0.5, 0.7, 0.95):
        for scorer in ("coverage", "sentences", "every_nth", "random"):
            c = compress(text, rate, tokenizer=TOK, scorer=scorer, protect=())
            assert used_or_said(c), (rate, scorer, c)
            assert run in c.text or any(run[:20] in w for w in c.warnings), (rate, scorer)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_an_engine_sends_the_text_whole_rather_than_without_the_run(run):
    c = WordRemovalConfig(rate=0.3).apply(f"Please translate {run} into English", TOK)
    assert run in c.text and c.warnings[0].startswith("sent whole")
    c = WordRemovalConfig(n=3).apply(f"Please translate {run} into English", TOK)  # what was asked for
    assert run not in c.text and run[:20] in c.warnings[0]


@pytest.mark.parametrize("text", ODD)
def test_odd_texts_keep_their_budgets(text):
    readable = re.sub("[\ud800-\udfff]", "\ufffd", text)
    count = token_counter(TOK)
    for rate in (0.2, 0.5, 0.8):
        c = compress(text, rate, tokenizer=TOK, protect=())
        assert used_or_said(c, 12) and c.tokens_after == count(c.text) and c.source == readable
        assert "".join(segments(c.source)) == c.source
    assert compress(text, 1.0, tokenizer=TOK).text == readable


def test_lone_surrogates_are_replaced_and_counted():
    c = compress("a\ud800 b \udfff\udfff", 0.9, tokenizer=TOK)
    assert c.warnings[0].startswith("lone surrogates") and "3" in c.warnings[0]
    assert TOK(c.text)["input_ids"]
    assert WordRemovalConfig().apply("a \ud800 b c d e", TOK).warnings


@pytest.mark.parametrize("end", ["\r\n", "\r", "\x85", "\u2028", "\x0b", "\x0c"])
def test_all_line_ends_are_equal(end):
    "What is protected, where sentences and paragraphs end, and what stays of blank lines."
    text = "Explain:\n```python\nx = 1\n```\nI would like to know.\n| a | b |\n|---|---|\na\tb\tc\n"
    other = text.replace("\n", end)
    spans = [text[a:b].replace("\n", end) for a, b in protected_spans(text, "code tables")]
    assert [other[a:b] for a, b in protected_spans(other, "code tables")] == spans and len(spans) == 4
    lines = "The first line is here\n\n\n\nThe second is there\nand the third\n\nWhat is the fourth?"
    plain, odd = (compress(t, 0.6, scorer="coverage") for t in (lines, lines.replace("\n", end)))
    assert LINE_BREAK.sub("\n", odd.text) == plain.text and odd.kept == plain.kept
    assert trailing_question(lines.replace("\n", end)) == "What is the fourth?"
    assert LINE_BREAK.sub("\n", remove_every_nth_word_advanced(lines.replace("\n", end))) == (
        remove_every_nth_word_advanced(lines)
    )


def test_a_byte_order_mark_hides_nothing():
    assert protected_spans("\ufeff```\nx\n```\n", "code") == ((1, 10),)
    assert trailing_question("\ufeffRain fell.\n\nWhat fell?\ufeff") == "What fell?"


@pytest.mark.parametrize(
    "question", ["¿Qué cayó?", "何が降った？", "ماذا سقط؟", "(What fell?)", "“What fell?”", "What?!?"]
)
def test_questions_of_any_script_are_found(question):
    assert trailing_question(f"Some text stands here.\n\n{question}\n") == question


def test_the_default_is_what_measures_best():
    "Whole sentences where there is a question, given or at the end; coverage elsewhere; every n-th without a budget."
    text = "Bees fly a lot in summer. Bees dance to tell other bees where flowers are. Flowers smell of honey."
    assert compress(text, 0.5).scorer == "coverage"
    assert compress(text, 0.5, question="Why do bees dance?").scorer == "sentences"
    assert compress(f"{text}\n\nWhy do bees dance?", 0.7).scorer == "sentences"
    assert compress(f"{text}\n\nWhy do bees dance?", 0.7, question="").scorer == "coverage"
    assert WordRemovalConfig(rate=0.7).apply(f"{text}\n\nWhy do bees dance?").scorer == "sentences"
    assert WordRemovalConfig(rate=0.7).apply(text).scorer == "coverage"
    assert WordRemovalConfig(n=2).apply(text).text == remove_every_nth_word_advanced(text, 2)


@pytest.mark.parametrize("kind", [np.int8, np.int32, np.int64, np.uint16])
def test_numpy_numbers_are_numbers(kind):
    assert compress("a b c d", target_tokens=kind(2)) == compress("a b c d", target_tokens=2)
    assert remove_every_nth_word_advanced("a b c d", kind(2)) == "a c"
    config = WordRemovalConfig(target_tokens=kind(9), seed=kind(1))
    assert config == WordRemovalConfig(target_tokens=9, seed=1) and type(config.target_tokens) is int
    assert compress("a b c d", rate=np.float32(0.5)).tokens_after == 2


BAD = [
    dict(rate=0),
    dict(rate=-1),
    dict(rate=1.1),
    dict(rate=float("nan")),
    dict(rate="0.5"),
    dict(rate=True),
    dict(rate=None),
    dict(rate=None, target_tokens=0),
    dict(rate=None, target_tokens=2.5),
    dict(rate=None, target_tokens="7"),
    dict(target_tokens=3),
    dict(protect="re:("),
    dict(protect="re:*"),
    dict(protect=5),
    dict(protect=[None]),
    dict(protect=re.compile(b"x")),
    dict(protect="nubmers"),
    dict(scorer="best"),
    dict(scorer=5),
    dict(scorer=["coverage"]),
]


ODD_TYPES = [dict(tokenizer=5), dict(question=5), dict(statistics=4), dict(seed="a"), dict(scorer=lambda p: [1])]


@pytest.mark.parametrize("bad", [*BAD, *ODD_TYPES])
def test_bad_parameters_of_compress_are_one_line(bad):
    with pytest.raises(ConfigError) as e:
        compress("In 1905, 3 of 4 men paid.", **{"rate": 0.5} | bad)
    assert "\n" not in str(e.value)


MORE_BAD = [dict(n=1), dict(n=2.5), dict(n="3"), dict(n=True), dict(seed="a"), dict(seed=None), dict(scorer=len)]


@pytest.mark.parametrize("bad", [*BAD, *MORE_BAD, dict(n=2), dict(protect=["re:a b", "names"])])
def test_bad_parameters_of_the_configuration_are_one_line(bad):
    if bad == dict(rate=None):
        return
    with pytest.raises(ConfigError) as e:
        WordRemovalConfig(**{"rate": 0.5} | bad)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("no_text", [None, 5, b"bytes", ["a"]])
def test_what_is_no_text_is_refused(no_text):
    calls = [
        lambda t: compress(t, 0.5),
        remove_every_nth_word_advanced,
        WordRemovalConfig().apply,
        WordRemovalConfig(rate=0.5).apply,
        WordRemovalConfig().apply_to_turn,
    ]
    for call in calls:
        with pytest.raises(ConfigError, match="must be a string"):
            call(no_text)


@pytest.mark.parametrize("d", [None, 5, {"speed": 3}, {1: 2}, {"n": "x"}])
def test_bad_configurations_as_json_are_refused(d):
    with pytest.raises(ConfigError):
        WordRemovalConfig.from_dict(d)


@pytest.mark.parametrize("text", ["[]", "{}", '{"documents": 1}', '{"vocabulary": 3}', "[" * 100_000, "\x00"])
def test_damaged_statistics_are_refused(tmp_path, text):
    path = tmp_path / "s.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="fit_statistics"):
        Statistics.load(path)
    with pytest.raises(ConfigError, match="cannot write"):
        Statistics(0, 0, {}, {}, {}).save(tmp_path / "none" / "s.json")


def test_an_impossible_budget_sends_the_text_whole():
    text = "In 1905, 3 of 4 men paid 17 pounds to Anna Weber of York."
    with pytest.raises(BudgetError):
        compress(text, target_tokens=2)
    for call in (WordRemovalConfig(target_tokens=2).apply, WordRemovalConfig(target_tokens=2).apply_to_turn):
        c = call(text * 5)
        assert c.text == text * 5 and all(c.kept) and c.rate == 1 and c.warnings[0].startswith("sent whole")


PASSAGE = "The heart is a strong muscle that pumps blood through the body. It beats all day and all night. " * 4
SHORT = ["What is my name?", "Why?", "Thanks!", "Translate: I do not like it.", "你叫什么名字？", ""]
ASKED = ["What is my name?", "Summarize the text.", "¿Cómo me llamo?"]
CONFIGS = [*map(WordRemovalConfig.from_dict, [{}, {"n": 2}, {"rate": 0.3}, {"target_tokens": 60}])]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_short_turns_are_never_shortened(config):
    for turn in SHORT:
        assert config.apply_to_turn(turn, TOK).text == turn


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("asked", ASKED)
def test_what_a_turn_asks_stays_and_its_passage_is_shortened(config, asked):
    count = token_counter(TOK)
    for turn in (f"{PASSAGE}\n\n{asked}", f"{asked}\n\n{PASSAGE}", f"{asked} {PASSAGE}", f"{PASSAGE}{asked}"):
        c = config.apply_to_turn(turn, TOK)
        assert asked in c.text and c.tokens_after == count(c.text) < 0.8 * c.tokens_before == 0.8 * count(turn)
        assert len(c.kept) == len(c.spans) and turn.startswith(c.source)
        if config.target_tokens:
            assert c.tokens_after <= 60


class CountingTokenizer:
    "The bundled tokenizer; it counts the characters that it reads, and the most it was given at once."

    def __init__(self):
        self.read = self.most = 0

    def __call__(self, text, **kw):
        texts = [text] if isinstance(text, str) else text
        self.read += sum(map(len, texts))
        self.most = max(self.most, *map(len, texts))
        return TOK(text, **kw)


def operations(function):
    "Calls of Python and C functions while `function` runs."
    n = 0

    def profile(frame, event, arg):
        nonlocal n
        n += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return n


GROWING = {
    "prose": 'The sea was calm on the 3rd of May, and Maria did not sail; she read "Emma" at home.\n',
    "Chinese": "我今天很高兴地去公园了。你呢？",
    "Japanese": "東京は2024年に、カメラを売る。",
    "combining marks": "cafe\u0301 nai\u0308ve a\u0301\u0302\u0303. ",
    "Thai": "ฉันไม่ชอบกินผัก ",
    "questions": "Who is there?\n\n",
    "protected": "`a b` 12 of NASA, ",
    "empty lines": "\r\n \r\n",
    "punctuation": "(“!?” ",
    "one letter": "x",
    "Tibetan": "བོད་ཀྱི་སྐད། ",
    "joined emoji": "👩\u200d👧",
    "tabs": "a\tb\t\n",
    "addresses": "https://a.org/b?c=1 ",
    "NUL": "a\x00 ",
    "code": "if x > 0: return [y] ",
}


@pytest.mark.parametrize("unit", GROWING.values(), ids=GROWING)
def test_twice_the_text_is_at_most_twice_the_work(unit):
    """Function calls, and characters that the tokenizer reads, at n and at 4n: that is twice doubled, so that one text
    more or less which the search counts does not matter."""
    work = []
    for n in (4_000, 16_000):
        text, tok = unit * (n // len(unit)), CountingTokenizer()

        def everything(text=text, tok=tok):
            for config in (WordRemovalConfig(n=3), WordRemovalConfig("coverage", rate=0.5, protect="code")):
                config.apply(text, tok)
            protected_spans(text)
            trailing_question(text)

        work.append((operations(everything), tok.read))
    for small, large in zip(*work, strict=True):
        assert large <= 2.3**2 * small


def test_memory_is_a_small_multiple_of_the_text():
    "Memory of Python at its highest, for each byte of Chinese: the same at n and 2n."
    peaks = []
    for n in (500, 1000):
        text = GROWING["Chinese"] * n
        tracemalloc.start()
        compress(text, 0.5, tokenizer=TOK)
        peaks.append(tracemalloc.get_traced_memory()[1] / len(text.encode()))
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0] and peaks[1] < 150


@pytest.mark.parametrize(
    "unit", ["The sea was calm; Maria slept.\n", "我今天去公园了。", "cafe\u0301 de\u0301ja\u0300 "]
)
def test_a_text_counted_in_pieces_has_the_tokens_of_the_whole(unit):
    text, tok = unit * (130_000 // len(unit)), CountingTokenizer()
    assert token_counter(tok)(text) == len(TOK.backend_tokenizer.encode(text, add_special_tokens=False).ids)
    assert tok.most < 40_000  # it never sees all at once
    assert token_counter(TOK)("x" * 60_000) == len(TOK("x" * 60_000, add_special_tokens=False)["input_ids"])
