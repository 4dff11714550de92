"Words, ROUGE and keywords in the scripts of the world; files of queries from every editor."

import json
import random

import pytest
from rouge_score.rouge_scorer import RougeScorer

from helpers import ODD_TEXTS
from llmopt.core import plain_text
from llmopt.errors import ConfigError
from llmopt.evaluation import as_queries, keyword_recall, read_queries, rouge_l, split_words
from llmopt.evaluation import text_metrics as T

SENTENCES = {
    "english": "It boils at 3.5 degrees, doesn't it?",
    "russian": "Вода кипит при ста градусах.",
    "greek": "Το νερό βράζει στους εκατό βαθμούς.",
    "arabic": "يغلي الماء عند مئة درجة مئوية.",
    "hebrew": "מים רותחים במאה מעלות.",
    "hindi": "पानी सौ डिग्री सेल्सियस पर उबलता है।",
    "bengali": "জল একশো ডিগ্রি সেলসিয়াসে ফোটে।",
    "tamil": "நீர் நூறு பாகையில் கொதிக்கிறது.",
    "korean": "물은 백 도에서 끓는다.",
    "chinese": "水在一百摄氏度沸腾。",
    "japanese": "水は百度で沸騰します。",
    "thai": "น้ำเดือดที่หนึ่งร้อยองศา",
    "khmer": "ទឹកពុះនៅមួយរយអង្សា",
    "tibetan": "ཆུ་བརྒྱ་ལ་ཁོལ།",
    "ethiopic": "ውሃ፡በመቶ፡ዲግሪ፡ይፈላል።",
    "javanese": "ꦧꦚꦸꦥꦤꦱ꧀",
    "yi": "ꀀꁂꃄꄆꅈ",
    "emoji": "👍🏽 👎 ☔",
}


@pytest.mark.parametrize("script", SENTENCES)
def test_an_answer_equals_itself_and_no_other(script):
    "ROUGE-L is 1 with itself, and lower with what has fewer words or other ones."
    text = SENTENCES[script]
    assert rouge_l(text, text) == 1
    words = split_words(text)
    assert words and rouge_l(" ".join(words[: len(words) // 2]), text) < 1
    assert all(
        rouge_l(text, other) == 0 for name, other in SENTENCES.items() if name not in (script, "chinese", "japanese")
    )


@pytest.mark.filterwarnings("ignore:the text holds bytes")
@pytest.mark.parametrize("text", ODD_TEXTS.values(), ids=ODD_TEXTS)
def test_an_odd_text_equals_itself_and_holds_its_words(text):
    text = plain_text(text)
    words = split_words(text)
    assert rouge_l(text, text) == (1 if words else None)
    assert keyword_recall(text, words[:20]) == (1 if words else None)


@pytest.mark.parametrize(
    "text, count",
    [
        (SENTENCES["russian"], 5),
        (SENTENCES["hindi"], 7),
        (SENTENCES["arabic"], 6),
        (SENTENCES["korean"], 4),
        (SENTENCES["chinese"], 9),
        ("C++, C# and node.js 3.5: state-of-the-art, 10% of the U.S. don't", 11),
        ("e\u0301te\u0301 été", 2),
        ("soft\u00adhyphen zero\u200bwidth", 2),
        ("1,000.5 1.000,5", 2),
        ("", 0),
        ("...!?", 0),
    ],
)
def test_words_are_counted_as_a_reader_would(text, count):
    assert len(split_words(text)) == count


@pytest.mark.parametrize(
    "text, keyword, found",
    [
        ("Use C++ or node.js, version 3.5.", "C++", True),
        ("Use C++ or node.js, version 3.5.", "node.js", True),
        ("Use C++ or node.js, version 3.5.", "3.5", True),
        ("Version 13.5 and 3.55", "3.5", False),
        ("Version 3.5", "5", False),
        ("It is state-of-the-art.", "state-of-the-art", True),
        ("It is state of the art.", "state-of-the-art", True),
        ("It is state-of-the-art.", "state of the art", True),
        ("10% of the U.S. don\u2019t know", "10%", True),
        ("10% of the U.S. don\u2019t know", "U.S.", True),
        ("10% of the U.S. don\u2019t know", "don't", True),
        ("Machine\nlearning", "machine learning", True),
        ("**machine** learning", "machine learning", True),
        ("Models", "model", True),
        ("remodel", "model", False),
        ("机器学习是人工智能的一个分支。", "人工智能", True),
        ("水は百度で沸騰します。", "沸騰", True),
        ("น้ำเดือดที่หนึ่งร้อยองศา", "เดือด", True),
        ("Вода кипит", "ВОДА", True),
        ("Наводнение", "вод", False),
        ("يشرب والماءَ", "ماء", True),
        ("بالماء", "الماء", True),
        ("पानी सौ डिग्री", "डिग्री", True),
        ("कि", "क", False),
        ("cafe\u0301", "café", True),
        ("ＡＩ", "ai", True),
        ("İstanbul", "istanbul", True),
        ("nothing", "???", False),
        ("我使用Python编程", "Python", True),
        ("使用C++编程", "C++", True),
        ("我有3.5个，不是13.5个", "3.5", True),
        ("塔は333mです", "333m", True),
        ("塔は1333mです", "333m", False),
        ("ฉันเขียนPythonทุกวัน", "python", True),
        ("저는Python을 씁니다", "Python", True),
        ("제3세대", "3", True),
        ("язык Pythonа", "python", True),
        ("vPython", "python", False),
        ("Việtnam", "tnam", False),
        ("pro\u0308gram", "gram", False),
        ("བོད་ཀྱི་སྐད་ཡིག", "སྐད", True),
        ("ሰላም፡ዓለም", "ዓለም", True),
    ],
)
def test_keywords_are_found_where_a_reader_finds_them(text, keyword, found):
    assert keyword_recall(text, [keyword]) == found


def test_keywords_without_letters_do_not_count():
    "Blank keywords ask for nothing; without any other there is no recall."
    assert keyword_recall("rain", ["rain", " ", ""]) == 1 and keyword_recall("rain", ["", "\u200b"]) is None


def test_rouge_is_that_of_the_reference_implementation():
    "On English without decimals and signs, for random pairs of texts."
    rng, scorer = random.Random(0), RougeScorer(["rougeL"], use_stemmer=True)
    pool = "the cats are running in state-of-the-art don't 3 learns,learning U.S. a_b_c (x) quickly".split()
    for _ in range(300):
        a, b = (" ".join(rng.choices(pool, k=rng.randrange(1, 20))) for _ in range(2))
        assert rouge_l(a, b) == pytest.approx(scorer.score(b, a)["rougeL"].fmeasure)


def test_a_common_subsequence_is_that_of_the_table():
    "The bits agree with the table of the textbook."
    rng = random.Random(0)
    for _ in range(200):
        a, b = ([rng.randrange(4) for _ in range(rng.randrange(9))] for _ in range(2))
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
        assert T.common_subsequence(a, b) == table[-1][-1]


def test_one_step_for_a_word():
    "Twice the text is twice the steps: the words of the answer are looked up once each."

    class Counted(list):
        steps = 0

        def __iter__(self):
            for x in super().__iter__():
                Counted.steps += 1
                yield x

    steps = []
    for n in (100, 200, 400):
        Counted.steps = 0
        T.common_subsequence(Counted(range(n)), Counted(range(n)))
        steps.append(Counted.steps)
    assert all(b <= 2.3 * a for a, b in zip(steps, steps[1:]))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    "text", ["plain", "one\u2028two", "one\x85two", "one\u2029two\x0b\x0c\x1c", "日本語", "a\tb\\n"]
)
def test_queries_come_back_as_they_were_written(tmp_path, text, encoding, end):
    "With every line end, byte order mark, and separators that are no line ends in JSON."
    lines = [json.dumps(dict(text=t), ensure_ascii=False) for t in (text, "next")]
    (tmp_path / "q.jsonl").write_text(end.join([*lines, ""]), encoding=encoding, newline="")
    assert [(q.id, q.text) for q in read_queries(tmp_path / "q.jsonl")] == [("q1", text), ("q2", "next")]


@pytest.mark.filterwarnings("ignore:the text holds bytes")
def test_bytes_that_are_no_text_are_replaced(tmp_path):
    "What a terminal in another encoding hands over, and lone surrogates in JSON."
    assert as_queries(["caf\udce9"])[0].text == "caf\ufffd"
    (tmp_path / "q.jsonl").write_text('{"text": "caf\\ud800", "id": "\\udfff", "keywords": ["a\\udc00"]}')
    assert read_queries(tmp_path / "q.jsonl")[0].text == "caf\ufffd"


@pytest.mark.parametrize(
    "line, says",
    [
        ("[" * 100_000, "line 1: not JSON"),
        ('{"text": "a", "n": ' + "7" * 5000 + "}", "line 1: not JSON"),
        ('{"text": 3}', 'an object with a "text"'),
        ('{"text": "a", "id": [1]}', '"id" must be'),
        ('{"text": "a", "keywords": [3]}', '"keywords" must be'),
    ],
)
def test_odd_lines_are_named(tmp_path, line, says):
    (tmp_path / "q.jsonl").write_text(line)
    with pytest.raises(ConfigError, match=says) as e:
        read_queries(tmp_path / "q.jsonl")
    assert "\n" not in str(e.value)


def test_what_is_no_query_is_refused(tmp_path):
    for queries, says in (([], "nothing to ask"), ([None], "query 1 is a NoneType"), (["a", 3], "query 2 is a int")):
        with pytest.raises(ConfigError, match=says):
            as_queries(queries)
    (tmp_path / "q.jsonl").write_bytes(b"\xff\xfe{")
    for path in (tmp_path / "q.jsonl", tmp_path, tmp_path / "none", "a\0b"):
        with pytest.raises(ConfigError, match="cannot read queries"):
            read_queries(path)
