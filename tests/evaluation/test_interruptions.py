"""A comparison with engines that cost nothing: what is written when, what is refused, what is taken up again.

The engines answer at once and the model is the bundled one, so that a comparison can be broken off everywhere.
"""

import json
import os
from contextlib import contextmanager
from unittest import mock

import pytest
import torch

from helpers import tiny
from llmopt.engine import ChatMetrics
from llmopt.errors import ConfigError, LlmoptError, ResultsError
from llmopt.evaluation import comparison as C
from llmopt.evaluation import resuming, setup
from llmopt.evaluation import statistics as S
from llmopt.evaluation.files import Journal
from llmopt.evaluation.results import Query, Results, load

QUERIES = [Query(id="q1", text="What is rain?", keywords=["water"]), Query(id="q2", text="Why is snow white?")]
MACHINE = dict(cpu_model="a processor", torch="2", torch_num_threads=1, ram_bytes=8)
FIXED = dict(tpot_ms=1.0, e2el_ms=9.0, ttft_ms=2.0, preprocess_ms=0.5, prefill_ms=1.5, itl_ms=[1.0])
RATES = "prefill_tok_per_s prefill_eff_tok_per_s decode_tok_per_s decode_base_tok_per_s decode_char_per_s".split()
COUNTS = (
    "prompt_tokens prompt_tokens_base completion_tokens completion_tokens_base kv_bytes_live kv_bytes_peak "
    "kv_bytes_reserved kv_bytes_resident weight_bytes"
).split()


def an_answer(method, text, said):
    "`ChatMetrics` with round numbers."
    texts = dict(method=method, input_text=text, prompt_text=text, output_text=said, finish_reason="stop")
    return ChatMetrics(**texts, **FIXED, **dict.fromkeys(RATES, 5.0), **dict.fromkeys(COUNTS, 7), output_ids=[1, 2])


class Engine:
    "Answers with the name of its method; fails where `broken` says so."

    broken = {}  # (method, text) -> exception

    def __init__(self, method):
        self.method = method

    def run(self, text, **kw):
        if error := self.broken.get((self.method, text)):
            raise error
        return an_answer(self.method, text, f"water, says {self.method}")

    def score(self, text, ids):
        return torch.zeros(len(ids), 8).log_softmax(-1)


@pytest.fixture(autouse=True)
def engines(monkeypatch):
    "Every engine is an `Engine`, nothing is broken yet, and a hash of the weights is not what is tested here."
    monkeypatch.setattr(C, "make_engine", lambda lm, recipe: Engine(recipe.id))
    monkeypatch.setattr(setup, "weights_hash", lambda model: "weights")
    monkeypatch.setattr(C, "environment", lambda: dict(MACHINE))
    monkeypatch.setattr(C.Comparison, "take_apart", lambda self: None)  # it has tests of its own
    monkeypatch.setattr(S, "ratio_interval", lambda log_ratios: (1.0, 0.9, 1.1))  # the bootstrap has tests of its own
    monkeypatch.setattr(Engine, "broken", {})


def compare(output=None, queries=QUERIES, methods=("word_removal",), rounds=2, **kw):
    "A comparison of stand-ins."
    return C.compare(
        queries,
        list(methods),
        tiny(),
        rounds=rounds,
        max_new_tokens=4,
        output=output,
        memory=False,
        progress=False,
        **kw,
    )


class Killed(BaseException):
    "The process dies: nothing is tidied up that the system does not tidy up."


@contextmanager
def stopping_after(n, error):
    "Inside, the journal takes `n` lines, and then `error` is raised in place of each."
    append, count = Journal.append, [0]

    def counted(self, row):
        count[0] += 1
        if count[0] > n:
            raise error
        append(self, row)

    with (
        mock.patch.object(Journal, "append", counted),
        pytest.raises(type(error) if isinstance(error, Exception) else error),
    ):
        yield


@pytest.mark.parametrize("error", [KeyboardInterrupt, Killed])
def test_stopped_anywhere_and_taken_up_the_rows_are_the_same(tmp_path, monkeypatch, error):
    "After each line of the journal, by Ctrl-C or for good; and stopped a second time while it goes on."
    monkeypatch.setattr(C, "summarize", lambda results: results)
    whole = compare(tmp_path / "whole.json")
    for n in range(len(whole.runs) + 1):
        path = tmp_path / f"{n}.json"
        with stopping_after(n, error):
            compare(path)
        if n + 2 < len(whole.runs):
            with stopping_after(2, error):
                compare(path, resume=True)
        again = compare(path, resume=True)
        assert again.runs == whole.runs and load(path).runs == whole.runs
        assert not any("interrupted" in w for w in again.warnings)
        assert not (tmp_path / f"{n}.json.journal").exists()


def test_ctrl_c_leaves_a_file_that_says_so(tmp_path):
    "A valid results file with what was measured, and no journal."
    with stopping_after(4, KeyboardInterrupt):
        compare(tmp_path / "r.json")
    half = load(tmp_path / "r.json")
    assert len(half.runs) >= 3 and any(w.startswith("interrupted: ") for w in half.warnings)
    assert os.listdir(tmp_path) == ["r.json"]


def test_a_full_disk_keeps_the_journal(tmp_path):
    "The comparison ends in one line; what was measured is in the journal, and goes on when there is room."
    with stopping_after(5, ResultsError("cannot write 'r.json.journal': No space left on device")):
        compare(tmp_path / "r.json")
    assert os.listdir(tmp_path) == ["r.json.journal"]
    assert compare(tmp_path / "r.json", resume=True).runs == compare().runs


def test_an_unfinished_comparison_is_not_thrown_away(tmp_path):
    "Without `resume` it is refused, and stays as it is."
    with stopping_after(5, Killed):
        compare(tmp_path / "r.json")
    before = (tmp_path / "r.json.journal").read_bytes()
    with pytest.raises(ResultsError, match="unfinished comparison"):
        compare(tmp_path / "r.json")
    assert (tmp_path / "r.json.journal").read_bytes() == before


def test_two_at_once_the_second_is_refused_at_its_start(tmp_path, monkeypatch):
    "Before it has loaded a model; the first one ends as if nothing had been."
    usual, second = C.Comparison.setup, []

    def meanwhile(self):
        if not second:
            second.append("tried")
            with pytest.raises(ResultsError, match="another comparison is writing"):
                compare(tmp_path / "r.json")
        usual(self)

    monkeypatch.setattr(C.Comparison, "setup", meanwhile)
    assert compare(tmp_path / "r.json").runs == load(tmp_path / "r.json").runs and second


def test_earlier_results_are_kept_aside_and_other_files_refused(tmp_path):
    "Results get a number; what is no results file of llmopt is not touched; an empty file is as good as none."
    path = tmp_path / "r.json"
    path.write_text("")
    first = compare(path)
    second = compare(path, methods=["larosa"])
    assert load(tmp_path / "r.1.json").runs == first.runs and load(path).runs == second.runs
    assert any("r.1.json" in w for w in second.warnings)
    for text in ('{"a": 1}', "[1]", "Dear diary", "3"):
        path.write_text(text)
        for resume in (False, True):
            with pytest.raises(ResultsError):
                compare(path, resume=resume)
        assert path.read_text() == text
    assert sorted(os.listdir(tmp_path)) == ["r.1.json", "r.json"]


def test_what_goes_wrong_at_the_start_changes_nothing(tmp_path, monkeypatch):
    "A model that cannot be loaded: earlier results stand where they stood, and no journal is left."
    compare(tmp_path / "r.json")
    before = (tmp_path / "r.json").read_bytes()

    def fails(self):
        raise LlmoptError("no such model")

    monkeypatch.setattr(C.Comparison, "setup", fails)
    with pytest.raises(LlmoptError, match="no such model"):
        compare(tmp_path / "r.json")
    assert os.listdir(tmp_path) == ["r.json"] and (tmp_path / "r.json").read_bytes() == before


def changed(path, **changes):
    "Change entries of the results in `path`: dicts are updated, others replaced."
    d = json.loads(path.read_text())
    for k, v in changes.items():
        d[k] = d[k] | v if isinstance(v, dict) else v
    d["runs"] = d["runs"][:3]
    path.write_text(json.dumps(d))


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(environment=dict(cpu_model="another machine")), "cpu_model"),
        (dict(environment=dict(torch="1.0")), "torch"),
        (dict(environment=dict(torch_num_threads=77)), "torch_num_threads"),
        (dict(config=dict(weights_sha256="other")), "weights_sha256"),
        (dict(config=dict(chat_template_sha=None)), "chat_template_sha"),
        (dict(config=dict(max_new_tokens=5)), "max_new_tokens"),
        (dict(llmopt_version="0.0.1"), "llmopt_version"),
        (dict(kind="ask"), "kind"),
        (dict(environment={}, config={}), None),
    ],
)
def test_other_machines_versions_and_models_are_not_mixed(tmp_path, change, says):
    "Resuming names what differs; the file stays as it is. Where nothing differs, it goes on."
    path = tmp_path / "r.json"
    whole = compare(path)
    changed(path, **change)
    before = path.read_bytes()
    if says is None:
        assert compare(path, resume=True).runs == whole.runs
        return
    with pytest.raises(ResultsError, match=f"other {says}"):
        compare(path, resume=True)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["r.json"]


def test_other_keywords_are_other_queries(tmp_path):
    "Keyword recall depends on them."
    compare(tmp_path / "r.json")
    with pytest.raises(ResultsError, match="other queries"):
        compare(
            tmp_path / "r.json", queries=[q.model_copy(update=dict(keywords=["ice"])) for q in QUERIES], resume=True
        )


def test_failed_rows_are_measured_again(tmp_path, monkeypatch):
    "A row with an error is not taken up."
    monkeypatch.setattr(Engine, "broken", {("word_removal", QUERIES[0].text): ValueError("odd")})
    first = compare(tmp_path / "r.json")
    assert sum(r.error is not None for r in first.runs) == 3
    monkeypatch.setattr(Engine, "broken", {})
    again = compare(tmp_path / "r.json", resume=True)
    assert all(r.error is None for r in again.runs) and len(again.runs) == len(first.runs)
    assert not any("failed" in w for w in again.warnings)


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("x"), KeyError("a"), OSError("io"), AssertionError(), IndexError("i")]
)
def test_any_exception_is_one_row(tmp_path, monkeypatch, error):
    "The method fails on one query: its rows say why, all the others are measured, and the file is there."
    monkeypatch.setattr(Engine, "broken", {("word_removal", QUERIES[0].text): error})
    df = compare(tmp_path / "r.json").frame
    bad = df[df.error.notna()]
    assert set(bad.method) == {"word_removal"} and set(bad["query"]) == {"q1"} and len(bad) == 3
    assert bad.error.str.startswith(type(error).__name__).all() and not bad.error.str.contains("\n").any()
    assert len(df) == 2 * (2 * 3 + 2) and len(load(tmp_path / "r.json").runs) == len(df)


def test_where_the_baseline_fails_the_others_say_so(monkeypatch):
    "They answered, and there is nothing to compare with: no KL, no agreement, a note, and a warning."
    monkeypatch.setattr(Engine, "broken", {("baseline", QUERIES[0].text): RuntimeError("no")})
    res = compare()
    row = next(r for r in res.runs if (r.arm, r.query, r.method) == ("quality", "q1", "word_removal"))
    assert row.error is None and row.keyword_recall == 1 and row.kl_mean is None and row.top1_agree is None
    assert row.note == "kl_mean is undefined: the baseline failed on this query"
    assert any("kl_mean is null in 1 row of word_removal" in w for w in res.warnings)


@pytest.mark.parametrize("said", ["", "   ", "..."])
def test_empty_answers_are_no_perfect_match(monkeypatch, said):
    "Both answer nothing: what cannot be compared is null, with the reason."
    monkeypatch.setattr(Engine, "run", lambda self, text, **kw: an_answer(self.method, text, said))
    row = next(r for r in compare().runs if r.arm == "quality" and r.method == "word_removal")
    assert row.rougeL_vs_base is None and "is undefined: the baseline's answer" in row.note
    assert row.exact_match == (1 if said.strip() else None)
    assert row.kl_mean == 0 and row.top1_agree == 1  # its two tokens are the same, and were predicted alike


@pytest.mark.parametrize("value, says", [(float("nan"), "not a number"), (float("inf"), "not a number")])
def test_predictions_that_are_no_numbers_are_no_perfect_match(monkeypatch, value, says):
    "Neither KL 0 nor agreement 1 for a broken model, whichever of the two is broken."
    for broken in ("baseline", "word_removal", "both"):

        def score(self, text, ids, broken=broken):
            logits = torch.zeros(len(ids), 8)
            if broken in (self.method, "both"):
                logits[0, 3] = value
            return logits.log_softmax(-1)

        monkeypatch.setattr(Engine, "score", score)
        res = compare()
        row = next(r for r in res.runs if r.arm == "quality" and r.method == "word_removal")
        assert row.kl_mean is None and row.kl_p99 is None and row.top1_agree is None
        assert f"kl_mean is {says}" in row.note and any("kl_mean is null" in w for w in res.warnings)


def test_impossible_tokens_make_an_infinite_divergence_null(monkeypatch):
    "The method rules out what the baseline may say: infinite, so null, with the reason; the agreement is a number."

    def score(self, text, ids):
        logits = torch.zeros(len(ids), 8)
        logits[:, 5] = -float("inf") if self.method == "word_removal" else 0.0
        return logits.log_softmax(-1)

    monkeypatch.setattr(Engine, "score", score)
    row = next(r for r in compare().runs if r.arm == "quality" and r.method == "word_removal")
    assert row.kl_mean is None and "kl_mean is infinite" in row.note and row.top1_agree == 1


def test_bookkeeping_grows_with_the_rows(tmp_path, monkeypatch):
    "Twice the queries: at most 2.3 times the bytes written, and of the looks at what is measured already."
    append, work = Journal.append, {}

    class Counted(set):
        def __contains__(self, key):
            work["looks"] += 1
            return super().__contains__(key)

    def counted(self, row):
        append(self, row)
        work["bytes"] = max(work["bytes"], self.size)

    monkeypatch.setattr(Journal, "append", counted)
    monkeypatch.setattr(resuming, "save", lambda results, path: work.update(saved=work["saved"] + 1))
    seen = []
    for n in (10, 20, 40):
        work.update(looks=0, bytes=0, saved=0)
        queries, quiet = [Query(id=f"q{i}", text="Why?") for i in range(n)], dict(memory=False, progress=False)
        c = C.Comparison(queries, ["kv"], tiny(), tmp_path / f"{n}.json", rounds=1, **quiet)
        c.record.done = Counted()
        c.run()
        seen.append(dict(work))
    for a, b in zip(seen, seen[1:]):
        assert b["looks"] <= 2.3 * a["looks"] and b["bytes"] <= 2.3 * a["bytes"] and b["saved"] == a["saved"] == 1


def test_settings_that_cannot_be():
    "Each is refused in one line, before a model is loaded."
    for kw in (
        dict(rounds=0),
        dict(rounds=1.5),
        dict(methods=["turbo"]),
        dict(methods=[None]),
        dict(seed=-1),
        dict(resume=True),
        dict(output=os.devnull, resume=True),
        dict(queries=[]),
        dict(queries=[QUERIES[0], QUERIES[0]]),
    ):
        with pytest.raises(ConfigError) as e:
            compare(**kw)
        assert "\n" not in str(e.value)
    with pytest.raises(ConfigError, match="fresh processes"):
        C.compare(QUERIES, model=tiny(), progress=False)


def test_quick_is_obeyed_where_nothing_else_is_said(monkeypatch):
    "`quick` with `rounds` takes the rounds that were asked for."
    asked = []
    monkeypatch.setattr(C.Comparison, "run", lambda self: asked.append(self.config) or Results())
    for kw in ({}, dict(quick=True), dict(quick=True, rounds=3), dict(quick=True, max_new_tokens=9)):
        C.compare(QUERIES, model=tiny(), memory=False, **kw)
    assert [(c["rounds"], c["max_new_tokens"]) for c in asked] == [(5, 64), (1, 30), (3, 30), (1, 9)]


def test_a_device_gets_the_file_at_the_end(tmp_path, capsys):
    "`--output /dev/null` writes no journal beside it, and leaves the device what it is."
    compare(os.devnull)
    assert not os.path.exists(os.devnull + ".journal") and not os.path.isfile(os.devnull)


FOUR = ("word_removal", "simple_adaptivocab", "larosa", "hybrid_kv_cache")


def arms(results, *names):
    "The rows of `results` that measured one of `names`."
    return [r for r in results.runs if r.arm in names]


def test_a_design_grows(tmp_path, monkeypatch):
    "`full` after `ten`: what was answered is kept, times are measured beside each other, the old ones put aside."
    monkeypatch.setattr(C, "summarize", lambda results: results)
    path = tmp_path / "r.json"
    ten = compare(path, methods=FOUR, design="ten", rounds=1)
    full = compare(path, methods=FOUR, design="full", rounds=1, resume=True)
    assert (len(ten.methods), len(full.methods), full.config["design"]) == (10, 16, "full")
    assert arms(full, "quality")[: len(QUERIES) * 10] == arms(ten, "quality")
    assert len(arms(full, "quality")) == len(QUERIES) * 16 and len(arms(full, "speed")) == len(QUERIES) * 17
    assert load(tmp_path / "r.1.json").runs == ten.runs and any("r.1.json" in w for w in full.warnings)
    with pytest.raises(ResultsError, match="other methods"):
        compare(path, methods=FOUR, design="ten", rounds=1, resume=True)


def test_more_rounds_are_added(tmp_path):
    "The rounds that are there stay as they are; fewer rounds are another experiment."
    path = tmp_path / "r.json"
    first, more = compare(path, rounds=1), compare(path, rounds=3, resume=True)
    assert more.runs[: len(first.runs)] == first.runs and {r.round for r in more.runs} == {0, 1, 2}
    assert os.listdir(tmp_path) == ["r.json"]
    with pytest.raises(ResultsError, match="other rounds"):
        compare(path, rounds=2, resume=True)


def test_killed_while_it_grows(tmp_path, monkeypatch):
    "The journal of the larger design and the file of the smaller one together are taken up; a half one does not grow."
    monkeypatch.setattr(C, "summarize", lambda results: results)
    path = tmp_path / "r.json"
    with stopping_after(5, Killed):
        compare(path, methods=FOUR, design="ten", rounds=1)
    with pytest.raises(ResultsError, match="finish it"):
        compare(path, methods=FOUR, design="full", rounds=1, resume=True)
    ten = compare(path, methods=FOUR, design="ten", rounds=1, resume=True)
    for n in (2, 12):
        with stopping_after(n, Killed):
            compare(path, methods=FOUR, design="full", rounds=1, resume=True)
    full = compare(path, methods=FOUR, design="full", rounds=1, resume=True)
    keys = [(r.arm, r.query, r.method, r.round) for r in full.runs]
    assert len({*keys}) == len(keys) == len(QUERIES) * (16 + 17) and not (tmp_path / "r.json.journal").exists()
    assert {r.method for r in arms(ten, "quality")} < {r.method for r in arms(full, "quality")}
