"""The script that measures kvpress: what it does with its rows, without kvpress.

What it measures needs an environment of its own: `python nbs/research/kvpress_beside.py --help`.
"""

import importlib.util
import json

import pytest
import torch

from helpers import ROOT


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("kvpress_beside", ROOT / "nbs/research/kvpress_beside.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(method, kl, when="before", kind="needle", budget=0.25):
    return dict(method=method, kl=kl, when=when, kind=kind, budget=budget)


def test_means_leave_out_what_is_not_complete(script):
    "A method that failed on one prompt has no mean in that cell."
    got = script.means([row("a", 0.1), row("a", 0.3), row("b", 0.2), row("b", None), row("b", 0.5, "after")])
    assert got[("before", "needle", 0.25)] == {"a": pytest.approx(0.2)}
    assert got[("after", "needle", 0.25)] == {"b": 0.5}


def test_both_libraries_side_by_side(script, tmp_path, capsys):
    "The best of each, cell by cell, and how far the full caches agree."
    (tmp_path / "kvpress.json").write_text(json.dumps(dict(agree=dict(x=5e-7), rows=[row("kvpress KVzip", 0.048)])))
    ours = tmp_path / "benchmark_kv.json"
    ours.write_text(json.dumps(dict(tables=dict(answers=[row("policy=foreseen,bits=8", 0.01)]))))
    script.main(["show", str(tmp_path), str(ours)])
    out = capsys.readouterr().out
    assert "5.0e-07" in out and "0.0480  kvpress KVzip" in out and "0.0100  policy=foreseen,bits=8" in out


def test_a_judgement_is_the_same_as_ours(script):
    "KL, agreement and whether the answer is written, as in `llmopt.benchmark.kv_quality`."
    from llmopt.benchmark.kv_quality import judged

    gen = torch.Generator().manual_seed(0)
    full, other = (torch.randn(4, 9, generator=gen).log_softmax(-1) for _ in range(2))
    for ids, need in (([1, 2, 3, 4], 2), ([0, 1, 2, 3, 4], None), ([0, 1, 2, 3, 4], 1)):
        a, b = script.judged(full, other, ids, need), judged(full, other, ids, need)
        assert a["kl"] == pytest.approx(b["kl"], abs=2e-6) and (a["top1"], a["found"]) == (b["top1"], b["found"])


def test_a_configuration_that_older_versions_read(script, tmp_path):
    "The base of the turns under both names, and nothing about a quantization that is over."
    path = tmp_path / "config.json"
    path.write_text(json.dumps(dict(rope_parameters=dict(rope_theta=1e5), quantization_config=dict(bits=4))))
    script._readable_by_older(path)  # private: `prepare` would need a model
    config = json.loads(path.read_text())
    assert config["rope_theta"] == 1e5 and "quantization_config" not in config and config["torch_dtype"]
