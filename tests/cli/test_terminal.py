"What a user meets in a terminal: any encoding, closed pipes, unforeseen errors, help, and commands of the chat."

import io
import json
import os
import subprocess
import sys

import pytest

import llmopt.cli.entry as entry
from llmopt.cli import main
from llmopt.cli.streams import ISSUES

BASELINE = ["--methods", "baseline", "--max-new-tokens", "2", "--rounds", "1", "--no-memory"]


@pytest.fixture
def terminal(tmp_path, monkeypatch):
    "Runs the command as in a terminal of some encoding, in an empty folder: (exit code, output, errors)."
    monkeypatch.chdir(tmp_path)

    def run(*args, encoding="utf-8", typed=b""):
        streams = {n: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for n in ("stdout", "stderr")}
        streams["stdin"] = io.TextIOWrapper(io.BytesIO(typed), encoding=encoding)
        with monkeypatch.context() as m:
            for name, stream in streams.items():
                m.setattr(sys, name, stream)
            try:
                code = main([str(a) for a in args])
            except SystemExit as e:  # of argparse
                code = e.code
            out, err = (streams[n].detach().getvalue().decode(encoding) for n in ("stdout", "stderr"))
        assert "Traceback" not in out + err
        return code, out, err

    return run


def refused(result, *says):
    "Exit code 2 and one line that holds each of `says`."
    code, _, err = result
    lines = [l for l in err.splitlines() if l.strip() and not l.startswith("note:") and not l.endswith(" ...")]
    assert code == 2 and len(lines) == 1, (code, err)
    assert all(s in lines[0] for s in says), lines[0]


# ## Encodings


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_a_terminal_that_cannot_show_the_text(terminal, encoding):
    code, out, err = terminal("ask", "--message", "Say \u2603 日本", *BASELINE, encoding=encoding)
    assert code == 0 and "results:" in out, err
    code, out, err = terminal("ask", "--message", "Say \u2603", "--methods", "日本", encoding=encoding)
    assert code == 2 and ("日本" if encoding == "utf-8" else r"\u65e5\u672c") in err


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bytes_that_are_no_text(terminal, tmp_path):
    "An argument and a line of input in another encoding than the terminal's."
    code, out, err = terminal("ask", "--message", "caf\udce9", *BASELINE)
    assert code == 0, err
    stored = json.loads((tmp_path / "comprehensive_results.json").read_text(encoding="utf-8"))
    assert stored["queries"][0]["text"] == "caf\ufffd"
    code, out, err = terminal("chat", "--max-new-tokens", 2, "--system", "\udcff!", typed=b"caf\xe9\n")
    assert code == 0 and out.count(">") == 2, (out, err)
    refused(terminal("compare", "--model", "./\udce9"), "no model folder")
    refused(terminal("compare", "--methods", "\udce9"), "unknown method")


# ## Options


def test_what_is_said_explicitly_is_obeyed(terminal, tmp_path):
    "`--quick` gives the defaults for what you do not say."
    assert (
        terminal("compare", "--quick", *BASELINE[:4], "--rounds", 2, "--no-memory", "--queries", queries(tmp_path))[0]
        == 0
    )
    config = json.loads((tmp_path / "multi_query_results.json").read_text())["config"]
    assert (config["rounds"], config["max_new_tokens"]) == (2, 2)


def test_a_question_may_stand_by_itself(terminal, tmp_path):
    "With `--message`, in quotes, or as words; before the options or behind one that takes no value."
    for args in (["--message", "What is rain?"], ["What is rain?"], ["What", "is", "rain?"]):
        assert terminal("ask", *args, *BASELINE)[0] == 0
        stored = json.loads((tmp_path / "comprehensive_results.json").read_text(encoding="utf-8"))
        assert [q["text"] for q in stored["queries"]] == ["What is rain?"]
    assert terminal("ask", "--quick", "What is rain?", *BASELINE)[0] == 0


def test_no_question_or_two(terminal, tmp_path):
    "An empty message is named as such, even where an unfinished comparison would be refused, too."
    (tmp_path / "comprehensive_results.json.journal").write_text('{"journal": "llmopt"}\n')
    refused(terminal("ask", "--message", ""), "the message is empty")
    refused(terminal("ask", " ", "--quick"), "the message is empty")
    refused(terminal("ask"), "the message is empty")
    refused(terminal("ask", "Why?", "--message", "What?"), "two questions, 'What?' and 'Why?'")


def queries(folder):
    "A file with one short query."
    (folder / "q.jsonl").write_text('{"text": "What is rain?"}\n')
    return "q.jsonl"


@pytest.mark.parametrize(
    "args",
    [
        ("compare", "--rounds", "0"),
        ("compare", "--rounds", "9" * 5000),
        ("compare", "--max-new-tokens", "1"),
        ("compare", "--seed", "-1"),
        ("chat", "--temperature", "-1"),
        ("chat", "--temperature", "nan"),
        ("chat", "--max-new-tokens", "0"),
        ("chat", "--method", "words+words:n=2"),
        ("chat", "--method", "words:n"),
        ("compare", "--methods", "words:protect=re:("),
        ("compare", "--methods", "kv+kv"),
        ("compare", "--methods", 'words:protect=["a"'),
        ("compare", "--output", "x" * 300),
        ("ask", "--message", "hi", "--output", "no/such/folder/x.json"),
        ("ask",),
        ("fly",),
        (),
        ("plot", "x" * 300),
        ("plot", "\0"),
        ("benchmark", "speed"),
        ("benchmark", "kv", "--quick", "--model", "no/such/model"),
        ("benchmark", "kv", "--quick", "--texts", "mine.jsonl"),
        ("benchmark", "vocab", "--quick", "--output", "x" * 300),
        ("compare", "--queries", "\0"),
        ("compare", "--model", "x" * 5000),
        ("compare", "--model", "\0"),
        ("chat", "--device", "\0"),
        ("chat", "--dtype", "\n"),
    ],
)
def test_one_line_for_a_mistake(terminal, args):
    refused(terminal(*args), "llmopt: error:")


# ## Errors of our own


def test_an_unforeseen_error_is_one_line_and_where_to_report_it(terminal, monkeypatch, capsys):
    def broken(a):
        raise KeyError("oops")

    monkeypatch.setitem(entry.COMMANDS, "plot", broken)
    code, _, err = terminal("plot", "x.json")
    assert code == 3 and len(err.splitlines()) == 1 and "KeyError" in err and ISSUES in err
    monkeypatch.setenv("LLMOPT_DEBUG", "1")
    assert main(["plot", "x.json"]) == 3 and "Traceback" in capsys.readouterr().err
    monkeypatch.delenv("LLMOPT_DEBUG")
    assert main(["plot", "x.json", "--debug"]) == 3 and "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error, says",
    [
        (OSError(28, "No space left on device", "r.json"), "No space left on device: 'r.json'"),
        (MemoryError(), "not enough memory"),
        (PermissionError(13, "Permission denied"), "Permission denied"),
    ],
)
def test_errors_of_the_system(terminal, monkeypatch, error, says):
    def broken(a):
        raise error

    monkeypatch.setitem(entry.COMMANDS, "plot", broken)
    refused(terminal("plot", "x.json"), says)


@pytest.mark.skipif(os.name == "nt", reason="pipes differ on Windows")
def test_a_reader_that_goes_away():
    "`llmopt compare --help | head -1`: no traceback, and no complaint at the end."
    command = f"{sys.executable} -m llmopt.cli compare --help | head -1; exit ${{PIPESTATUS[0]}}"
    p = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert p.stdout.startswith("usage:") and "Traceback" not in p.stderr and "Exception" not in p.stderr, p.stderr


# ## Help


def test_help_names_methods_parameters_and_examples(terminal):
    _, out, _ = terminal("compare", "--help")
    for s in ("word_removal, words", "n=3", "hybrid_kv_cache, kv", "sparsity=0.4", "examples:", "words:n=2+kv"):
        assert s in out
    assert all(len(l) <= 120 for l in out.splitlines())


def test_help_names_the_charts(terminal):
    _, out, _ = terminal("plot", "--help")
    assert "quality_comparison" in out and "comprehensive_dashboard" in out


# ## Chat


def test_commands_of_the_chat(terminal):
    "What begins with a slash is not sent to the model; a mark says where an answer was cut."
    typed = b"/stats\n/rest now\n/help\nHello!\n/stats\n//slash\n/reset\n/quit\nnever read\n"
    code, out, err = terminal("chat", "--max-new-tokens", "3", typed=typed)
    assert code == 0, err
    for s in ("nothing answered yet", "no /rest", "/reset", "[cut after 3 tokens]", "| first token ", "forgotten"):
        assert s in out
    assert out.count("[cut after") == 2


def test_errors_do_not_end_the_chat(terminal):
    typed = b"why " * 2000 + b"\nWhat is rain?\n"
    code, out, err = terminal("chat", "--max-new-tokens", "3", typed=typed)
    assert code == 0 and "context of 1,024" in out and "/reset forgets" in out and "[cut after" in out, err


def test_end_of_input_ends_the_chat(terminal):
    assert terminal("chat", typed=b"")[0] == 0


def test_commands_with_something_behind_them_and_in_capitals(terminal):
    "The first word is the command; whatever is unknown is still not sent to the model."
    code, out, _ = terminal("chat", typed=b"/HELP me\n/stats now\n/exit\n/ \n/Quit please\nnever read\n")
    assert code == 0 and "/reset" in out and "nothing answered yet" in out and "no /exit" in out
    assert out.count(">") == 5


def test_nothing_measured_is_one_line_and_1(terminal):
    "Every row failed: the table says so, the error stream too."
    code, out, err = terminal("ask", "why " * 2000, *BASELINE)
    assert code == 1 and "context of 1,024" in out
    assert [l for l in err.splitlines() if l.startswith("llmopt: error:")] == [
        "llmopt: error: nothing could be measured; the reasons stand below the table"
    ]


@pytest.mark.parametrize("value, shown", [("0", False), ("", False), ("1", True)])
def test_debugging_can_be_switched_off(monkeypatch, capsys, value, shown):
    monkeypatch.setenv("LLMOPT_DEBUG", value)
    assert main(["plot", "none.json"]) == 2 and ("Traceback" in capsys.readouterr().err) == shown


@pytest.mark.skipif(os.name == "nt", reason="redirections of bash")
@pytest.mark.parametrize(
    "redirected, code, says",
    [
        ("plot none.json >&-", 2, "no results file"),
        ("plot none.json > /dev/full", 2, "no results file"),
        ("chat <&-", 0, ""),
    ],
)
def test_streams_that_are_full_or_closed(tmp_path, redirected, code, says):
    "No traceback, no complaint at the end, and the exit code of what happened."
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = f"{sys.executable} -m llmopt.cli {redirected}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == code and says in done.stderr, (done.returncode, done.stderr)
    said = [line for line in done.stderr.splitlines() if not line.endswith(" ...")]  # phases, which end in dots
    assert len(said) <= 1 and "Exception" not in done.stderr, done.stderr
