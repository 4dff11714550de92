"The sets of queries that ship: what stands in them can be answered from the prompt, and from nothing else."

import json
import re
from functools import cache

import pytest
from tqdm.auto import tqdm

from helpers import tiny, tokenizer
from llmopt.cli.parser import parser
from llmopt.core import ASSETS, user
from llmopt.engine import EnhancedFusedLLMEngine
from llmopt.errors import ConfigError
from llmopt.evaluation import Query, Results, Run, as_queries, keyword_recall, read_queries, summary_text
from llmopt.evaluation.comparison import Comparison
from llmopt.evaluation.queries import QUERY_SETS
from llmopt.evaluation.resuming import differences

SIZES = {"default": 5, "long": 12, "chat": 31}
CONVERSATIONS = 6


@cache
def lines(name):
    "The objects in the file of the set `name`."
    return [json.loads(line) for line in (ASSETS / QUERY_SETS[name]).read_text(encoding="utf-8").splitlines()]


def document(q):
    "What stands in front of the question of `q`."
    assert q.text.endswith("\n\n" + q.question)
    return q.text.removesuffix(q.question).lower()


def mark(q):
    "The keyword of `q` that stands in its document least often."
    return min((k.lower() for k in q.keywords), key=document(q).count)


@pytest.mark.parametrize("name", QUERY_SETS)
def test_sets_have_their_sizes(name):
    "Each set holds as many queries as it says, with different ids and with keywords."
    queries = as_queries(name)
    assert len(queries) == SIZES[name] == len({q.id for q in queries})
    assert all(q.keywords and all(k.strip() for k in q.keywords) for q in queries)


@pytest.mark.parametrize("name", QUERY_SETS)
def test_licences_are_named(name):
    "Every line says whose text it is, and under which licence."
    assert all(d["about"]["licence"] == "Apache-2.0, written for llmopt" for d in lines(name))


def test_the_sets_are_small():
    "They ship with the package, so together they take at most 150 kB."
    assert sum((ASSETS / f).stat().st_size for f in QUERY_SETS.values()) < 150_000


def test_answers_stand_in_the_document_and_not_in_the_question():
    "Each keyword can be found by reading, and not by repeating the question."
    for q in as_queries("long"):
        assert keyword_recall(document(q), q.keywords) == 1
        assert keyword_recall(q.question, q.keywords) == 0
        assert all(k.lower() in document(q) and k.lower() not in q.question.lower() for k in q.keywords), q.id
        assert document(q).count(mark(q)) == 1, q.id  # one of them marks the place


def test_reference_answers_say_the_keywords():
    "The answer that comes with a document can be scored, where a small model's own answer misses the place."
    answers = [keyword_recall(q.about["answer"], q.keywords) for q in as_queries("long")]
    assert answers == [1] * SIZES["long"]


def test_answers_stand_at_all_depths():
    "At least three documents have their answer in the first third, three in the middle and three in the last."
    places = [document(q).index(mark(q)) / len(document(q)) for q in as_queries("long")]
    thirds = [sum(low <= p < low + 1 / 3 for p in places) for low in (0, 1 / 3, 2 / 3)]
    assert all(n >= 3 for n in thirds) and sum(thirds) == len(places)
    assert min(places) < 0.2 and max(places) > 0.85


def test_documents_have_1000_to_4000_tokens():
    "By SmolLM2's tokenizer, whose counts are stored; the bundled one cuts finer, by at most the factor of code."
    stored = {q.id: q.about["tokens"] for q in as_queries("long")}
    assert min(stored.values()) >= 1000 and max(stored.values()) <= 4000
    assert max(stored.values()) > 3 * min(stored.values())
    for q in as_queries("long"):
        assert 1.0 < len(tokenizer()(q.text)["input_ids"]) / stored[q.id] < 1.8


def test_documents_are_no_filler():
    "Twelve kinds of text, in which no long line or sentence comes twice."
    assert len({d["about"]["kind"] for d in lines("long")}) == SIZES["long"]
    for d in lines("long"):
        parts = [p.strip() for p in re.split(r"\n|(?<=[.!?]) ", d["document"]) if len(p.strip()) > 40]
        assert len(parts) > 15 and len(parts) == len(set(parts)), d["id"]


def test_conversations_share_their_system_prompt():
    "Six conversations of four to six turns begin with the same rules, which a cache may keep."
    assert len(lines("chat")) == CONVERSATIONS
    assert len({d["messages"][0]["content"] for d in lines("chat")}) == 1
    assert all(q.messages[0] == lines("chat")[0]["messages"][0] for q in as_queries("chat"))
    for d in lines("chat"):
        assert 4 <= sum(m["role"] == "user" for m in d["messages"]) <= 6


def test_turns_are_answered_by_what_stands_before():
    "The keywords of a turn are not in it; the given answer, where there is one, has all of them."
    queries = {q.id: q for q in as_queries("chat")}
    for q in queries.values():
        assert keyword_recall(q.text, q.keywords) == 0, q.id
    checked = 0
    for q in queries.values():
        conversation, turn = q.id.rsplit("/", 1)
        later = queries.get(f"{conversation}/{int(turn) + 1}")
        if later:
            assert later.messages[: len(q.messages) + 1] == q.prompt
            assert keyword_recall(later.messages[-1]["content"], q.keywords) == 1, q.id
            checked += 1
    assert checked == SIZES["chat"] - CONVERSATIONS


def test_every_turn_fits_the_bundled_model():
    "With the longest answer of a comparison by default, 128 tokens."
    assert max(len(tiny().encode_chat(q.prompt)) for q in as_queries("chat")) + 128 <= tiny().context


def test_the_system_prompt_reaches_the_model():
    "Through the chat template, and word removal leaves it as it is: it shortens passages of the user only."
    q = as_queries("chat")[1]
    for method in ("baseline", "word_removal"):
        prompt = EnhancedFusedLLMEngine(tiny(), recipe=method).prompt(q.prompt)
        text = tiny().tokenizer.decode(prompt.ids)
        assert text == tiny().chat_text(q.prompt)
        assert all(m["content"] in text for m in q.prompt)


def test_a_path_that_is_named_like_a_set(tmp_path, monkeypatch):
    "`long` is the set, `./long` the file."
    monkeypatch.chdir(tmp_path)
    (tmp_path / "long").write_text('{"text": "mine"}')
    assert len(as_queries("long")) == SIZES["long"]
    assert [q.text for q in as_queries("./long")] == ["mine"] == [q.text for q in as_queries(tmp_path / "long")]


def test_unknown_sets_list_the_known_ones():
    "A name that is neither a set nor a file."
    with pytest.raises(
        ConfigError, match="cannot read queries from 'lnog': .*; sets that ship are default, long, chat"
    ):
        as_queries("lnog")


def test_the_command_knows_the_sets(capsys):
    "`--help` names all of them and the three forms of a line; the default is `default`."
    assert parser().parse_args(["compare"]).queries == "default"
    with pytest.raises(SystemExit):
        parser().parse_args(["compare", "--help"])
    shown = capsys.readouterr().out
    assert all(f"{name} (" in shown for name in QUERY_SETS)
    assert all(f'"{key}"' in shown for key in ("text", "document", "question", "messages", "keywords"))


U, A, S = ({"role": r, "content": "x"} for r in ("user", "assistant", "system"))


@pytest.mark.parametrize(
    "line, says",
    [
        (dict(messages=[A]), "message 1 has the role 'assistant', where system or user must stand"),
        (dict(messages=[U, U]), "message 2 has the role 'user', where assistant must stand"),
        (dict(messages=[U, S]), "message 2 has the role 'system', where assistant must stand"),
        (dict(messages=[S, S, U]), "message 2 has the role 'system', where user must stand"),
        (dict(messages=[S]), "the last message must be of the user"),
        (dict(messages=[U, A]), "the last message must be of the user"),
        (dict(messages=[]), '"messages" must be a list of objects'),
        (dict(messages="hello"), '"messages" must be a list of objects'),
        (dict(messages=["hello"]), "message 1 must be an object"),
        (dict(messages=[dict(role="user", content="  ")]), '"content" must be a text, and not empty'),
        (dict(messages=[dict(role="user", content=None)]), '"content" must be a text, and not empty'),
        (dict(messages=[dict(role="user")]), 'message 1: "content" must be'),
        (dict(messages=[dict(role=["user"], content="x")]), "has the role"),
        (dict(messages=[dict(U, name="Ann")]), "message 1 has an unknown key 'name'"),
        (dict(messages=[U, dict(A, keywords=["x"]), U]), "message 2 has an unknown key 'keywords'"),
        (dict(messages=[dict(U, keywords="x")]), '"keywords" must be a list of words'),
        (dict(messages=[dict(U, keywords=["a"])], keywords=["b"]), "not to both"),
        (dict(document="x"), '"question" must be a text, and not empty'),
        (dict(document="", question="x"), '"document" must be a text, and not empty'),
        (dict(document=["x"], question="x"), '"document" must be a text, and not empty'),
        (dict(document="x", text="x"), "and not text and document at once"),
        (dict(text="x", question="y"), "unknown key 'question'"),
        (dict(question="y"), 'a "document" or "messages" is needed'),
        (dict(text="x", about="me"), '"about" must be an object'),
        (dict(text="x", about={"n": 2**63}), '"about" must be an object'),
        (dict(text="x", about={"n": [1]}), '"about" must be an object'),
        ([1, 2], 'an object with a "text"'),
        (None, 'an object with a "text"'),
    ],
)
def test_nasty_lines_are_one_line(tmp_path, line, says):
    "Each is refused with the number of its line, in a file; and with the number of the query, in a list."
    path = tmp_path / "q.jsonl"
    path.write_text('{"text": "fine"}\n\n' + json.dumps(line))
    with pytest.raises(ConfigError) as e:
        read_queries(path)
    assert says in str(e.value) and "line 3" in str(e.value) and "\n" not in str(e.value)
    if isinstance(line, dict):
        with pytest.raises(ConfigError, match="query 2"):
            as_queries(["fine", line])


def test_the_last_turn_is_measured_where_none_is_marked():
    "A conversation without keywords in its turns is one query, under its own id."
    (q,) = as_queries([dict(id="c", messages=[S, U, A, dict(role="user", content="last")], keywords=["k"])])
    assert (q.id, q.text, q.keywords, q.messages) == ("c", "last", ["k"], [S, U, A])
    assert q.prompt == [S, U, A, user("last")]


def test_a_query_object_is_checked_like_a_file():
    "Roles out of order are found before any work."
    with pytest.raises(ConfigError, match="query 1: message 2 has the role 'user'"):
        as_queries([Query(id="q", text="x", messages=[U])])


def test_resuming_compares_the_whole_conversation():
    "The same question after another history is another query."
    one, two = (Query(id="q", text="x", messages=m) for m in ([], [S]))
    assert differences(Results(queries=[one]), Results(queries=[two])) == ["queries"]


def test_a_conversation_survives_the_results_file():
    "Written and read back, a query asks the same."
    q = as_queries("chat")[2]
    assert Results.model_validate_json(Results(queries=[q]).model_dump_json()).queries[0].prompt == q.prompt


def test_each_set_is_measured_on_the_bundled_model():
    "One query of each: what fits is answered, and a document longer than the context is a row that says so."
    queries = [as_queries("default")[0], as_queries("chat")[4], as_queries("long")[0]]
    kw = dict(rounds=1, max_new_tokens=2, warmup=0, memory=False, progress=False)
    results = Comparison(queries, ["word_removal"], tiny(), **kw).run()
    failed = {r.query for r in results.runs if r.error}
    assert failed == {queries[2].id}
    assert all("context of 1,024" in r.error for r in results.runs if r.query in failed)
    rows = [r for r in results.runs if r.query == queries[1].id]
    assert len(rows) == 5 and all(r.output_text is not None and "Lantern Library" in r.prompt_text for r in rows)
    assert results.queries[1].prompt_tokens_base == rows[0].prompt_tokens
    assert len({q.sha256 for q in results.queries}) == 3


def test_documents_that_are_too_long_are_one_line_of_the_table():
    "The numbers in the reasons differ, the reason is the same; another reason has a line of its own."
    runs = [
        Run(arm=arm, query=f"q{i}", method="baseline", error=f"the prompt has {i},{i}00 tokens, the context 1,024")
        for arm in ("quality", "speed")
        for i in range(1, 6)
    ]
    runs.append(Run(arm="speed", query="q6", method="baseline", error="the query is empty"))
    shown = summary_text(Results(runs=runs))
    first = (
        "failed: baseline, quality and speed, query q1, q2, q3 and 2 more: such as: "
        "the prompt has 1,100 tokens, the context 1,024"
    )
    for reason in (first, "failed: baseline, speed, query q6: the query is empty"):
        assert " ".join(shown.split()).count(reason) == 1  # in lines of 100 columns
    assert shown.count("failed:") == 2


def test_memory_is_measured_with_the_longest_prompt(monkeypatch):
    "In tokens of the whole prompt; it is asked with its history."
    asked = []
    monkeypatch.setattr("llmopt.evaluation.comparison.peak_memory", lambda m, prompt, *a: asked.append(prompt) or {})
    many_characters = Query(id="a", text="one " * 400, prompt_tokens_base=410)
    talk = as_queries("chat")[0].model_copy(update=dict(prompt_tokens_base=600))
    c = Comparison([many_characters, talk], ["baseline"], progress=False)
    c.results.runs = [Run(arm="speed", query=q.id, method="baseline") for q in (many_characters, talk)]
    c.bar = tqdm(disable=True)
    c.memory_block()
    assert asked == [talk.prompt]


@pytest.mark.parametrize(
    "answered, longest",
    [
        (dict(baseline="abc", kv="ab", larosa=""), "b"),  # a method that answered nothing has no say
        (dict(baseline="ab", kv="c"), "c"),  # none was answered by both
        (dict(baseline="", kv=""), None),
    ],
)
def test_memory_is_compared_on_a_query_that_all_methods_answered(answered, longest):
    "Of three queries, the last the longest: one that a method refuses says nothing about its memory."
    c = Comparison(
        [Query(id=q, text=q, prompt_tokens_base=n) for n, q in enumerate("abc")], [*answered], progress=False
    )
    for method, ids in answered.items():
        for q in "abc":
            c.results.runs.append(Run(arm="speed", query=q, method=method, error=None if q in ids else "too long"))
    found = c.longest_answered()
    assert (found and found.id) == longest


@pytest.mark.parametrize(
    "line, says",
    [
        ('{"text": "a", "text": "b"}', "the key 'text' stands there 2 times"),
        ('{"messages": [{"role": "user", "content": "a", "content": "b"}]}', "the key 'content' stands there 2 times"),
        ('{"text": "a", "id": true}', '"id" must be'),
        ('{"text": "a", "id": ""}', '"id" must be'),
        ('{"text": "a", "id": " "}', '"id" must be'),
        ('{"text": "a", "keywords": ["b", "!!"]}', "keyword '!!' has no letter"),
        ('{"text": "a", "keywords": [""]}', "keyword '' has no letter"),
        ('{"text": "a", "keywords": 0}', '"keywords" must be a list of words'),
        ('{"text": "a", "keywords": ""}', '"keywords" must be a list of words'),
        ('{"text": "a", "keywords": {}}', '"keywords" must be a list of words'),
        (
            '{"messages": [{"role": "user", "content": "a", "keywords": ["b"]}], "keywords": 0}',
            '"keywords" must be a list',
        ),
        ('{"text": "a", "about": false}', '"about" must be an object'),
        ('{"messages": [{"role": "user", "content": "a", "keywords": ["?"]}]}', "keyword '[?]' has no letter"),
    ],
)
def test_lines_that_mean_two_things_or_none(tmp_path, line, says):
    "The last of two values would win, and a keyword without a letter is never found, or always."
    (tmp_path / "q.jsonl").write_text('{"text": "a", "id": 0, "keywords": ["C++", "水", "७"]}\n' + line)
    with pytest.raises(ConfigError, match=f"line 2: .*{says}"):
        read_queries(tmp_path / "q.jsonl")
