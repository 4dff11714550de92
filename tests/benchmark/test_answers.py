"Answers to shortened prompts: what they are decoded by, where they end, and passages that are odd."

import math

import pytest
import torch

from helpers import tiny
from llmopt.benchmark import words
from llmopt.benchmark.words import PromptBatch, answer_losses, mean_answers, paired_answers, passage_prompt
from llmopt.core import load, speculative_decode

QUESTIONS = ["What is the sun?", "Why do leaves change colour in autumn?", "What is machine learning?"]
ASKED = {  # what a checkpoint may ask for beyond plain greedy decoding
    "penalties": dict(repetition_penalty=1.6, no_repeat_ngram_size=2, bad_words_ids=[[i] for i in range(300, 1300)]),
    "sampling and beams": dict(do_sample=True, temperature=2.0, top_k=50, num_beams=3),
    "cache and lengths": dict(cache_implementation="static", max_length=20, min_length=400),
}


def prompts_of(lm):
    return [passage_prompt(lm, "", q) for q in QUESTIONS]


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_answers_are_greedy_whatever_the_checkpoint_asks_for(asked):
    want = PromptBatch(tiny(), prompts_of(tiny())).answers(24)
    lm = load("llmopt-tiny", "cpu")
    for name, value in asked.items():
        setattr(lm.model.generation_config, name, value)
    assert PromptBatch(lm, prompts_of(lm)).answers(24) == want
    assert all(getattr(lm.model.generation_config, name) == value for name, value in asked.items())


def test_an_answer_ends_at_every_stop_token_of_the_model():
    lm = load("llmopt-tiny", "cpu")
    want = [speculative_decode(lm.model, p, lambda *_: [], 60, lm.stop_ids).ids for p in prompts_of(lm)]
    lm.model.generation_config.eos_token_id = 0  # the template's <|end|> is still one of `stop_ids`
    got = PromptBatch(lm, prompts_of(lm)).answers(60)
    assert got == want and any(len(ids) < 60 for ids in got)


def test_a_batch_that_is_read_in_parts_predicts_what_each_prompt_alone_does(monkeypatch):
    "The caches of the parts have different lengths, and are joined."
    monkeypatch.setattr(words, "_READ", 1)
    prompts, answer = [passage_prompt(tiny(), p, QUESTIONS[0]) for p in ("", "A star.", "A star shines.")], [5, 6, 7]
    alone = torch.cat([PromptBatch(tiny(), [p]).log_probs(answer) for p in prompts])
    torch.testing.assert_close(PromptBatch(tiny(), prompts).log_probs(answer), alone, atol=1e-4, rtol=1e-4)
    assert PromptBatch(tiny(), prompts).answers(9) == [PromptBatch(tiny(), [p]).answers(9)[0] for p in prompts]


PASSAGES = {
    "one letter": "x" * 500,
    "Thai": "น้ำเดือดที่อุณหภูมิหนึ่งร้อยองศาเซลเซียสที่ระดับน้ำทะเล",
    "emoji": "👩‍👩‍👧‍👦 👍🏽 🏴󠁧󠁢󠁥󠁮󠁧󠁿 " * 5,
    "a lone surrogate": "The sun is \ud800 a star. It is hot and far away from us all.",
    "only numbers": "1 2 3 4 5 6 7 8 9 10",
}


@pytest.mark.filterwarnings("ignore:the text holds bytes")
@pytest.mark.parametrize("passage", PASSAGES.values(), ids=PASSAGES)
def test_odd_passages_have_a_row_for_each_scorer_that_meets_the_budget(passage):
    "A budget below what is protected leaves the whole passage and none."
    row = dict(text=passage, questions=[dict(question=QUESTIONS[0])])
    rows = answer_losses([row], tiny(), (0.5,), ("every_nth", "coverage"), n=4)
    names = [r["scorer"] for r in rows]
    assert names[:2] == ["whole passage", "no passage"] and names[2:] in ([], ["every_nth", "coverage"])
    assert all(-1e-4 < r["kl"] < 100 and r["keyword_recall"] is None for r in rows)
    means = mean_answers(rows)
    assert abs(rows[0]["kl"]) < 1e-4 and len(means) == len(rows)
    assert all(math.isnan(m[k]) for m in means for k in ("keyword_recall", "nll_rise"))


def test_means_are_over_the_questions_that_have_the_number():
    "One question has keywords and a reference answer, the other has neither."
    row = dict(text="The sun is a star. It is hot and far away from us all, and it shines.", questions=[])
    row["questions"] = [
        dict(question=QUESTIONS[0], keywords=["star"], answer="The sun is a star."),
        dict(question="Why?"),
    ]
    rows = answer_losses([row], tiny(), (0.5,), ("coverage",), n=4)
    asked = [r for r in rows if r["asked"] == 0]
    both, one = ({m["scorer"]: m for m in mean_answers(x)} for x in (rows, asked))
    for scorer in ("whole passage", "no passage", "coverage"):
        assert both[scorer]["questions"] == 2
        assert all(both[scorer][k] == one[scorer][k] for k in ("keyword_recall", "nll_rise"))


def test_differences_are_of_the_same_questions_and_their_interval_of_passages():
    "KL of `a` is 1 above every_nth with each question; two questions about one passage are one draw."
    rows = []
    for asked in range(4):
        same = dict(passage=asked // 2, half="shown", asked=asked, nll=None, keyword_recall=None, tokens=9, top1=1.0)
        rows += [same | dict(scorer=s, rate=0.5, kl=asked + k) for s, k in (("every_nth", 0), ("a", 1))]
        rows.append(same | dict(scorer="no passage", rate=0.0, kl=asked + 2 - asked // 2))
    by = {(r["against"], r["scorer"]): r for r in paired_answers(rows)}
    assert {*by} == {("every_nth", "a"), ("no passage", "a"), ("no passage", "every_nth")}
    fixed, other = by["every_nth", "a"], by["no passage", "a"]
    assert fixed["kl"] == fixed["kl_low"] == fixed["kl_high"] == 1 and fixed["questions"] == 4
    assert (other["kl"], other["kl_low"], other["kl_high"]) == (-0.5, -1, 0)
    assert math.isnan(fixed["nll_rise"]) and fixed["more_tokens"] == 0
