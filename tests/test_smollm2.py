"Every method on the model that people use: one comparison, one eviction, one restore, one sparse answer."

import json

import pytest
import torch

from llmopt.cli import main
from llmopt.core import load, user
from llmopt.engine import EnhancedFusedLLMEngine, known_methods
from llmopt.kv_cache import PrefixStore, SlabCache
from llmopt.larosa import LaRoSAConfig, traffic

pytestmark = pytest.mark.smollm2
QUESTION = "What is the capital of France?"
PASSAGE = " ".join(
    f"Shelf {i} of the archive holds {3 * i + 7} maps of rivers and {i + 2} of harbours." for i in range(16)
)


@pytest.fixture(scope="module")
def lm():
    "The model, loaded once."
    return load("smollm2", "cpu")


def test_comparison_of_all_methods(tmp_path, capsys):
    "The command that README names: no method fails, the baseline knows the answer, and LaRoSA says what it chose."
    queries, output = tmp_path / "queries.jsonl", tmp_path / "results.json"
    queries.write_text(json.dumps(dict(text=QUESTION, keywords=["Paris"])) + "\n")
    short = ["--quick", "--no-memory", "--max-new-tokens", "3"]
    main(["compare", "--model", "smollm2", *short, "--queries", str(queries), "--output", str(output)])
    runs = json.loads(output.read_text())["runs"]
    assert {r["method"] for r in runs} == {*known_methods(), "baseline*"} and not any(r["error"] for r in runs)
    assert all("Paris" in r["output_text"] for r in runs if r["method"] == "baseline" and r["arm"] == "quality")
    sparse = [r for r in runs if r["method"] == "larosa"]
    assert sparse and all("LaRoSA" in r["note"] and r["output_text"].strip() for r in sparse)
    assert "larosa" in capsys.readouterr().out


def test_the_calibration_that_ships_fits(lm, monkeypatch):
    "SmolLM2 is not calibrated again: what ships was made for these weights and skips what was asked for."
    monkeypatch.setattr("llmopt.larosa.config.calibrate", None)
    assert 0.39 < traffic(LaRoSAConfig(0.4, when="always").prepare(lm).model).sparsity <= 0.4


def test_a_budget_evicts(lm):
    "A quarter of a long prompt is kept, in few bits by the map that ships, and the answer is still text."
    asked = f"{PASSAGE}\n\nWhat does shelf 7 hold?"
    full = EnhancedFusedLLMEngine(lm).run(asked, max_new_tokens=8)
    for recipe in "kv:budget=25%", "kv:bits=8,budget=25%,policy=foreseen":
        m = EnhancedFusedLLMEngine(lm, recipe=recipe).run(asked, max_new_tokens=8)
        assert m.kv_bytes_live < 0.35 * full.kv_bytes_live and m.output_text.strip()


def test_a_prefix_is_restored(lm, tmp_path):
    "What one cache stored another loads, and the model goes on as after reading all."
    ids = torch.tensor([lm.encode_chat([user(PASSAGE)])])
    store = PrefixStore(tmp_path, chunk=64)
    store.prefill(lm.model, SlabCache(lm.model.config), ids)
    store.meet_at = 0  # load all that is there
    cache = SlabCache(lm.model.config)
    report = store.prefill(lm.model, cache, ids)
    assert report.loaded > 0
    with torch.inference_mode():
        fresh = SlabCache(lm.model.config)
        lm.model(ids[:, : cache.get_seq_length()], past_key_values=fresh)
        last = ids[:, cache.get_seq_length() :] if cache.get_seq_length() < ids.shape[1] else ids[:, -1:]
        a, b = (lm.model(last, past_key_values=c).logits[0, -1] for c in (cache, fresh))
    torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
