"`llmopt serve`: what is refused before it listens, and how it starts, talks and stops."

import os
import re
import signal
import socket

import httpx
import pytest
from forked import run_command, start_command

from llmopt.cli import entry, main
from llmopt.cli.parser import SERVED

pytest.importorskip("fastapi", reason="needs the extra server: pip install 'llmopt[server]'")
from llmopt.server.registry import RECIPES  # noqa: E402


def refused(capsys, *args):
    "The one line that `llmopt serve` ends with."
    assert main(["serve", *args]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.endswith(" ...")]
    assert len(lines) == 1 and lines[0].startswith("llmopt: error: ")
    return lines[0]


def test_without_the_extra_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(entry, "find_spec", lambda name: None)
    assert "pip install 'llmopt[server]'" in refused(capsys)


@pytest.mark.parametrize(
    "args, says",
    [
        (["--host", "0.0.0.0"], "--api-key"),
        (["--host", "0.0.0.0", "--api-key", " "], "empty"),
        (["--methods", "turbo"], "unknown method"),
        (["--model", "llmopt-tiny", "./none"], "no model folder"),
        (["--host", "256.1.1.1", "--api-key", "k"], "cannot listen"),
        (["--port", "70000"], "cannot listen"),
    ],
)
def test_what_cannot_be_is_one_line(capsys, monkeypatch, args, says):
    monkeypatch.delenv("LLMOPT_API_KEY", raising=False)
    assert says in refused(capsys, *args)


def test_a_port_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "another --port" in refused(capsys, "--port", str(taken.getsockname()[1]))


def test_interactive_chat_goes_over_the_server(tmp_path):
    "In a process of its own: its threads write to the terminal of the process, which pytest takes away meanwhile."
    lines = "What is rain?\n/method words\n/method kv\n/help\n/quit\n"
    words = "serve", "--port", "0", "--methods", "baseline", "words", "--interactive"
    p = run_command(*words, cwd=tmp_path, input=lines)
    assert p.returncode == 0, p.stderr
    said = p.stdout
    assert (
        "models:\n  llmopt-tiny\n" in said
        and "llmopt-tiny, baseline" in said
        and "now word_removal" in said
        and "kv was not named when the server started (--methods ... kv)" in said
        and " another one that is served; the conversation goes on:\n" in said
        and said.count("\n") > 5
    )


def test_help_names_what_is_served_without_methods():
    "The names are written down twice, so that help needs no torch."
    assert SERVED.split() == [*RECIPES]


def url_in(path, process):
    "The address that a server which begins has written to the file at `path`."
    while process.is_alive():
        if found := path.exists() and re.search(r"^page: (http://127.0.0.1:\d+)", path.read_text(), re.M):
            return found[1]
        process.join(0.05)
    raise AssertionError("it ended before it served")


def test_a_process_serves_until_it_is_told_to_stop(tmp_path):
    "Its first lines say where; SIGINT ends it as Ctrl-C does, without a traceback."
    words = "serve", "--port", "0", "--methods", "baseline"
    process = start_command(*words, cwd=tmp_path, streams=tmp_path, env=dict(LLMOPT_API_KEY="sesame"))
    try:
        body = dict(model="llmopt-tiny", messages=[dict(role="user", content="Hello")], max_tokens=2)
        with httpx.Client(base_url=url_in(tmp_path / "out", process), timeout=60, trust_env=False) as client:
            assert client.post("/v1/chat/completions", json=body).status_code == 401
            key = dict(authorization="Bearer sesame")
            assert client.post("/v1/chat/completions", json=body, headers=key).status_code == 200
        os.kill(process.pid, signal.SIGINT)
        process.join(30)
        assert process.exitcode == 130
        assert "Traceback" not in (tmp_path / "err").read_text()
    finally:
        process.kill()
