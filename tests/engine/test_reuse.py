"A conversation goes on from what was read: the answers are those of a fresh prefill, token by token."

import copy
import threading

import pytest
import torch
from transformers import DynamicCache

from helpers import small_model, tiny, tokenizer
from llmopt.core import LM, assistant, load, user
from llmopt.engine import EnhancedFusedLLMEngine
from llmopt.engine.prompt_cache import crop_to
from llmopt.errors import ConfigError, ContextError, ModelError
from llmopt.kv_cache import PrefixStore
from llmopt.word_removal import WordRemovalConfig

SYSTEM = "You are a helpful assistant. Answer in one sentence."
QUESTIONS = [
    "What is the difference between machine learning and artificial intelligence?",
    "Who made the first one of the two, and in which of the years was that?",
    "Thank you.",
]
LAROSA = "larosa:when=always"
RECIPES = ["baseline", "words", "vocab", LAROSA, "kv", f"words+vocab+{LAROSA}+kv"]


def engine(recipe="baseline", lm=None, **kw):
    return EnhancedFusedLLMEngine(lm or tiny(), recipe=recipe, **dict(max_new_tokens=8, system=SYSTEM) | kw)


def check(e, messages, least=0):
    "Ask; tokens and log-probabilities are those of a fresh prefill, and at least so many tokens were not read again."
    answer = e.answer(messages, logprobs=0)
    list(answer)
    m, fresh = answer.metrics, e.run(messages, logprobs=0)
    assert (m.output_ids, m.prompt_tokens, fresh.cached_prompt_tokens) == (fresh.output_ids, fresh.prompt_tokens, 0)
    assert max(abs(a.logprob - b.logprob) for a, b in zip(m.logprobs, fresh.logprobs)) < 1e-4
    assert m.cached_prompt_tokens >= least
    assert (m.kv_bytes_live, m.kv_bytes_peak) == (fresh.kv_bytes_live, fresh.kv_bytes_peak)
    return m


def grown(messages, m, text):
    "The next turn."
    return [*messages, assistant(m.output_text), user(text)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_turns_are_those_of_a_fresh_prefill(recipe):
    "Of three turns, and after an edit of the second one: what stood before it is not read again."
    e = engine(recipe)
    talk = [dict(role="system", content=SYSTEM), user(QUESTIONS[0])]
    first = check(e, talk)
    second = check(e, grown(talk, first, QUESTIONS[1]), least=first.prompt_tokens - 2)
    longer = grown(talk, first, QUESTIONS[1])
    check(e, grown(longer, second, QUESTIONS[2]), least=second.prompt_tokens - 4)
    edited = check(e, grown(talk, first, "Why?"), least=first.prompt_tokens - 2)
    assert edited.cached_prompt_tokens < edited.prompt_tokens


def test_only_what_is_new_is_read():
    "Turn by turn: the last token of the answer, the marks of the template and the new message."
    e, read = engine(), []
    for text in ("What is rain?", "What is snow?", "What is hail?"):
        e.chat(text)
        read.append(e.last.prompt_tokens - e.last.cached_prompt_tokens)
    new = e.lm.encode_chat([user("What is rain?")])
    assert read[1] == read[2] <= len(new) + 4 < read[0]


def test_chat_and_stream_go_on_from_each_other():
    a, b = engine(), engine(kept_bytes=0)
    for text in QUESTIONS:
        assert "".join(a.stream(text)).strip() == b.chat(text)
    assert a.last.cached_prompt_tokens > 60 and b.last.cached_prompt_tokens == 0 and len(b.kept) == 0
    assert a.history == b.history


def test_run_and_score_use_and_keep_nothing():
    e = engine()
    e.chat(QUESTIONS[0])
    kept = [entry.ids.tolist() for entry in e.kept.entries]
    messages = [*e.history, user(QUESTIONS[1])]
    assert e.run(messages).cached_prompt_tokens == 0
    e.score(messages, [5, 6])
    assert [entry.ids.tolist() for entry in e.kept.entries] == kept


@pytest.mark.parametrize("recipe", ["baseline", "kv:budget=400"])
def test_conversations_share_a_system_message_and_leave_each_other_alone(recipe):
    "Two that alternate: each finds its own cache, and the second one begins with a copy of what they share."
    e, system = engine(recipe), dict(role="system", content=SYSTEM * 4)
    talks = [[system, user(q)] for q in QUESTIONS[:2]]
    check(e, talks[0])
    shared = len(e.lm.tokenizer(SYSTEM * 4, add_special_tokens=False)["input_ids"])
    check(e, talks[1], least=shared - 20)
    for talk in talks:
        m = e.run(talk)
        check(e, grown(talk, m, QUESTIONS[1]), least=m.prompt_tokens - 24)


def test_a_closed_answer_can_be_gone_on_from():
    e = engine(max_new_tokens=100)
    with e.answer([user("Tell me a story.")]) as answer:
        next(answer)
    m = answer.metrics
    follow = [user("Tell me a story."), assistant(m.output_text), user("Go on.")]
    assert m.finish_reason == "stopped" and check(e, follow).cached_prompt_tokens >= m.prompt_tokens


def test_after_an_error_everything_is_read_again():
    "The cache of a broken answer is not trusted."
    e, calls = engine(), []
    e.chat(QUESTIONS[0])

    def fail(ids):
        calls.append(ids)
        if len(calls) == 2:
            raise RuntimeError("broken")

    with pytest.raises(ModelError, match="broken"):
        e.chat(QUESTIONS[1], on_token=fail)
    assert len(e.kept) == 0 and len(e.history) == 3
    assert check(e, [*e.history, user(QUESTIONS[1])]).cached_prompt_tokens == 0


def test_words_are_removed_before_prefixes_are_compared():
    "A passage that is shortened the same way each time is read once."
    passage = " ".join(["The river runs from the mountains to the sea, and the people on its banks fish in it."] * 6)
    e = engine("words:rate=0.5")
    talk = [user(f"{passage} What do the people do?")]
    m = check(e, talk)
    assert m.prompt_tokens < m.prompt_tokens_base
    check(e, grown(talk, m, "Where does it run?"), least=m.prompt_tokens)


def test_a_turn_is_shortened_once(monkeypatch):
    "Earlier ones are there; after training they are shortened again, because a scorer may have asked the model."
    asked, apply = [], WordRemovalConfig.apply_to_turn
    monkeypatch.setattr(
        WordRemovalConfig, "apply_to_turn", lambda c, text, **kw: asked.append(text) or apply(c, text, **kw)
    )
    model = small_model()
    e = engine("words:rate=0.5", LM(model, tokenizer(), "small"), max_new_tokens=2)
    for question in QUESTIONS:
        e.chat(question)
    assert asked == QUESTIONS
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    e.shorten(e.history, conversation=True)
    assert asked == QUESTIONS * 2


def test_a_phrase_at_the_border_is_folded_as_in_a_fresh_prefill():
    "The first prompt ends in the middle of a phrase, the second one has all of it."
    e, words = engine("vocab", system=None), "What is the difference between machine"
    e.lm = LM(e.lm.model, copy.deepcopy(e.lm.tokenizer), e.lm.name)
    e.lm.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    m = check(e, [user(words)])
    longer = check(e, [user(words + " learning and artificial intelligence?")], least=m.prompt_tokens - 1)
    assert longer.cached_prompt_tokens == m.prompt_tokens - 1


def test_a_budget_reuses_until_something_is_evicted():
    "A fresh prefill of a longer prompt would have evicted other tokens: it is made, and the notes say so."
    e, talk, seen = engine("kv:budget=50"), [user(QUESTIONS[0])], []
    for _ in range(5):
        m = check(e, talk)
        seen.append((m.cached_prompt_tokens, m.notes != []))
        talk = grown(talk, m, "Why is that?")
    assert seen[1][0] > 0 and not seen[1][1] and seen[-1] == (0, True)
    assert "KV budget has evicted" in m.notes[0]


def test_a_turn_that_evicts_held_as_much_as_a_fresh_one():
    "Before it evicts; what was reused is no memory that was saved."
    e, talk = engine("kv:budget=96", system=None), [user("What is the moon?")]
    m = check(e, grown(talk, check(e, talk), 20 * "and why do people read books? "), least=1)
    assert m.kv_bytes_live < m.kv_bytes_peak


def test_what_judges_by_lost_queries_is_never_gone_on_from():
    e = engine("kv:budget=4096,policy=h2o")
    e.chat(QUESTIONS[0])
    e.chat(QUESTIONS[1])
    assert e.last.cached_prompt_tokens == 0 and "policy 'h2o'" in e.last.notes[0]


@pytest.mark.parametrize("recipe", [f"{LAROSA},tokens=all", f"{LAROSA},tokens=all,first=4"])
def test_sparse_passes(recipe):
    "What is sparse everywhere is the same in any pass; what depends on where a pass begins is read again."
    e, talk = engine(recipe), [user(QUESTIONS[0])]
    m = check(e, talk)
    m = check(e, grown(talk, m, QUESTIONS[1]))
    assert (m.cached_prompt_tokens == 0) == ("first" in recipe)


@pytest.mark.parametrize("window", [16, 200])
def test_sliding_windows(window):
    "One that has moved on cannot be cropped, and is used only where nothing has to go; the answers are the same."
    lm = LM(small_model("mistral", sliding_window=window), tokenizer(), "mistral")
    e, talk = engine(lm=lm, system=None), [user("What is rain?")]
    m = check(e, talk)
    m = check(e, grown(talk, m, "Why?"))
    check(e, [user("What is snow?")])


def test_stretched_positions_are_read_again():
    rope = dict(rope_type="dynamic", factor=2.0, rope_theta=10000.0)
    e = engine(lm=LM(small_model("llama", rope_parameters=rope), tokenizer(), "stretched"))
    e.chat("What is rain?")
    e.chat("Why?")
    assert e.last.cached_prompt_tokens == 0 and "positions" in e.last.notes[0]


def test_other_weights_other_keys():
    "Training in between, or moving to another type, makes what was read worthless."
    e = engine(lm=load("llmopt-tiny", "cpu"))
    e.chat(QUESTIONS[0])
    with torch.no_grad():
        e.lm.model.lm_head.weight.mul_(1.5)
    check(e, [*e.history, user(QUESTIONS[1])])
    e.lm.model.to(torch.bfloat16)
    e.chat(QUESTIONS[1])
    assert e.last.cached_prompt_tokens == 0


def test_bytes_are_bounded():
    "The oldest goes first; what is larger than the bound is not kept at all."
    e = engine(max_new_tokens=2, kept_bytes=300_000)
    for i in range(6):
        list(e.answer([user(f"{i} is a number? " * 4)]))
    assert 0 < e.kept.live_bytes <= 300_000 and len(e.kept) < 6
    small = engine(kept_bytes=1000)
    small.chat(QUESTIONS[0])
    assert len(small.kept) == 0


def test_threads_get_caches_of_their_own():
    "Four conversations at once on one engine, two turns each: every answer is the one that it would be alone."
    e, wrong = engine(max_new_tokens=4), []

    def talk(i):
        messages = [user(f"What is number {i}?")]
        for _ in range(2):
            answer = e.answer(messages)
            list(answer)
            if answer.metrics.output_ids != engine(max_new_tokens=4, system=None).run(messages).output_ids:
                wrong.append(i)
            messages = grown(messages, answer.metrics, "Why?")

    threads = [threading.Thread(target=talk, args=[i]) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong and len(e.kept) <= 8


def test_a_copy_of_an_engine_has_caches_of_its_own():
    e = engine()
    e.chat(QUESTIONS[0])
    other = copy.deepcopy(e)
    assert len(other.kept) == 0 and other.chat(QUESTIONS[1]) == e.chat(QUESTIONS[1])


def test_a_full_context_lets_the_oldest_turns_go(recwarn):
    "In pairs, with one warning; what is left is answered as if it had always been all."
    e = engine(lm=LM(small_model(max_position_embeddings=160), tokenizer(), "short"))
    lengths = []
    for i in range(8):
        e.chat(f"What is the number {i} in words?")
        assert e.last.prompt_tokens + 8 <= 160
        lengths.append(len(e.history))
    assert e.history[0]["role"] == "system" and [m["role"] for m in e.history[1:3]] == ["user", "assistant"]
    assert (
        e.history[-2]["content"] == "What is the number 7 in words?"
        and max(lengths) < 17
        and lengths != sorted(lengths)
    )
    assert len([w for w in recwarn if "oldest turns leave" in str(w.message)]) == 1


def test_a_message_longer_than_the_context_changes_nothing():
    "Neither the history nor what is kept, and the next turn goes on."
    e = engine()
    e.chat("What is rain?")
    before = list(e.history)
    for ask in (e.chat, lambda text: list(e.stream(text))):
        with pytest.raises(ContextError, match="context of 1,024"):
            ask("why " * 2000)
    assert e.history == before
    e.chat("Why?")
    assert e.last.cached_prompt_tokens > 20


def test_caches_that_cannot_be_cropped_are_left_alone():
    "A layer of a kind that nobody knows."
    cache = DynamicCache(config=tiny().model.config)
    cache.update(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8), 0)
    cache.layers = [type("Quantized", (type(cache.layers[0]),), {})()]
    cache.update(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8), 0)
    assert not crop_to(cache, 2) and crop_to(cache, 4)


@pytest.mark.parametrize("recipe", ["baseline", LAROSA, "kv:budget=400", "vocab"])
def test_a_store_pays_for_a_long_system_message_once(recipe, tmp_path):
    "A second engine, as in another process, loads what the first one computed, and answers the same."
    store, kw = PrefixStore(tmp_path, chunk=32), dict(system="You answer questions about rivers, lakes and rain. " * 10)
    store.meet_at = 0  # load whatever is there
    plain, texts = engine(recipe, **kw), []
    for least in (0, 64):
        e = engine(recipe, **kw, prefix_store=store)
        texts.append(e.chat(QUESTIONS[1]))
        assert e.last.cached_prompt_tokens >= least or "phrases" in e.last.notes[0]
        first = e.last.prompt_tokens
        texts.append(e.chat(QUESTIONS[2]))
        assert e.last.cached_prompt_tokens >= first - 40
    want = [plain.chat(q) for q in QUESTIONS[1:]]
    assert texts == want * 2 and (copy.deepcopy(e).kept.store is store)


def test_a_store_that_cannot_help_says_so(tmp_path):
    "Sliding windows are not stored; what is no store is refused."
    lm = LM(small_model("mistral"), tokenizer(), "mistral")
    e = engine(lm=lm, prefix_store=PrefixStore(tmp_path, chunk=8))
    e.chat("What is rain?")
    assert "the prefix store was not used" in e.last.notes[0] and e.last.cached_prompt_tokens == 0
    with pytest.raises(ConfigError, match="prefix_store must be a PrefixStore"):
        engine(prefix_store=str(tmp_path))
