"What goes wrong around a calibration: a damaged file that ships, no stderr, a model that is trained afterwards."

import sys

import pytest
import torch

from helpers import logits, random_ids, small_model
from llmopt.core import TINY, load
from llmopt.larosa import LaRoSAConfig, SimpleLaRoSA, config
from llmopt.larosa.artifact import SHIPPED


@pytest.fixture
def ids():
    "Calibration text for a small model."
    return torch.randint(4096, (8, 32), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rotation", ["none", "model"])
def test_training_the_plain_model_leaves_the_converted_one(ids, rotation):
    "A converted model is a model of its own: what happens to the plain one later does not reach it."
    model = small_model("qwen3")
    new = SimpleLaRoSA(0.0, rotation=rotation).apply(model, ids)
    before = logits(new, random_ids(12))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    torch.testing.assert_close(logits(new, random_ids(12)), before, atol=0, rtol=0)


def test_a_damaged_calibration_that_ships_is_made_anew(tmp_path, monkeypatch):
    "It is said, and the model is calibrated as one that nothing ships for."
    monkeypatch.setitem(SHIPPED, TINY, tmp_path)
    made = []
    monkeypatch.setattr(config, "kept_calibration", lambda about, make: made.append(about) or 1)
    lm = load(TINY, "cpu")
    with pytest.warns(UserWarning, match="is damaged, so it is made anew"):
        assert config._calibration(LaRoSAConfig(), lm, "state") == 1 and made  # private: prepare would take a minute


def test_without_stderr(ids, monkeypatch):
    "Where there is no stderr there is no bar, and the work is done."
    monkeypatch.setattr(sys, "stderr", None)
    assert SimpleLaRoSA(0.3).apply(small_model("llama"), ids) is not None
