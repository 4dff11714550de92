"""A comparison on two nodes of a cluster on this machine, one of which is killed while it measures."""

import threading
import time

import pytest

from llmopt.evaluation import compare, load

ray = pytest.importorskip("ray", reason="needs the extra ray: pip install 'llmopt[ray]'")
pytestmark = pytest.mark.slow
ASKED = dict(methods=["kv"], rounds=2, max_new_tokens=4, memory=False, progress=False)


@pytest.fixture
def two_nodes(monkeypatch):
    "A function that kills one of two nodes."
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    small = dict(num_cpus=1, object_store_memory=80 * 2**20)
    cluster = Cluster(initialize_head=True, head_node_args=small | dict(include_dashboard=False))
    node = cluster.add_node(**small)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    try:
        yield lambda: cluster.remove_node(node, allow_graceful=False)
    finally:
        ray.shutdown()
        cluster.shutdown()


def when_there_are(lines, path, act):
    "Call `act` in the background as soon as the file `path` has so many lines."

    def wait():
        while not path.exists() or path.read_bytes().count(b"\n") < lines:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_a_node_dies_while_it_measures(two_nodes, tmp_path):
    "Every cell is there once and without an error, answers are those of one machine, and the file says what happened."
    path = tmp_path / "r.json"
    killer = when_there_are(6, tmp_path / "r.json.journal", two_nodes)
    found = compare("default", output=path, backend="ray", **ASKED)
    killer.join()
    keys = [(r.arm, r.query, r.method, r.round) for r in found.runs]
    assert len(keys) == len({*keys}) == 5 * 2 + 5 * 2 * 3 and not any(r.error for r in found.runs)
    assert any("a node was lost" in w for w in found.warnings) and found.config["nodes"] == 2
    here = {
        (r.query, r.method): r.output_text
        for r in compare("default", **ASKED | dict(rounds=1)).runs
        if r.arm == "quality"
    }
    assert here == {(r.query, r.method): r.output_text for r in found.runs if r.arm == "quality"}
    assert load(path) == found and found.probe and found.ceilings


def test_a_cluster_goes_on_with_what_one_machine_began(two_nodes, tmp_path):
    "A file that was begun without a cluster; only what is missing is measured."
    path = tmp_path / "r.json"
    first = compare("default", output=path, **ASKED | dict(rounds=1))
    more = compare("default", output=path, backend="ray", resume=True, **ASKED)
    assert more.runs[: len(first.runs)] == first.runs and len(more.runs) == len(first.runs) + 5 * 3
