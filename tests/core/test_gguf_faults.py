"A GGUF file that is no model, or not whole, or meets a full disk, is answered in one line and leaves nothing behind."

import os
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
from forked import Process

from helpers import logits, random_ids
from llmopt.core import gguf, load
from llmopt.core.cache import cache_dir
from llmopt.core.gguf import convert
from llmopt.core.inventory import conversions
from llmopt.errors import ModelError

from .gguf_files import TOKENS, random_model, write_gguf


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path / "cache"))


def refused(path, says):
    "`load` refuses `path` in one line that holds `says`, and nothing is kept."
    with pytest.raises(ModelError) as e:
        load(str(path), "cpu")
    assert says in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 500
    assert not [p for p in (cache_dir() / "gguf").glob("*") if p.suffix != ".lock"]


@pytest.mark.parametrize(
    "entries, says",
    [
        ({"general.type": "adapter"}, "LoRA adapter"),
        ({"adapter.type": "lora"}, "LoRA adapter"),
        ({"general.type": "mmproj"}, "image part"),
        ({"split.count": 3, "split.no": 0}, "part 1 of 3"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"llama.rope.scaling.type": "su", "llama.rope.scaling.factor": 4.0}, "rotary scaling 'su'"),
    ],
)
def test_files_that_are_no_whole_model(entries, says, tmp_path):
    write_gguf(tmp_path / "m.gguf", entries=entries)
    refused(tmp_path / "m.gguf", says)


@pytest.mark.parametrize("arch", ["bert", "mamba", "gpt2", "a-new-one"])
def test_architectures_that_do_not_convert(arch, tmp_path):
    write_gguf(tmp_path / "m.gguf", arch=arch)
    refused(tmp_path / "m.gguf", f"architecture '{arch}'")


def test_tensors_that_are_missing_or_too_many(tmp_path):
    write_gguf(tmp_path / "a.gguf", leave_out=["blk.1.ffn_up.weight"])
    refused(tmp_path / "a.gguf", "up_proj.weight is missing")
    write_gguf(tmp_path / "b.gguf", tensors={"blk.0.extra.weight": np.ones(4)})
    refused(tmp_path / "b.gguf", "blk.0.extra.weight has no place")
    write_gguf(tmp_path / "c.gguf", tensors={"output_norm.weight": np.ones(4)})
    refused(tmp_path / "c.gguf", "output_norm.weight has another shape")
    write_gguf(tmp_path / "d.gguf", tensors={"rope_freqs.weight": np.full(4, 7.0)})
    refused(tmp_path / "d.gguf", "rotary factors")


def test_a_vocabulary_without_weights(tmp_path):
    model = random_model()
    names = ["token_embd.weight", "output_norm.weight", "output.weight"]
    for i in range(2):
        leaves = "attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down attn_norm ffn_norm".split()
        names += [f"blk.{i}.{leaf}.weight" for leaf in leaves]
    write_gguf(tmp_path / "m.gguf", model, leave_out=names)
    refused(tmp_path / "m.gguf", "vocabulary and no weights")


def test_weights_without_a_vocabulary(tmp_path):
    write_gguf(tmp_path / "m.gguf", tokenizer=False)
    refused(tmp_path / "m.gguf", "holds no vocabulary")


def test_paths(tmp_path):
    "A folder named x.gguf, a file that is missing, and a link to one that is not."
    (tmp_path / "x.gguf").mkdir()
    refused(tmp_path / "x.gguf", "holds no config.json")
    refused(tmp_path / "none.gguf", "no file at")
    (tmp_path / "empty.gguf").touch()
    refused(tmp_path / "empty.gguf", "is empty")
    model = write_gguf(tmp_path / "m.gguf")
    (tmp_path / "link.gguf").symlink_to(tmp_path / "m.gguf")
    x = random_ids(9, len(TOKENS))
    same = logits(load(str(tmp_path / "link.gguf"), "cpu").model, x)
    assert (same - logits(model, x)).abs().max() < 1e-4
    load(str(tmp_path / "m.gguf"), "cpu")
    assert len(conversions()) == 1


def test_every_cut_is_found(tmp_path):
    "A file that is cut off anywhere is refused, never half read."
    write_gguf(tmp_path / "m.gguf", format="Q4_0")
    whole = (tmp_path / "m.gguf").read_bytes()
    end = len(whole) - 32  # padding behind the last tensor may be missing
    for n in [*range(1, 400, 13), *range(400, end, end // 40), end]:
        (tmp_path / "cut.gguf").write_bytes(whole[:n])
        refused(tmp_path / "cut.gguf", "fetch it again" if n < 4 else "GGUF")


def test_a_model_that_is_larger_than_the_memory(tmp_path, monkeypatch):
    "The header says so before anything is converted."
    write_gguf(tmp_path / "m.gguf")
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), dict(available=1000)))
    refused(tmp_path / "m.gguf", "of memory")
    with pytest.raises(ModelError, match="of memory"):
        load("llmopt-tiny", "cpu")


def test_a_full_disk(tmp_path, monkeypatch):
    "Found before the work where the disk says so, and in the middle of it where not."
    write_gguf(tmp_path / "m.gguf")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), dict(free=100)))
    refused(tmp_path / "m.gguf", "of disk")
    monkeypatch.undo()
    monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path / "cache"))

    def full(*args, **kw):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmopt.core.gguf.write_manifest", full)
    refused(tmp_path / "m.gguf", "No space left on device")


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    "The model loads all the same, and one warning says what to do."
    model = write_gguf(tmp_path / "m.gguf")
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path / "file" / "below"))
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter("always")
        lm = load(str(tmp_path / "m.gguf"), "cpu")
        load(str(tmp_path / "m.gguf"), "cpu")
    assert len([m for m in w if "LLMOPT_CACHE" in str(m.message)]) == 1
    x = random_ids(9, len(TOKENS))
    assert (logits(lm.model, x) - logits(model, x)).abs().max() < 1e-4


def test_a_conversion_that_is_damaged_later(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    lm = load(str(tmp_path / "m.gguf"), "cpu")
    digest, weights = lm.stored_hash, Path(lm.source, "model.safetensors")
    data = weights.read_bytes()
    for damaged in (data[:-8], data[:-1] + bytes([data[-1] ^ 1]), b""):
        weights.unlink()  # not in place: the model above maps the file
        weights.write_bytes(damaged)
        again = load(str(tmp_path / "m.gguf"), "cpu")
        assert weights.read_bytes() == data and again.stored_hash == digest
    Path(lm.source, "llmopt_conversion.json").write_text("{")
    assert load(str(tmp_path / "m.gguf"), "cpu").stored_hash == digest


def convert_there(path, cache, dies=False):
    "Convert in a process of its own, perhaps one that is killed before all is written."
    os.environ["LLMOPT_CACHE"] = cache
    if dies:
        gguf.write_manifest = lambda *a, **kw: os.kill(os.getpid(), signal.SIGKILL)
    gguf.convert(path)


def begin(path, **how):
    "Start `convert_there`."
    process = Process(target=convert_there, args=(path, os.environ["LLMOPT_CACHE"]), kwargs=how)
    process.start()
    return process


def test_two_processes_at_once(tmp_path):
    "Both get the model, and one conversion is kept."
    write_gguf(tmp_path / "m.gguf")
    processes = [begin(tmp_path / "m.gguf") for _ in range(2)]
    for p in processes:
        p.join()
    assert [p.exitcode for p in processes] == [0, 0]
    (made,) = conversions()
    assert made == convert(tmp_path / "m.gguf") and conversions() == [made]


def test_what_a_killed_process_left_is_not_taken_for_whole(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    process = begin(tmp_path / "m.gguf", dies=True)
    process.join()
    assert process.exitcode == -9 and [p for p in (cache_dir() / "gguf").glob(".*") if p.is_dir()]
    assert conversions() == []
    folder = convert(tmp_path / "m.gguf")
    assert conversions() == [folder] and not [p for p in folder.parent.glob(".*") if p.is_dir()]
