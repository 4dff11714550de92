"Optimizations side by side: what each needs of the plain model it gets, and turned off they change nothing."

import pytest
import torch

from helpers import FAMILIES, small_model, tokenizer
from llmopt.adaptivocab import PhraseReader, SimpleAdaptiVocab, VocabConfig, save_rows
from llmopt.core import LM, user
from llmopt.engine import EnhancedFusedLLMEngine, Recipe
from llmopt.errors import ConfigError
from llmopt.larosa import LaRoSAConfig
from llmopt.word_removal import compress, model_surprisal

QUESTION = "Where is the end of the river, and what is the name of the sea?"
PHRASES = [" of the", " is the"]


def lm_of(family, seed=0):
    "A small random model of a family with the bundled tokenizer."
    return LM(small_model(family, seed), tokenizer(), family)


def trained(lm, folder, scale=1.0):
    "The folder with vectors for `PHRASES`: composed ones times `scale`."
    vocab = SimpleAdaptiVocab(lm.tokenizer, PHRASES)
    reader = PhraseReader(lm.model, vocab)
    rows = [
        reader.compose(list(p), vocab.fold(list(p))).inputs["inputs_embeds"][0, 0].detach() for p in vocab.table.pieces
    ]
    save_rows(scale * torch.stack(rows), reader, folder)
    return dict(phrases=vocab, rows=str(folder))


def scored(lm, answer, vocab=None, larosa=None):
    "Log-probabilities of `answer`."
    recipe = Recipe(vocab=vocab and VocabConfig(**vocab), larosa=larosa and LaRoSAConfig(**larosa))
    return EnhancedFusedLLMEngine(lm, recipe=recipe).score(QUESTION, answer)


# rotations of random models need no learning, and nothing is dropped
NEUTRAL = dict(sparsity=0.0, rotation="layer", allocation="uniform")


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi2"])
def test_trained_phrases_are_read_by_a_turned_model(family, tmp_path):
    "Vectors that differ from the composed ones say the same to the plain model and to the one that LaRoSA turned."
    assert family in FAMILIES
    lm, answer = lm_of(family), [11, 500, 7]
    rows = trained(lm, tmp_path, scale=10.0)
    plain, turned = scored(lm, answer, rows), scored(lm, answer, rows, NEUTRAL)
    assert (plain - turned).abs().max() < 5e-4
    assert (plain - scored(lm, answer, dict(phrases=rows["phrases"]))).abs().max() > 5e-3


def test_both_at_neutral_are_the_baseline(tmp_path):
    "A prompt without any of the phrases, and no weight skipped."
    lm, answer = lm_of("llama"), [11, 500, 7]
    rows = trained(lm, tmp_path)
    recipe = Recipe(vocab=VocabConfig(**rows), larosa=LaRoSAConfig(**NEUTRAL))
    both, question = EnhancedFusedLLMEngine(lm, recipe=recipe), "Where do rivers end?"
    plain = EnhancedFusedLLMEngine(lm)
    assert (both.score(question, answer) - plain.score(question, answer)).abs().max() < 1e-3
    assert both.run(question, max_new_tokens=6).output_ids == plain.run(question, max_new_tokens=6).output_ids


def test_trained_phrases_of_another_model_are_refused_with_larosa_too(tmp_path):
    "The check looks at the plain weights, not at those that were turned."
    rows = trained(lm_of("llama", seed=1), tmp_path)
    with pytest.raises(ConfigError, match="another model"):
        scored(lm_of("llama"), [11], rows, NEUTRAL)


def test_the_engine_asks_its_own_model_which_words_surprise():
    "What `self_information` keeps is what `compress` keeps with the surprisal of the same model."
    lm, text = lm_of("llama"), " ".join([QUESTION] * 3)
    engine = EnhancedFusedLLMEngine(lm, recipe="words:rate=0.5,scorer=self_information")
    short, _ = engine.shorten([user(text)])
    score = model_surprisal(lm.model, lm.tokenizer)
    wanted = compress(text, 0.5, tokenizer=lm.tokenizer, scorer="self_information", model_score=score).text
    assert short[0]["content"] == wanted != text
