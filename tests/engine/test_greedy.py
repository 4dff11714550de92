"Decoding is what the run says it is, whatever the checkpoint's generation_config asks for."

import copy

import pytest
import torch

from helpers import tiny
from llmopt.adaptivocab import SimpleAdaptiVocab
from llmopt.core import LM
from llmopt.engine import EnhancedFusedLLMEngine, Recipe, known_methods

QUESTION = "What is a glacier? What is a glacier made of?"
FIRST = 300  # some token; the first one of the plain answer is forbidden, too


def asking(**options):
    "The bundled model as a checkpoint that asks for `options`."
    lm = tiny()
    model = copy.copy(lm.model)  # shares the weights
    model.generation_config = copy.deepcopy(lm.model.generation_config)
    vars(model.generation_config).update(options)  # as a file would have them: unchecked
    return LM(model, lm.tokenizer, lm.name, lm.source)


def answer(lm, recipe="baseline", n=20):
    return EnhancedFusedLLMEngine(lm, recipe=recipe, max_new_tokens=n).run(QUESTION).output_ids


@pytest.fixture(scope="module")
def plain():
    return answer(tiny())


OPTIONS = dict(
    repetition_penalty=1.5,
    no_repeat_ngram_size=1,
    bad_words_ids=[[FIRST]],
    suppress_tokens=[FIRST],
    begin_suppress_tokens=[FIRST],
    forced_bos_token_id=FIRST,
    forced_eos_token_id=FIRST,
    cache_implementation="static",
    use_cache=False,
    min_length=500,
    max_length=3,
    max_new_tokens=2,
    do_sample=True,
    temperature=9.0,
    top_k=3,
    num_beams=3,
    num_return_sequences=2,
    penalty_alpha=0.6,
    max_time=1e-6,
    stop_strings=["a", "e"],
    guidance_scale=2.0,
    exponential_decay_length_penalty=(2, 9.0),
    sequence_bias=[[[FIRST], 99.0]],
    prompt_lookup_num_tokens=3,
    return_dict_in_generate=True,
    prefill_chunk_size=3,
    eta_cutoff=0.5,
)


@pytest.mark.parametrize("option", OPTIONS)
def test_greedy_is_greedy(option, plain):
    "No option of the checkpoint changes an answer, and each is named."
    value = OPTIONS[option]
    if isinstance(value, list) and FIRST in (value[0], *(value[0] if isinstance(value[0], list) else [])):
        value = [plain[0]] if value == [FIRST] else [[plain[0]]]
    lm = asking(**{option: value})
    assert answer(lm) == plain
    assert option in EnhancedFusedLLMEngine(lm).checkpoint_decoding


def test_a_plain_checkpoint_asks_for_nothing():
    assert EnhancedFusedLLMEngine(tiny()).checkpoint_decoding == {}


@pytest.mark.parametrize("method", known_methods())
def test_run_and_score_agree(method):
    "A greedy answer is the most probable token at each position, for every method, whatever the checkpoint asks for."
    e = EnhancedFusedLLMEngine(asking(repetition_penalty=1.3, min_length=40), recipe=method, max_new_tokens=16)
    ids = e.run(QUESTION).output_ids
    assert e.score(QUESTION, ids).argmax(-1).tolist() == ids


def test_no_phrase_changes_nothing(tmp_path):
    "Phrases are read as embeddings, where a penalty sees no prompt: without any, the answer is the plain one."
    lm = asking(repetition_penalty=1.1)
    SimpleAdaptiVocab(lm.tokenizer, []).save(tmp_path / "none.json")
    recipe = Recipe.parse(f"vocab:phrases={tmp_path / 'none.json'}")
    assert answer(lm, recipe, 30) == answer(lm, n=30)


@pytest.mark.parametrize("eos", [0, [0], None])
def test_an_answer_ends_where_the_template_says(eos):
    "The generation config names another token, or none: the tokenizer's and the template's end of a turn still ends."
    lm = asking(eos_token_id=eos)
    usual = EnhancedFusedLLMEngine(tiny(), max_new_tokens=400).run("What is ice?")
    m = EnhancedFusedLLMEngine(lm, max_new_tokens=400).run("What is ice?")
    assert (m.finish_reason, m.output_ids) == ("stop", usual.output_ids)


def test_a_stop_token_that_is_not_special_is_not_shown():
    "A comma that ends the answer by order of the generation config is no part of it, in `run` and in a stream alike."
    words = EnhancedFusedLLMEngine(tiny(), max_new_tokens=30).run("What is ice?")
    last = words.output_ids[9]
    e = EnhancedFusedLLMEngine(asking(eos_token_id=[last]), max_new_tokens=30)
    m = e.run("What is ice?")
    first = words.output_ids.index(last)
    assert (m.finish_reason, len(m.output_ids)) == ("stop", first + 1)
    assert m.output_text == tiny().tokenizer.decode(words.output_ids[:first]).strip()
    assert "".join(e.stream("What is ice?")).strip() == m.output_text


def test_temperature_samples_from_the_whole_distribution():
    "At a temperature that makes all tokens about equal, more than the 50 that transformers would keep are drawn."
    e = EnhancedFusedLLMEngine(asking(top_k=1, top_p=0.01))
    firsts = {e.run("Hi", max_new_tokens=1, fixed=True, temperature=100.0, seed=s).output_ids[0] for s in range(60)}
    assert len(firsts) > 50


def test_a_temperature_near_zero_is_greedy(plain):
    e = EnhancedFusedLLMEngine(tiny(), max_new_tokens=20)
    for t in (1e-30, 1e-4):
        assert e.run(QUESTION, temperature=t).output_ids == plain


def test_a_fixed_length_rules_out_every_end():
    lm = tiny()
    m = EnhancedFusedLLMEngine(lm).run("What is ice?", max_new_tokens=120, fixed=True)
    assert len(m.output_ids) == 120 and not {*m.output_ids} & {*lm.stop_ids} and m.finish_reason == "length"


def test_state_of_the_checkpoint_stays():
    lm = asking(repetition_penalty=1.3)
    before = lm.model.generation_config.to_dict()
    answer(lm)
    assert lm.model.generation_config.to_dict() == before and torch.is_grad_enabled()
