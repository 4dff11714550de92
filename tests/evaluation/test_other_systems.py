"What macOS and Windows do not have, hidden here: the measurements go on without it."

import gc
import mmap
import time
from pathlib import Path

import psutil
import pytest

from llmopt.evaluation import machine as M


@pytest.fixture
def no_proc(monkeypatch):
    "A system without `/proc`."
    for name in ("read_text", "write_text"):
        usual = getattr(Path, name)

        def hidden(self, *args, usual=usual, **kw):
            if str(self).startswith("/proc"):
                raise FileNotFoundError(str(self))
            return usual(self, *args, **kw)

        monkeypatch.setattr(Path, name, hidden)


def test_peak_memory_is_sampled(no_proc):
    "A thread looks every 10 ms and sees pages that are held long enough."
    gc.collect()
    with M.PeakRSS() as memory, mmap.mmap(-1, 128 * 2**20) as pages:
        pages[:: mmap.PAGESIZE] = bytes(len(pages) // mmap.PAGESIZE)  # touch every page
        deadline = time.monotonic() + 20
        while memory.seen - memory.start < 100 * 2**20 and time.monotonic() < deadline:
            time.sleep(0.02)
    assert memory.thread and memory.delta > 100 * 2**20 and memory.peak >= memory.delta


def test_a_mark_that_is_not_kept_is_sampled_too(monkeypatch):
    "Sandboxes take the reset and show no mark."
    monkeypatch.setattr(M, "_high_water_mark", lambda: None)  # private: stands for a file of the system
    with M.PeakRSS() as memory:
        time.sleep(0.05)
    assert memory.thread and memory.peak >= memory.start


def test_the_machine_is_described(no_proc, monkeypatch):
    "The processor has some name; a battery that the system cannot tell of is unknown."
    monkeypatch.delattr(psutil, "sensors_battery", raising=False)
    found = M.environment()
    assert found["cpu_model"] and found["on_battery"] is None and found["ram_bytes"]
