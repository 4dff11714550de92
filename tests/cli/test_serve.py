"`llmopt serve`: what is refused before it listens, and how it starts, talks and stops."

import os
import re
import signal
import socket
import subprocess
import sys
from functools import partial

import httpx
import pytest

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


def test_interactive_chat_goes_over_the_server():
    "In a process of its own: its threads write to the terminal of the process, which pytest takes away meanwhile."
    command = [sys.executable, "-m", "llmopt.cli", "serve", "--port", "0", "--methods", "baseline", "words"]
    lines = "What is rain?\n/method words\n/method kv\n/help\n/quit\n"
    p = subprocess.run([*command, "--interactive"], input=lines, capture_output=True, text=True)
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


def test_a_process_serves_until_it_is_told_to_stop():
    "Its first lines say where; SIGINT ends it as Ctrl-C does, without a traceback."
    command = [sys.executable, "-m", "llmopt.cli", "serve", "--port", "0", "--methods", "baseline"]
    env = dict(os.environ, LLMOPT_API_KEY="sesame", PYTHONUNBUFFERED="1")
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if os.name == "posix":  # a shell's background jobs, and so this test there, are told to ignore SIGINT
        pipes["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, env=env, **pipes) as process:
        try:
            url = next(m[1] for line in process.stdout if (m := re.match(r"page: (http://127.0.0.1:\d+)", line)))
            body = dict(model="llmopt-tiny", messages=[dict(role="user", content="Hello")], max_tokens=2)
            with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
                assert client.post("/v1/chat/completions", json=body).status_code == 401
                key = dict(authorization="Bearer sesame")
                assert client.post("/v1/chat/completions", json=body, headers=key).status_code == 200
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
            assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()
