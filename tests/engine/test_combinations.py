"Optimizations side by side: what each needs of the plain model it gets, and turned off they change nothing."

import itertools

import pytest
import torch

from helpers import FAMILIES, small_model, tiny, tokenizer
from llmopt.adaptivocab import PhraseReader, SimpleAdaptiVocab, VocabConfig, save_rows
from llmopt.core import LM, assistant, speculative_decode, user
from llmopt.engine import EnhancedFusedLLMEngine, Recipe
from llmopt.errors import ConfigError
from llmopt.kv_cache import KVCacheConfig
from llmopt.larosa import LaRoSAConfig, dense
from llmopt.word_removal import WordRemovalConfig, compress, model_surprisal

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


def layered(lm, folder):
    "The folder with random vectors for `PHRASES`, one for every layer."
    vocab = SimpleAdaptiVocab(lm.tokenizer, PHRASES)
    layers, width = lm.model.config.num_hidden_layers, lm.model.get_input_embeddings().weight.shape[1]
    rows = torch.randn(len(vocab.table), layers, width, generator=torch.Generator().manual_seed(0))
    save_rows(rows * lm.model.get_input_embeddings().weight.std().item(), PhraseReader(lm.model, vocab), folder)
    return dict(phrases=vocab, rows=str(folder))


def scored(lm, answer, vocab=None, larosa=None):
    "Log-probabilities of `answer`."
    recipe = Recipe(vocab=vocab and VocabConfig(**vocab), larosa=larosa and LaRoSAConfig(**larosa))
    return EnhancedFusedLLMEngine(lm, recipe=recipe).score(QUESTION, answer)


# rotations of random models need no learning, and nothing is dropped
NEUTRAL = dict(sparsity=0.0, rotation="layer", allocation="uniform", when="always")


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi2"])
def test_trained_phrases_are_read_by_a_turned_model(family, tmp_path):
    "Vectors that differ from the composed ones say the same to the plain model and to the one that LaRoSA turned."
    assert family in FAMILIES
    lm, answer = lm_of(family), [11, 500, 7]
    rows = trained(lm, tmp_path, scale=10.0)
    plain, turned = scored(lm, answer, rows), scored(lm, answer, rows, NEUTRAL)
    assert (plain - turned).abs().max() < 5e-4
    assert (plain - scored(lm, answer, dict(phrases=rows["phrases"]))).abs().max() > 5e-3


def test_rows_for_every_layer_are_turned_too(tmp_path):
    lm, answer = lm_of("llama"), [11, 500, 7]
    rows = layered(lm, tmp_path)
    plain, turned = scored(lm, answer, rows), scored(lm, answer, rows, NEUTRAL)
    assert (plain - turned).abs().max() < 5e-4
    assert (plain - scored(lm, answer, dict(phrases=rows["phrases"]))).abs().max() > 5e-3


@pytest.mark.parametrize(
    "more", ["", "+kv", "+words:method=prefill,rate=0.5,floor=1", "+larosa:sparsity=0,bits=8,when=always"]
)
def test_rows_for_every_layer_are_read_in_every_way(more, tmp_path):
    "Answers are those that `score` foresees, in a conversation that goes on from what was read, too."
    lm = tiny()
    recipe = f"vocab:phrases={tmp_path / 'phrases.json'},rows={tmp_path}{more}"
    rows = layered(lm, tmp_path)
    rows["phrases"].save(tmp_path / "phrases.json")
    engine, first = EnhancedFusedLLMEngine(lm, recipe=recipe), "The end of the river is the sea. " * 6
    asked = [user(first + QUESTION)]
    m = engine.run(asked, max_new_tokens=6, fixed=True)
    assert engine.score(asked, m.output_ids).argmax(-1).tolist() == m.output_ids
    plain = EnhancedFusedLLMEngine(lm, recipe=recipe.replace(f",rows={tmp_path}", ""))
    assert (engine.score(asked, m.output_ids) - plain.score(asked, m.output_ids)).abs().max() > 0.05
    for said in (first + QUESTION, "What is the name of the end of the sea?"):
        answer = engine.chat(said, max_new_tokens=6)
    again = EnhancedFusedLLMEngine(lm, recipe=recipe, kept_bytes=0)
    for said in (first + QUESTION, "What is the name of the end of the sea?"):
        want = again.chat(said, max_new_tokens=6)
    assert answer == want


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


def neutral(lm):
    "A configuration of each slot that changes nothing."
    return dict(
        words=WordRemovalConfig(rate=1.0),
        vocab=VocabConfig(phrases=SimpleAdaptiVocab(lm.tokenizer, [])),
        larosa=LaRoSAConfig(**NEUTRAL),
        cache=KVCacheConfig(),
    )


@pytest.mark.parametrize("slots", [["words"], ["vocab"], ["larosa"], ["cache"], ["words", "vocab", "larosa", "cache"]])
def test_what_is_neutral_gives_the_logits_of_the_baseline(slots):
    "Each method alone and all four, of a question and of a conversation; and the answers go on from each other alike."
    lm, answer = lm_of("llama"), [11, 500, 7]
    chosen = {name: config for name, config in neutral(lm).items() if name in slots}
    plain, e = EnhancedFusedLLMEngine(lm), EnhancedFusedLLMEngine(lm, recipe=Recipe(**chosen))
    talk = [user(QUESTION), assistant("In the sea."), user("Why?")]
    for text in (QUESTION, talk):
        want, got = plain.score(text, answer), e.score(text, answer)
        assert (want - got).abs().max() < (1e-3 if "larosa" in slots else 1e-5)
        assert e.run(text, max_new_tokens=2).prompt_tokens == plain.run(text, max_new_tokens=2).prompt_tokens
    texts = [[x.chat(q, max_new_tokens=6) for q in (QUESTION, "Why?")] for x in (plain, e)]
    assert texts[0] == texts[1] and plain.last.cached_prompt_tokens == e.last.cached_prompt_tokens > 0


def test_the_order_of_a_recipe_means_nothing():
    "Four slots are four places: there is one recipe, whatever is written first."
    parts = ["words:n=2", "vocab", "larosa:sparsity=0.3", "kv:budget=64"]
    assert len({Recipe.parse("+".join(order)) for order in itertools.permutations(parts)}) == 1


def test_an_evicted_conversation_is_not_taken_for_a_whole_one():
    "Phrases, sparse weights, shortened words and a budget together: each turn is that of a fresh prefill."
    recipe = "words:rate=0.8+vocab+larosa:sparsity=0.3,when=always+kv:budget=48"
    e, talk = EnhancedFusedLLMEngine(tiny(), recipe=recipe, max_new_tokens=6), [user(QUESTION)]
    for _ in range(4):
        answer = e.answer(talk)
        text = "".join(piece.text for piece in answer)
        m, fresh = answer.metrics, e.run(talk)
        assert (m.output_ids, m.kv_bytes_live, text.strip()) == (fresh.output_ids, fresh.kv_bytes_live, m.output_text)
        talk += [assistant(m.output_text), user("Why is that so, and what is the end of it?")]
    assert m.cached_prompt_tokens == 0 and any("evicted" in note for note in m.notes)


def drafts_of(ids, answer):
    "A function that proposes two tokens of `answer` and a wrong one."

    def propose(text, cache, room):
        at = len(text) - len(ids)
        return [*answer[at : at + 2], 5][:room]

    return propose


def test_drafts_of_phrases_for_a_sparse_model():
    "One that is sparse in every pass writes what it writes without drafts; inside `dense`, any writes the dense text."
    lm, larosa = lm_of("llama"), LaRoSAConfig(**NEUTRAL | dict(sparsity=0.5, tokens="all"))
    plain, all_sparse = EnhancedFusedLLMEngine(lm), EnhancedFusedLLMEngine(lm, recipe=Recipe(larosa=larosa))
    ids = plain.prompt(QUESTION).ids
    want, its = (e.run(ids, max_new_tokens=12, fixed=True).output_ids for e in (plain, all_sparse))
    got = speculative_decode(all_sparse.lm.model, ids, drafts_of(ids, its), 12)
    assert got.ids == its and 0 < got.accepted < got.drafted
    with dense(all_sparse.lm.model) as model:
        got = speculative_decode(model, ids, drafts_of(ids, want), 12)
    assert got.ids == want and 0 < got.accepted < got.drafted
