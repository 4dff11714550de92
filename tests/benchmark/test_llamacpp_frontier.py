"""The script that measures llama.cpp's quantizations: what it does without the wheels, and the file that it wrote.

What it measures needs an environment of its own: `python nbs/research/llamacpp_frontier.py --help`.
"""

import importlib.util
import json

import numpy as np
import pytest

from helpers import ROOT

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("llamacpp_frontier", ROOT / "nbs/research/llamacpp_frontier.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def written(path, types, tied=True):
    "A GGUF file of a head or an embedding and one more weight, each (4, 64), and a norm of 64 numbers."
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c", "d"])
    writer.add_file_type(3)
    values = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    names = ["token_embd.weight", "blk.0.attn_q.weight"] + ["output.weight"] * (not tied)
    for name, kind in zip(names, types):
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def test_a_tied_head_is_read_once_and_a_table_never(script, tmp_path):
    "Q8_0 takes 34 bytes for 32 weights, Q4_1 takes 20, and a norm 4 for each."
    q8, q4 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1
    written(tmp_path / "tied.gguf", [q8, q4])
    w = script.weights(tmp_path / "tied.gguf")
    assert (w["bytes_per_token"], w["head"]) == (8 * 34 + 8 * 20 + 256, "Q8_0")
    assert w["types"] == {"Q8_0": 8 * 34, "F32": 256, "Q4_1": 8 * 20}
    written(tmp_path / "apart.gguf", [q8, q4, q4], tied=False)
    w = script.weights(tmp_path / "apart.gguf")
    assert (w["bytes_per_token"], w["head"]) == (2 * 8 * 20 + 256, "Q4_1")


def test_the_file_in_32_bits_holds_what_the_other_one_means(script, tmp_path):
    q4 = gguf.GGMLQuantizationType.Q4_1
    values = written(tmp_path / "small.gguf", [q4, q4])
    script.dequantize_file(tmp_path / "small.gguf", tmp_path / "large.gguf")
    reader = gguf.GGUFReader(tmp_path / "large.gguf")
    found = {t.name: t for t in reader.tensors}
    assert {t.tensor_type.name for t in found.values()} == {"F32"}
    np.testing.assert_array_equal(found["blk.0.attn_q.weight"].data, gguf.dequantize(gguf.quantize(values, q4), q4))
    assert reader.fields["tokenizer.ggml.tokens"].contents() == ["a", "b", "c", "d"]
    assert reader.fields["general.file_type"].contents() == 0


def test_predictions_that_count(script):
    "Those of all tokens of a text but the first, and of an answer but its first, whose prediction the prompt makes."
    tokens = dict(texts=[[1, 2, 3]], prompts=[[4, 5]], answers=[[6, 7, 8]])
    assert script.sequences(tokens) == [([1, 2], 2), ([4, 5, 6, 7], 2)]


def row(name, kl, rate):
    return dict(name=name, wheel="w", kl_text=kl, kl_answers=kl / 2, tokens_per_second={"2": rate})


def test_the_fastest_within_a_loss(script):
    found = [row("a", 0.04, 10.0), row("b", 0.01, 20.0), row("c", 0.06, 30.0), dict(name="d", wheel="w", error="no")]
    assert script.fastest(found)["name"] == "b"
    assert (
        script.fastest(found, 0.1)["name"] == "c"
        and script.fastest(found, leave_out=["b"])["name"] == "a"
        and script.fastest(found, 0.001) is None
    )


def test_rows_are_medians_of_rounds(script):
    lost = dict(kl_text=0.1, kl_answers=0.2, top1_text=1.0, top1_answers=1.0, by_text=[0.1], by_answer=[0.2])
    times = [dict(name="a", wheel="xllamacpp", threads=2, rate=r, at=0) for r in (1.0, 3.0, 2.0)]
    measured = dict(files=dict(a=dict(bytes_per_token=5)), losses={"a/xllamacpp": lost}, times=times)
    r, other = script.rows(measured)
    assert (r["tokens_per_second"], r["slowest_fastest_n"]) == ({"2": 2.0}, {"2": [1.0, 3.0, 3]})
    assert (r["name"], r["wheel"], r["bytes_per_token"], r["kl_text"]) == ("a", "xllamacpp", 5, 0.1)
    assert (other["wheel"], other["kl_by"], other["tokens_per_second"]) == (script.SYNC, "xllamacpp", {})


def test_an_older_c_library_is_enough(script):
    "In the section of needed versions the entry for glibc 2.38 becomes a weak one, and nothing else changes."
    import struct

    names = b"\0GLIBC_2.38\0GLIBC_2.17\0"
    needs = struct.pack("<HHIII", 1, 2, 0, 16, 0)
    needs += struct.pack("<IHHII", 0, 0, 2, 1, 16) + struct.pack("<IHHII", 0, 0, 3, 12, 0)
    header = bytearray(64)
    header[:5] = b"\x7fELF\x02"
    struct.pack_into("<Q", header, 40, 64 + len(names) + len(needs))
    struct.pack_into("<H", header, 60, 2)
    strings = struct.pack("<IIQQQQIIQQ", 0, 3, 0, 0, 64, len(names), 0, 0, 1, 0)
    section = struct.pack("<IIQQQQIIQQ", 0, 0x6FFFFFFE, 0, 0, 64 + len(names), len(needs), 0, 1, 4, 0)
    library = bytes(header) + names + needs + strings + section
    made = script.optional_version(library, b"GLIBC_2.38")
    at = 64 + len(names) + 16 + 4
    assert [i for i in range(len(library)) if library[i] != made[i]] == [at] and made[at] == 2


@pytest.mark.parametrize("model, least", [("smollm2", 7e7), ("llmopt-tiny", 2e6)])
def test_the_file_holds_what_a_figure_needs(script, model, least):
    found = script.read_rows(script.FILES[model])
    stored = json.loads(script.FILES[model].read_text(encoding="utf-8"))
    assert {r["name"] for r in found} >= {"Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "Q4_0", "Q4_1"}
    for r in found:
        assert r["bytes_per_token"] > least and r["kl_text"] >= 0 and r["kl_answers"] >= 0
        assert set(r["tokens_per_second"]) <= {"1", "2"}
    exact = [r for r in found if r["name"] == "F32"]
    assert exact and max(r["kl_text"] for r in exact) < 1e-3
    for n, best in stored["fastest"].items() if model == "smollm2" else ():  # the other one was not timed
        assert best == script.short(script.fastest(found, threads=n)) and best["tokens_per_second"][n] > 0
