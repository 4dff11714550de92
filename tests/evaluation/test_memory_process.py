"The process that measures memory: one start for all methods, and nothing of one method in the next."

import json
import os
import signal
import sys
from threading import Timer

import pytest

from llmopt.errors import LlmoptError
from llmopt.evaluation.memory import MemoryProcess, peak_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux only")


def baseline(process):
    "Peak bytes of a plain answer, measured by `process`."
    return peak_memory("baseline", "What is rain?", n=2, process=process)["peak_rss_bytes"]


def test_one_process_for_all_methods():
    "A method that takes more leaves nothing behind; a process that was killed costs one measurement."
    with MemoryProcess() as p:
        first, server = baseline(p), p.process
        assert peak_memory("larosa:when=always", "What is rain?", n=2, process=p)["peak_rss_bytes"] > 1.05 * first
        assert p.process is server and abs(baseline(p) - first) < 0.02 * first
        os.kill(server.pid, signal.SIGSTOP)  # so that it cannot answer before it is killed
        Timer(0.2, server.kill).start()
        with pytest.raises(LlmoptError, match="ended before it answered"):
            baseline(p)
        assert abs(baseline(p) - first) < 0.02 * first
    assert p.process.poll() is not None


def test_an_interrupted_request_is_not_answered_later(monkeypatch):
    "Whoever asks after an interruption gets the answer to this question, from another process."
    asked = dict(method="baseline", text="hi", model="./none", device="cpu", dtype="auto", n=2)

    def interrupted(text):
        raise KeyboardInterrupt

    with MemoryProcess() as process:
        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            m.setattr(json, "loads", interrupted)
            process.peak(**asked)
        assert process.process.poll() is not None
