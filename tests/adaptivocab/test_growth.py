"Twice the text costs at most 2.3 times the work: counted in operations, not seconds."

import random
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import llmopt.adaptivocab
from helpers import tokenizer
from llmopt.adaptivocab import SimpleAdaptiVocab

MOST = 2.3
PACKAGE = str(Path(llmopt.adaptivocab.__file__).parent)


def prose(n, rng):
    "Words of very different frequency, in sentences."
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 9))) for _ in range(2000)]
    weights = [1 / (i + 1) for i in range(len(words))]
    return " ".join(rng.choices(words, weights, k=n // 5))


TEXTS = {
    "prose": prose,
    "Chinese, no spaces": lambda n, rng: "".join(rng.choices("的一是在不了有和人这中大为上个国我以要他", k=n)),
    "combining marks": lambda n, rng: "".join("e" + "\u0301" * rng.randint(1, 4) for _ in range(n // 4)),
    "one letter": lambda n, rng: "a" * n,
    "one phrase": lambda n, rng: "machine learning " * (n // 17),
    "Tibetan": lambda n, rng: "".join(rng.choices(["བོད་", "ཀྱི་", "སྐད་", "ཡིག་", "ནི། "], k=n // 4)),
    "emoji": lambda n, rng: "".join(rng.choices("😀👩👧\u200d🏽", k=n)),
}


def work(call):
    "Lines of Python that `call` runs in the package, and elements of the arrays that its functions leave behind."
    done = 0

    def local(frame, event, arg):
        nonlocal done
        done += 1
        if event == "return":
            done += sum(x.size for x in frame.f_locals.values() if isinstance(x, np.ndarray))
        return local

    def trace(frame, event, arg):
        return local if frame.f_code.co_filename.startswith(PACKAGE) else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return done


def peak(call):
    "Most bytes that Python held at a time during `call`."
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def once_and_twice(kind, n):
    "A text of some `n` characters, and one twice as long"
    return [TEXTS[kind](k, random.Random(0)) for k in (n, 2 * n)]


@pytest.mark.parametrize("cost", [work, peak])
@pytest.mark.parametrize("segmentation", ("optimal", "greedy"))
@pytest.mark.parametrize("kind", TEXTS)
def test_encoding(kind, segmentation, cost):
    v = SimpleAdaptiVocab(tokenizer(), segmentation=segmentation)
    v.encode("of the")
    one, two = (cost(lambda t=t: v.encode(t)) for t in once_and_twice(kind, 8_000))
    assert one < two <= MOST * one


@pytest.mark.parametrize("n_new", [100, 100_000], ids=["few phrases", "all there are"])
@pytest.mark.parametrize("kind", TEXTS)
def test_fitting(kind, n_new):
    v = SimpleAdaptiVocab(tokenizer(), [])
    v.fit(["of the of the"], 5)
    fixed = work(lambda: v.fit([""], n_new))
    one, two = (work(lambda t=t: v.fit([t], n_new)) - fixed for t in once_and_twice(kind, 8_000))
    assert 0 < one < two <= MOST * one


def test_fitting_many_documents_is_as_one():
    "Documents are what grows when a corpus does."
    v, rng = SimpleAdaptiVocab(tokenizer(), []), random.Random(0)
    documents = [prose(400, rng) for _ in range(100)]
    fixed = work(lambda: v.fit([""], 100))
    one, two = (work(lambda d=d: v.fit(d, 100)) - fixed for d in (documents[:50], documents))
    assert two <= MOST * one


def test_a_megabyte_comes_back():
    v, rng = SimpleAdaptiVocab(tokenizer()), random.Random(0)
    words = [p.strip() for p in v.phrases] + ["zyx", "7", "and", "\n"]
    text = " ".join(rng.choices(words, k=1_100_000 * len(words) // sum(len(w) + 1 for w in words)))
    base = v.tokens([text])[0].tolist()
    f = v.fold(base)
    assert len(text) > 1e6 and len(f.ids) < 0.8 * len(base) and v.unfold(f.ids) == base
