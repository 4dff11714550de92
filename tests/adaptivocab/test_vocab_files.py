"Files of phrases and of trained rows: what was saved comes back, and what is damaged or foreign is one line."

import json
import os
from dataclasses import asdict

import pytest
import torch

from helpers import small_model, tiny, tokenizer
from llmopt.adaptivocab import PhraseReader, PhraseSet, SimpleAdaptiVocab, VocabConfig, load_rows, save_rows
from llmopt.core import load
from llmopt.errors import ConfigError


@pytest.fixture
def saved(tmp_path):
    "A vocabulary and the file it was saved to"
    v = SimpleAdaptiVocab(tokenizer(), segmentation="greedy").fit(["of the sea and of the sky"] * 3, n_new=9)
    v.save(tmp_path / "p.json")
    return v, tmp_path / "p.json"


def test_what_was_saved_is_what_is_loaded(saved):
    v, path = saved
    w = SimpleAdaptiVocab.load(path, tokenizer())
    assert w.phrase_set() == v.phrase_set() and w.segmentation == "greedy"
    assert w.encode("of the sea") == v.encode("of the sea")
    assert PhraseSet.read(str(path)) == v.phrase_set()


DAMAGE = {
    "format": lambda d: d.pop("format"),
    "another format": lambda d: d.update(format="llmopt phrases 9"),
    "vocabulary": lambda d: d.pop("vocabulary"),
    "another vocabulary": lambda d: d.update(vocabulary="0" * 16),
    "vocabulary of another type": lambda d: d.update(vocabulary=[1]),
    "no phrases": lambda d: d.pop("phrases"),
    "phrases are null": lambda d: d.update(phrases=None),
    "phrases are a text": lambda d: d.update(phrases="of the"),
    "phrases are an object": lambda d: d.update(phrases=dict(a=1)),
    "a phrase without ids": lambda d: d["phrases"].append(dict(text="of")),
    "a phrase is null": lambda d: d["phrases"].append(None),
    "ids are a text": lambda d: d["phrases"][0].update(ids="12"),
    "ids are texts": lambda d: d["phrases"][0].update(ids=["1", "2"]),
    "ids are fractions": lambda d: d["phrases"][0].update(ids=[1.5, 2.0]),
    "ids are lists": lambda d: d["phrases"][0].update(ids=[[1], [2]]),
    "one id": lambda d: d["phrases"][0].update(ids=[5]),
    "negative": lambda d: d["phrases"][0].update(ids=[-1, 5]),
    "out of range": lambda d: d["phrases"][0].update(ids=[5, 10**6]),
    "far out of range": lambda d: d["phrases"][0].update(ids=[5, 10**30]),
    "twice": lambda d: d["phrases"].append(d["phrases"][0]),
    "special tokens": lambda d: d["phrases"][0].update(ids=[0, 3]),
    "segmentation": lambda d: d.update(segmentation="dp"),
    "segmentation of another type": lambda d: d.update(segmentation={}),
    "no segmentation": lambda d: d.pop("segmentation"),
    "base": lambda d: d.update(base=7),
    "base is a text": lambda d: d.update(base="4096"),
    "base is negative": lambda d: d.update(base=-4096),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused(saved, damage):
    d = json.loads(saved[1].read_text(encoding="utf-8"))
    DAMAGE[damage](d)
    saved[1].write_text(json.dumps(d), encoding="utf-8")
    with pytest.raises(ConfigError) as e:
        SimpleAdaptiVocab.load(saved[1], tokenizer())
    assert "p.json" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"null", b"\xff\xfe\x00", b"[" * 100_000, b'{"base": ' + b"9" * 5000 + b"}", b"\x00"]
)
def test_what_is_no_such_file_is_refused(tmp_path, content):
    (tmp_path / "p.json").write_bytes(content)
    with pytest.raises(ConfigError, match="p.json"):
        SimpleAdaptiVocab.load(tmp_path / "p.json", tokenizer())


def test_every_cut_of_a_file_is_refused(saved):
    text = saved[1].read_bytes()
    for n in range(0, len(text), 17):
        saved[1].write_bytes(text[:n])
        with pytest.raises(ConfigError):
            PhraseSet.read(saved[1])


@pytest.mark.parametrize("path", ["none.json", ".", "a\0b", 5, None, "x" * 5000])
def test_places_that_hold_no_file_are_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError):
        SimpleAdaptiVocab.load(path, tokenizer())


def test_a_vocabulary_of_another_tokenizer_is_refused(saved):
    other = tokenizer()
    other.add_tokens(["one_more"])
    for call in (
        lambda: SimpleAdaptiVocab.load(saved[1], other),
        lambda: SimpleAdaptiVocab.from_phrase_set(saved[0].phrase_set(), other),
        lambda: VocabConfig(saved[1]).vocab(other),
        lambda: VocabConfig(saved[0]).vocab(other),
    ):
        with pytest.raises(ConfigError, match="another tokenizer"):
            call()


@pytest.mark.parametrize("place", ["none/p.json", ".", "a\0b", 5])
def test_saving_to_an_impossible_place_is_one_line(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="cannot write phrases"):
        SimpleAdaptiVocab(tokenizer()).save(place)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_is_one_line():
    with pytest.raises(ConfigError, match="No space left"):
        SimpleAdaptiVocab(tokenizer()).save("/dev/full")


@pytest.fixture
def trained(tmp_path):
    "Vectors of two phrases, their reader, and the folder they were saved to"
    lm = load("llmopt-tiny", "cpu")
    r = PhraseReader(lm.model, SimpleAdaptiVocab(lm.tokenizer, ["machine learning", "United States"]))
    rows = torch.randn(len(r.vocab.table), 256, generator=torch.Generator().manual_seed(0))
    save_rows(rows, r, tmp_path / "rows")
    return rows, r, tmp_path / "rows"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_load_for_the_same_model_in_every_number_format(trained, dtype):
    "Rows trained in float32 are those of the same weights rounded to 16 bits, by either way of rounding."
    rows, r, folder = trained
    half = load("llmopt-tiny", "cpu", dtype)
    assert torch.equal(load_rows(folder, PhraseReader(half.model, r.vocab)), rows)
    assert torch.equal(load_rows(folder, PhraseReader(r.model.to(getattr(torch, dtype)), r.vocab)), rows)


def test_rows_trained_in_half_precision_load_in_full(trained, tmp_path):
    rows, r, _ = trained
    half = load("llmopt-tiny", "cpu", "float16")
    save_rows(rows.half(), PhraseReader(half.model, r.vocab), tmp_path / "half")
    assert torch.equal(load_rows(tmp_path / "half", r), rows.half())


def change_one_weight(model):
    model.model.layers[2].mlp.up_proj.weight.data[3, 5] += 1e-3


def swap_two_weights(model):
    w = model.model.layers[1].self_attn.q_proj.weight.data
    w[[0, 1]] = w[[1, 0]].clone()


@pytest.mark.parametrize("change", [change_one_weight, swap_two_weights])
def test_rows_are_refused_for_a_model_that_differs_in_one_place(trained, change):
    "Every weight counts, not a sample of them."
    _, r, folder = trained
    change(r.model)
    with pytest.raises(ConfigError, match="another model"):
        load_rows(folder, r)


def test_rows_of_another_model_or_table_are_refused(trained):
    _, r, folder = trained
    with pytest.raises(ConfigError, match="another model"):
        load_rows(folder, PhraseReader(small_model(), r.vocab))
    with pytest.raises(ConfigError, match="another table"):
        load_rows(folder, PhraseReader(r.model, SimpleAdaptiVocab(r.vocab.tokenizer)))


@pytest.mark.parametrize("name", ["rows.json", "rows.safetensors"])
@pytest.mark.parametrize("content", [b"", b"x", b"{}", b"[]", b"[" * 100_000, b"\xff" * 40])
def test_damaged_rows_are_refused(trained, name, content):
    _, r, folder = trained
    (folder / name).write_bytes(content)
    with pytest.raises(ConfigError, match="damaged"):
        load_rows(folder, r)


def test_places_that_hold_no_rows_are_refused(trained, tmp_path):
    _, r, folder = trained
    for place in (tmp_path, tmp_path / "none", "a\0b", folder / "rows.json"):
        with pytest.raises(ConfigError, match="rows"):
            load_rows(place, r)
    with pytest.raises(ConfigError, match="cannot write rows"):
        save_rows(torch.zeros(2, 3), r, folder / "rows.json" / "deeper")


def test_rows_that_do_not_fit_the_phrases_are_refused(trained):
    rows, r, _ = trained
    for wrong in (rows[:1], rows[:, :5]):
        with pytest.raises(ConfigError, match="do not fit"):
            PhraseReader(r.model, r.vocab, rows=wrong)


def test_a_configuration_is_json_by_content(saved):
    v, path = saved
    for config in (
        VocabConfig(),
        VocabConfig(str(path)),
        VocabConfig(path),
        VocabConfig(v),
        VocabConfig(v.phrase_set()),
    ):
        again = VocabConfig(**json.loads(json.dumps(asdict(config))))
        assert again == config and hash(again) == hash(config)
        assert again.reader(tiny()).vocab.phrase_set() == config.reader(tiny()).vocab.phrase_set()
    assert len({VocabConfig(v), VocabConfig(v.phrase_set()), VocabConfig(SimpleAdaptiVocab(tokenizer(), []))}) == 2


def test_a_configuration_takes_the_phrases_as_they_are_at_that_moment(saved):
    v, _ = saved
    config, before = VocabConfig(v), v.phrase_set()
    v.fit(["another thing and another thing"] * 3, n_new=3)
    assert config.phrases == before != v.phrase_set()


def test_segmentation_is_that_of_the_phrases_unless_it_is_named(saved):
    v, path = saved
    assert [VocabConfig(p).vocab(tokenizer()).segmentation for p in (None, v, path)] == ["optimal", "greedy", "greedy"]
    assert VocabConfig(v, segmentation="optimal").vocab(tokenizer()).segmentation == "optimal"


def test_the_content_hash_knows_what_the_files_hold(saved, trained):
    "The same name with other phrases in it is another vocabulary; the same phrases in a file or in memory are one."
    v, path = saved
    named, hashes = VocabConfig(path), [VocabConfig(path).content_hash()]
    assert VocabConfig(v).content_hash() == hashes[0]
    v.fit(["another thing and another thing"] * 3, n_new=3)
    v.save(path)
    hashes += [named.content_hash(), VocabConfig().content_hash(), VocabConfig(embed="mean").content_hash()]
    with_rows = VocabConfig(rows=trained[2])
    hashes.append(with_rows.content_hash())
    save_rows(trained[0] + 1, trained[1], trained[2])
    hashes.append(with_rows.content_hash())
    assert len({*hashes}) == len(hashes)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(embed="sum"),
        dict(embed=None),
        dict(positions="none"),
        dict(positions=[]),
        dict(ratio=0),
        dict(ratio=-1),
        dict(ratio=float("inf")),
        dict(ratio=float("nan")),
        dict(ratio="2"),
        dict(ratio=None),
        dict(segmentation="dp"),
        dict(segmentation=5),
        dict(phrases=5),
        dict(phrases=["of the"]),
        dict(phrases={}),
        dict(phrases=dict(vocabulary="a", base=4, pieces=[[1]])),
        dict(phrases=dict(vocabulary="a", base=4, pieces=[[1, 2]], more=1)),
        dict(rows=5),
    ],
)
def test_configurations_that_cannot_be_are_refused(wrong):
    with pytest.raises(ConfigError):
        VocabConfig(**wrong)
