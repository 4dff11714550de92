"Distilled rows: the loss is the divergence that the reader's own scores show, and the model stays as it is."

import threading

import numpy as np
import pytest
import torch

from helpers import tiny
from llmopt.adaptivocab import PhraseReader, SimpleAdaptiVocab, VocabConfig, load_rows, save_rows
from llmopt.adaptivocab.rows import composed_rows, distill, distill_loss, fold_windows, phrase_windows
from llmopt.core import kl, load
from llmopt.errors import ConfigError, ModelError

SAID = ["The study of machine learning is a part of the work.", "In the United States of America."]


def a_reader(lm, phrases=("machine learning", "United States", "of the"), **cfg):
    "A reader of a few phrases"
    return PhraseReader(lm.model, SimpleAdaptiVocab(lm.tokenizer, phrases), VocabConfig(**cfg))


def test_the_loss_is_the_divergence_of_the_readers_scores():
    r = a_reader(tiny(), ["machine learning"])
    ids = r.vocab.tokens(SAID)[0].tolist()
    f = r.vocab.fold(ids)
    j = int(np.flatnonzero(f.span > 1)[0])
    s = int(f.start[j] + f.span[j])
    p, q = (r.score(ids[:s], ids[s:] + [7], fold=x) for x in (False, True))
    rows = torch.nn.Embedding.from_pretrained(composed_rows(r))
    with torch.no_grad():
        one = distill_loss(r, rows, fold_windows(r, [ids])).item()
        two = distill_loss(r, rows, fold_windows(r, [ids, ids[: s + 3]])).item()
    assert one == pytest.approx(kl(p, q).mean().item(), abs=1e-4)
    assert two == pytest.approx(((kl(p, q).sum() + kl(p, q)[:4].sum()) / (len(p) + 4)).item(), abs=1e-4)


@pytest.mark.parametrize("positions", ["gapped", "contiguous"])
def test_the_model_keeps_every_weight_and_flag(positions):
    lm = load("llmopt-tiny", "cpu")
    r = a_reader(lm, positions=positions)
    before = {k: p.clone() for k, p in lm.model.named_parameters()}
    lm.model.lm_head.weight.requires_grad_(False)
    _, losses = distill(r, r.vocab.tokens(SAID), 12, batch_size=2, progress=False)
    assert sum(losses[-3:]) < sum(losses[:3])
    for name, p in lm.model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None
    assert not lm.model.lm_head.weight.requires_grad
    assert sum(not p.requires_grad for p in lm.model.parameters()) == 1  # head and embedding are one


def test_rows_come_back_from_their_folder(tmp_path):
    r = a_reader(tiny())
    rows, _ = distill(r, r.vocab.tokens(SAID), 3, batch_size=2, progress=False)
    save_rows(rows, r, tmp_path)
    assert torch.equal(load_rows(tmp_path, r), rows)


def test_distilling_inside_inference_mode_and_beside_another_thread():
    r = a_reader(tiny())
    seqs = r.vocab.tokens(SAID)
    want, _ = distill(r, seqs, 4, batch_size=2, progress=False)
    with torch.inference_mode():
        inside, _ = distill(r, seqs, 4, batch_size=2, progress=False)
    assert torch.equal(inside, want)
    got = []
    threads = [
        threading.Thread(target=lambda: got.append(distill(r, seqs, 4, batch_size=2, progress=False)[0])) for _ in "12"
    ]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(got) == 2 and all(torch.allclose(g, want, atol=1e-6) for g in got)


def test_numpy_numbers_no_phrases_and_nothing_to_learn_from():
    r = a_reader(tiny())
    seqs = r.vocab.tokens(SAID)
    rows, losses = distill(r, seqs, np.int64(2), batch_size=2, progress=False)
    assert rows.shape == (len(r.vocab.table), 256) and len(losses) == 2
    assert composed_rows(a_reader(tiny(), [])).shape == (0, 256)
    assert phrase_windows(r.vocab, [[], [5], [5, 6]]) == []
    whole = dict(steps=-1), dict(batch_size=0), dict(size=2), dict(uses=0), dict(uses="4"), dict(batch_size=2.5)
    rates = dict(lr=-1), dict(lr=float("nan")), dict(lr="x"), dict(lr=None), dict(layer_lr=-0.1), dict(layer_lr="x")
    for bad in (*whole, *rates):
        with pytest.raises(ConfigError, match=f"{[*bad][0]}.*(is at least|whole number|at least 0)"):
            distill(r, seqs, **dict(dict(steps=1, progress=False), **bad))
    with pytest.raises(ConfigError, match="not from texts"):
        distill(r, SAID, 1, progress=False)
    for nothing in ([], [[7, 8, 9]]):
        with pytest.raises(ConfigError, match="none of the phrases"):
            distill(r, nothing, 1, progress=False)


def test_a_loss_that_is_no_number_ends_training_with_the_reason():
    lm = load("llmopt-tiny", "cpu")
    with torch.no_grad():
        lm.model.model.norm.weight.fill_(float("nan"))
    r = a_reader(lm)
    with pytest.raises(ModelError, match="no longer a number"):
        distill(r, r.vocab.tokens(SAID), 1, progress=False)
