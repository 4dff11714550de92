"Every variant of the ablation skips what it should, alone and in several processes."

import pytest
import torch

from helpers import small_model
from llmopt.benchmark.larosa_ablation import VARIANTS, Ablation, dropping, thresholds
from llmopt.core import kl, next_token_logprobs


@pytest.fixture(scope="module")
def model():
    "A small random model with more than tiny weights, and token ids (12, 64)."
    m = small_model(vocab_size=96, hidden_size=64, intermediate_size=112)
    torch.manual_seed(0)
    for p in m.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return m, torch.randint(96, (12, 64))


@pytest.fixture(scope="module")
def ablation(model):
    m, ids = model
    return Ablation(m, ids[:8], ids[8:])


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_skips_its_share(ablation, name):
    "Adapters paid where they are to be paid; a threshold misses it a little on other text."
    r = ablation.measure(name, 0.5)
    assert r["kl"] > 1e-3
    assert (r["skipped"] if "free" in name else r["net"]) == pytest.approx(
        0.5, abs=0.05 if name == "threshold" else 0.01
    )


@pytest.mark.parametrize("name", ["threshold", "top-k", "one basis", "values rotated", "basis learned"])
def test_nothing_skipped_nothing_lost(ablation, name):
    assert ablation.measure(name, 0.0)["kl"] < 1e-5


def test_dense_prompts(ablation, model):
    "With `decode`, a prompt is dense and a single token is not."
    ids = model[1][8:]
    one = next_token_logprobs(model[0], ids[:, :1])
    for name in ("top-k", "basis learned"):
        with ablation.variant(name, 0.5, "decode") as (m, _):
            torch.testing.assert_close(next_token_logprobs(m, ids), ablation.reference, atol=1e-4, rtol=1e-4)
            assert kl(one, next_token_logprobs(m, ids[:, :1])).mean() > 1e-3


def test_several_processes(ablation):
    "Two processes find what one finds."
    names = ("threshold", "one basis")
    for a, b in zip(ablation.run((0.4,), names, processes=2), ablation.run((0.4,), names), strict=True):
        assert (a["arm"], a["p"]) == (b["arm"], b["p"])
        assert [a[k] for k in ("skipped", "net", "kl", "rise")] == pytest.approx(
            [b[k] for k in ("skipped", "net", "kl", "rise")], abs=1e-4
        )


def test_a_threshold_of_nothing(model):
    "Drops nothing, and the model is as it was afterwards."
    m, ids = model
    want, cut = next_token_logprobs(m, ids), thresholds(m, ids, 0.0)
    with dropping(m, lambda n, x: x * (x.abs() > cut[n])):
        assert torch.equal(next_token_logprobs(m, ids), want)
    assert not any(x._forward_pre_hooks for x in m.modules())
