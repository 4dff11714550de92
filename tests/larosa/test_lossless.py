"Self-speculation writes what dense greedy decoding writes, token for token."

import pytest
import torch

from helpers import cached_logits, logits
from llmopt.larosa import SimpleLaRoSA, projections, self_draft, set_sparsity

from .models import CHANGES, exact, sparsified


def greedy(model, ids, n):
    "The text `ids` (1, length) and `n` tokens more, each from a pass over the whole text."
    for _ in range(n):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("name", CHANGES)
def test_every_family_and_length_of_draft(name):
    "With nothing dropped, every draft is right; the last tokens are cut off by an end token."
    model, ids = exact(name)
    prompt, new = ids[:1, :9], sparsified(model, ids)
    want = greedy(model, prompt, 12)
    for sparsity, drafts in ((0.6, 1), (0.6, 4), (0.95, 3), (0.0, 4)):
        set_sparsity(new, dict.fromkeys(projections(new), sparsity))
        got = self_draft(new, prompt, 12, drafts)
        assert torch.equal(got.ids, want), (sparsity, drafts)
        assert got.verified + got.accepted + 1 >= 12 and (sparsity > 0 or got.accepted == got.drafted)
    end = want[0, 12].item()
    cut = self_draft(new, prompt, 12, 4, eos=end).ids
    assert torch.equal(cut, want[:, : cut.shape[1]]) and cut[0, -1] == end and end not in cut[0, 9:-1].tolist()


@pytest.mark.parametrize("name", CHANGES)
def test_in_one_call(name):
    "`SimpleLaRoSA` on every family: nearly the share asked for, no adapters, exact at 0, the old model as it was."
    model, ids = exact(name)
    want, larosa = logits(model, ids), SimpleLaRoSA(0.5, tokens="all", rotation="model")
    got = logits(larosa.apply(model, ids), ids)
    assert torch.equal(logits(model, ids), want) and (got - want).abs().max() > 1e-3
    assert 0.48 < larosa.traffic.sparsity <= 0.5 and larosa.traffic.adapters == 0
    exact_again = SimpleLaRoSA(0.0, rotation="model").apply(model, larosa.calibration)
    assert (cached_logits(exact_again, ids) - want).abs().max() < 1e-9
    again = SimpleLaRoSA(0.5, tokens="all", rotation="model").apply(model, larosa.calibration)
    assert torch.equal(logits(again, ids), got)
