"The `llmopt` command as a user meets it: what it prints, its exit codes, and what bad input gets."

import contextlib
import io
import json
import os
import signal
import subprocess
import time
import warnings

import pytest
from forked import run_command, start_command

from llmopt.cli import main
from llmopt.visualization.charts import KINDS

SHORT = "--quick", "--max-new-tokens", "6"


def fresh(*args, cwd, **kw):
    "Run the command in a process of its own; a traceback is always a failure."
    p = run_command(*args, cwd=cwd, **kw)
    assert "Traceback" not in p.stderr, p.stderr
    return p


def llmopt(*args, cwd):
    "Run the command here, in folder `cwd` (an exception that escapes fails the test)."
    out, err, here = io.StringIO(), io.StringIO(), os.getcwd()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        os.chdir(cwd)
        try:
            code = main([*map(str, args)])
        except SystemExit as e:
            code = e.code
        finally:
            os.chdir(here)
    return subprocess.CompletedProcess(args, code or 0, out.getvalue(), err.getvalue())


def refused(*args, cwd, says):
    "The command ends with exit code 2 and one line on stderr that holds each of `says`."
    p = llmopt(*args, cwd=cwd)
    lines = [l for l in p.stderr.splitlines() if l.strip() and not l.endswith(" ...")]  # phases end in dots
    assert p.returncode == 2 and len(lines) == 1, (p.returncode, p.stderr)
    assert all(s in lines[0] for s in says), lines[0]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    "A quick comparison in an empty folder."
    d = tmp_path_factory.mktemp("compare")
    (d / "q.jsonl").write_text('{"text": "What is rain made of?", "keywords": ["water"]}\n')
    return d, fresh("compare", *SHORT, "--methods", "word_removal", "hybrid_kv_cache", "--queries", "q.jsonl", cwd=d)


def test_compare(compared):
    d, p = compared
    assert p.returncode == 0, p.stderr
    for s in (
        "baseline",
        "word_removal",
        "TTFT",
        "peak",
        "multi_query_results.json",
        "100%",
        "kind input_output_pairs",
    ):
        assert s in p.stdout + p.stderr
    assert max(map(len, p.stdout.split("\n\n")[0].splitlines())) <= 100
    r = json.loads((d / "multi_query_results.json").read_text())
    assert (
        r["schema_version"] == 2
        and r["kind"] == "compare"
        and {x["arm"] for x in r["runs"]} == {"speed", "quality", "memory"}
    )
    assert all(x["output_text"] and x["prompt_text"] for x in r["runs"] if x["arm"] != "memory") and not any(
        x["error"] for x in r["runs"]
    )


def test_ask_and_plot(tmp_path):
    p = llmopt(
        "ask", "--message", "Why is the sea salty?", *SHORT, "--no-memory", "--methods", "word_removal", cwd=tmp_path
    )
    assert p.returncode == 0 and "--- word_removal" in p.stdout, p.stderr
    assert json.loads((tmp_path / "comprehensive_results.json").read_text())["kind"] == "ask"
    kinds = "time_metrics", "token_metrics", "memory_metrics", "efficiency_metrics", "comprehensive_dashboard"
    p = llmopt("plot", "comprehensive_results.json", "--output", ".", "--kind", *kinds, cwd=tmp_path)
    assert p.returncode == 0, p.stderr
    assert {f.name for f in tmp_path.glob("*.png")} == {f"{k}.png" for k in kinds}


def test_chat(tmp_path):
    p = fresh("chat", "--max-new-tokens", "8", cwd=tmp_path, input="/stats\nHello!\n/stats\n/reset\n")
    assert p.returncode == 0 and "nothing answered yet" in p.stdout and "| first token " in p.stdout, p.stderr


def test_unknown_and_unknown_methods(tmp_path):
    refused("compare", "--methods", "baseline", "turbo", cwd=tmp_path, says=["unknown method 'turbo'", "word_removal"])
    refused("compare", "--methods", "words:n=1", cwd=tmp_path, says=["n"])
    assert not list(tmp_path.iterdir())


def test_bad_models(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    refused("compare", "--model", "./none", cwd=tmp_path, says=["no model folder"])
    refused("compare", "--model", "empty", cwd=tmp_path, says=["config.json"])
    refused("compare", "--model", "./broken", cwd=tmp_path, says=["could not be loaded"])
    refused("compare", "--model", "some-org/some-model", cwd=tmp_path, says=["hf download", "llmopt-tiny"])
    refused("ask", "--message", "hi", "--device", "tpu9", cwd=tmp_path, says=["unknown device"])


def test_bad_queries_and_output(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"text": "fine"}\n{"text": broken}\n')
    refused("compare", "--queries", "q.jsonl", cwd=tmp_path, says=["line 2"])
    refused("compare", "--queries", "none.jsonl", cwd=tmp_path, says=["cannot read queries"])
    refused("compare", "--quick", "--output", "no/such/dir/r.json", cwd=tmp_path, says=["cannot write"])
    refused("compare", "--quick", "--output", ".", cwd=tmp_path, says=["cannot write", "folder"])
    refused("ask", "--message", "  ", "--quick", "--no-memory", cwd=tmp_path, says=["message is empty"])


def test_bad_results_files(tmp_path, compared):
    text = (compared[0] / "multi_query_results.json").read_text()
    for name, t, says in (
        ("half.json", text[: len(text) // 2], "truncated"),
        ("v9.json", text.replace('"schema_version": 2', '"schema_version": 9', 1), "version 9"),
        ("x.json", "{}", "no llmopt results"),
    ):
        (tmp_path / name).write_text(t)
        refused("plot", name, cwd=tmp_path, says=[says])
    refused("plot", "none.json", cwd=tmp_path, says=["no results file"])
    (tmp_path / "half.json").write_text(text[:99])
    refused("compare", "--quick", "--resume", "--output", "half.json", cwd=tmp_path, says=["truncated"])
    refused(
        "plot",
        compared[0] / "multi_query_results.json",
        "--kind",
        "pie",
        cwd=tmp_path,
        says=["pie", "quality_comparison"],
    )


def test_every_chart_of_a_comparison(compared, tmp_path):
    "Without --kind all charts are drawn that suit the file."
    p = llmopt("plot", compared[0] / "multi_query_results.json", cwd=tmp_path)
    assert p.returncode == 0, p.stderr
    assert {f.stem for f in (tmp_path / "plots").iterdir()} == {k for k, (_, of) in KINDS.items() if "compare" in of}


ROUNDS = 14  # enough that a signal after the first ones comes long before the last


@pytest.mark.skipif(os.name == "nt", reason="signals differ on Windows")
def test_interrupt_and_resume(tmp_path):
    "Ctrl-C half-way: exit code 130, a valid file, and --resume measures only the rest."
    (tmp_path / "q.jsonl").write_text('{"text": "What is rain?"}\n{"text": "Why is snow white?"}\n')
    args = [
        "compare",
        "--queries",
        "q.jsonl",
        "--methods",
        "baseline",
        "word_removal",
        "--rounds",
        str(ROUNDS),
        "--max-new-tokens",
        "4",
        "--no-memory",
        "--output",
        "r.json",
    ]
    streams = tmp_path / "streams"
    streams.mkdir()
    p = start_command(*args, cwd=tmp_path, streams=streams)
    f, journal, t = tmp_path / "r.json", tmp_path / "r.json.journal", time.time()

    def speed():
        return journal.exists() and journal.read_text().count('{"run": {"arm": "speed"') >= 6

    while not speed() and time.time() - t < 120:
        time.sleep(0.02)
    os.kill(p.pid, signal.SIGINT)
    p.join(60)
    err = (streams / "err").read_text(encoding="utf-8")
    assert p.exitcode == 130 and "--resume" in err and "Traceback" not in err, err
    half = json.loads(f.read_text())
    assert any("interrupted" in w for w in half["warnings"]) and len(half["runs"]) >= 6
    refused(*(a.replace(str(ROUNDS), "13") for a in args), "--resume", cwd=tmp_path, says=["other rounds"])
    assert llmopt(*args, "--resume", cwd=tmp_path).returncode == 0 and not journal.exists()
    whole, n = json.loads(f.read_text()), len(half["runs"])
    assert whole["runs"][:n] == half["runs"] and not any("interrupted" in w for w in whole["warnings"])
    methods = {r["method"] for r in whole["runs"]}
    assert len(whole["runs"]) == 2 * ROUNDS * len(methods) + 2 * (
        len(methods) - 1
    )  # the second baseline is in the speed arm alone


def test_benchmark(tmp_path):
    (tmp_path / "t.jsonl").write_text(
        '{"text": "The old mill by the river grinds corn. The old mill by the river is closed on Monday."}\n' * 4
    )
    p = llmopt("benchmark", "vocab", "--quick", "--texts", "t.jsonl", cwd=tmp_path)
    assert p.returncode == 0 and "saved" in p.stdout, p.stderr
    r = json.loads((tmp_path / "benchmark_vocab.json").read_text())
    assert r["environment"]["torch"] and r["tables"]["saved"][0]["saved"] > 0
    refused("benchmark", "vocab", "--output", "no/such", cwd=tmp_path, says=["cannot write"])


def test_help_names_every_command(tmp_path):
    top = llmopt("--help", cwd=tmp_path).stdout
    for c in ("compare", "ask", "chat", "plot", "benchmark"):
        assert c in top and ("--method" if c == "chat" else "--output") in llmopt(c, "--help", cwd=tmp_path).stdout
    assert llmopt("--version", cwd=tmp_path).stdout.startswith("llmopt ")
