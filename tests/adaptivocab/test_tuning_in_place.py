"Fine-tuning in place: what moves, what is refused, and that the model is usable whatever happens."

import math
import pkgutil

import numpy as np
import pytest
import torch

import llmopt.adaptivocab
from helpers import small_model, tokenizer
from llmopt.adaptivocab import expand, finetune, save_model
from llmopt.adaptivocab.fine_tuning import (
    TwoRateAdamW,
    marked_ids,
    next_token_nll,
    packed_rows,
    schedule,
    trained_weights,
)
from llmopt.core import LM, load, user
from llmopt.errors import ConfigError, ModelError

DOCS = [
    "The heart attack is a disease of the heart. High blood pressure, and the risk of a heart attack, is high.",
    "Signs and symptoms of a heart attack, and of high blood pressure, are in the list of signs and symptoms.",
    "The risk of high blood pressure is high.",
]


def a_model(family="llama"):
    "A small random model with the bundled tokenizer"
    return LM(small_model(family), tokenizer(), f"small {family}")


def weights(lm):
    "Copies of all weights"
    return {name: p.detach().clone() for name, p in lm.model.named_parameters()}


def test_zero_steps_change_nothing_and_all_may_move():
    lm = a_model()
    before = weights(lm)
    assert finetune(lm, DOCS, 0, progress=False) == []
    assert finetune(lm, [], np.int64(0), progress=False) == []
    assert all(torch.equal(p, before[name]) for name, p in lm.model.named_parameters())
    finetune(lm, DOCS, 2, per_step=2, what="all", progress=False)
    assert not any(torch.equal(p, before[name]) for name, p in lm.model.named_parameters())


@pytest.mark.parametrize("family", ["llama", "smollm", "gpt2", "phi2"])
def test_light_training_moves_matrices_first_and_last_layer(family):
    lm = LM(small_model(family, **({"n_layer": 3} if family == "gpt2" else {"num_hidden_layers": 3})), tokenizer(), "s")
    before = weights(lm)
    finetune(lm, DOCS, 2, per_step=2, progress=False)
    moved = {name for name, p in lm.model.named_parameters() if not torch.equal(p, before[name])}
    assert any(".0." in m for m in moved) and any(".2." in m for m in moved) and not any(".1." in m for m in moved)
    assert len(trained_weights(lm.model)) < len(trained_weights(lm.model, "all"))


def test_only_the_new_rows_move_when_all_else_rests():
    lm = expand(load("llmopt-tiny", "cpu"), DOCS * 2, 30)
    before = weights(lm)
    finetune(lm, DOCS, 3, what="all", new=range(4096, len(lm.tokenizer)), rest=0.0, progress=False)
    for name, p in lm.model.named_parameters():
        matrix = name in ("model.embed_tokens.weight", "lm_head.weight")
        rows = slice(0, 4096) if matrix else slice(None)
        assert torch.equal(p[rows], before[name][rows])
        assert not matrix or not torch.equal(p[4096:], before[name][4096:])


def test_the_share_of_a_step_that_old_rows_go():
    "With half the rate for the rest, old rows of a matrix go half of the way that they go at the full rate."
    steps = []
    for rest in (1.0, 0.5):
        model = small_model()
        start = model.lm_head.weight.detach().clone()
        optimizer = TwoRateAdamW(model, trained_weights(model, "all"), [7], rest)
        optimizer.step(next_token_nll(model, torch.tensor([[1, 2, 3, 7]])).sum(), 1e-2)
        steps.append(model.lm_head.weight.detach() - start)
    torch.testing.assert_close(steps[1][7], steps[0][7])
    torch.testing.assert_close(steps[1][8:], steps[0][8:] / 2, atol=1e-6, rtol=1e-3)


def test_the_rate_rises_and_falls():
    rates = [schedule(i, 100) for i in range(100)]
    assert max(rates) == rates[9] and rates[0] == pytest.approx(0.1) and rates[-1] < 0.001
    assert schedule(0, 1) == 1


def test_training_inside_inference_mode():
    one, two = a_model(), a_model()
    want = finetune(one, DOCS, 2, per_step=2, progress=False)
    with torch.inference_mode():
        assert finetune(two, DOCS, 2, per_step=2, progress=False) == want


def test_documents_that_are_empty_or_odd():
    lm = a_model()
    log = finetune(lm, ["", "A lone \ud800 surrogate.", "人工智能"], 3, per_step=1, progress=False)
    assert [math.isnan(x) for x in log] == [True, False, False]
    lm.tokenizer.bos_token = None
    assert marked_ids(lm.tokenizer, ["of"]) == [lm.tokenizer.encode("of")]
    assert marked_ids(lm.tokenizer, []) == []
    assert finetune(lm, DOCS, 1, per_step=1, progress=False)[0] > 0


@pytest.mark.parametrize("size", [1, 3, 10, 99])
def test_rows_hold_every_token_once(size):
    seqs = [[0, 11, 12, 13], [0], [0, 14, 15]]
    flat = [t for s in seqs for t in s]
    rows = packed_rows(seqs, size)
    assert [t for r in rows[:, 1:].tolist() for t in r if t >= 0] == flat[1:]
    assert rows.shape[1] == size + 1 and (rows[1:, 0] == rows[:-1, -1]).all()
    assert packed_rows([], size).tolist() == [[-100] * (size + 1)]


def test_what_cannot_be_trained_on_is_refused():
    lm = a_model()
    for bad in (dict(steps=-1), dict(per_step=0), dict(size=0)):
        with pytest.raises(ConfigError, match="fine-tuning needs"):
            finetune(lm, DOCS, **dict(dict(progress=False), **bad))
    for bad, said in ((dict(lr=-1), "lr and rest"), (dict(rest="x"), "lr and rest"), (dict(new=[10**7]), "no token")):
        with pytest.raises(ConfigError, match=said):
            finetune(lm, DOCS, 1, progress=False, **bad)
    for docs in ([], ["", ""]):
        with pytest.raises(ConfigError, match="no document"):
            finetune(lm, docs, 1, progress=False)
    with pytest.raises(ConfigError, match="list of texts"):
        finetune(lm, "one text", 1)
    with pytest.raises(ConfigError, match="'light' or 'all'"):
        finetune(lm, DOCS, 1, what="some")


def test_an_exception_in_the_middle_leaves_flags_and_gradients_as_they_were():
    lm = a_model()
    lm.model.lm_head.weight.requires_grad_(False)
    with torch.no_grad():
        lm.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="lower `lr`"):
        finetune(lm, DOCS, 2, progress=False)
    assert not lm.model.lm_head.weight.requires_grad and lm.model.model.norm.weight.requires_grad
    assert all(p.grad is None for p in lm.model.parameters())


@pytest.mark.parametrize("replace", [False, True])
def test_a_saved_model_is_an_ordinary_one(replace, tmp_path):
    lm = load("llmopt-tiny", "cpu")
    x = expand(lm, DOCS * 2, 30, replace=replace)
    finetune(x, DOCS, 1, size=64, progress=False)
    save_model(x, tmp_path / "new" / "folder")
    again = load(str(tmp_path / "new" / "folder"), "cpu")
    assert again.encode_chat([user(DOCS[0])]) == x.encode_chat([user(DOCS[0])])
    assert again.context == lm.context and (again.rows == lm.rows) == replace
    ids = torch.tensor([x.tokenizer.encode(DOCS[0])])
    with torch.inference_mode():
        assert torch.equal(again.model(ids).logits, x.model(ids).logits)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", "/proc/none", "a\0b"):
        with pytest.raises(ConfigError, match="cannot be written"):
            save_model(a_model(), folder)
    assert (tmp_path / "file").read_text() == "mine"


def test_no_name_of_the_package_hides_a_module_of_it():
    "`import llmopt.adaptivocab.x` is the module `x`: no function of the package is called so."
    modules = {m.name for m in pkgutil.iter_modules(llmopt.adaptivocab.__path__)}
    assert "fine_tuning" in modules and not modules & {*llmopt.adaptivocab.__all__}
