"The process that measures memory: one start for all methods, and nothing of one method in the next."

import json
import os
import signal
import sys
from threading import Timer

import pytest

from llmopt.errors import LlmoptError
from llmopt.evaluation import memory
from llmopt.evaluation.memory import MemoryProcess, peak_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux only")


def baseline(process):
    "Peak bytes of a plain answer, measured by `process`."
    return peak_memory("baseline", "What is rain?", n=2, process=process)["peak_rss_bytes"]


def test_one_process_for_all_methods():
    "A method that takes more leaves nothing behind, and the process ends with its context."
    with MemoryProcess() as p:
        first, server = baseline(p), p.process
        assert peak_memory("larosa:when=always", "What is rain?", n=2, process=p)["peak_rss_bytes"] > 1.05 * first
        assert p.process is server and abs(baseline(p) - first) < 0.02 * first
    assert p.process.poll() is not None


ECHO = "import json, sys\nfor line in sys.stdin: print(json.dumps(json.loads(line) | dict(exitcode=0)), flush=True)"


@pytest.fixture
def ask(monkeypatch):
    "A function that asks a process which has nothing to load: its reply is the question."
    monkeypatch.setattr(memory, "SERVER", ECHO)
    with MemoryProcess() as process:

        def ask(text):
            return process.peak(text=text)["text"]

        assert ask("one") == "one"
        ask.process = process
        yield ask


def test_a_process_that_was_killed_costs_one_measurement(ask):
    "The next one is measured by another process."
    server = ask.process.process
    os.kill(server.pid, signal.SIGSTOP)  # so that it cannot answer before it is killed
    Timer(0.2, server.kill).start()
    with pytest.raises(LlmoptError, match="ended before it answered"):
        ask("two")
    assert ask("three") == "three" and ask.process.process is not server


def test_an_interrupted_request_is_not_answered_later(ask, monkeypatch):
    "Whoever asks after an interruption gets the answer to this question, from another process."

    def interrupted(text):
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(json, "loads", interrupted)
        ask("two")
    assert ask.process.process.poll() is not None
    assert ask("three") == "three"
