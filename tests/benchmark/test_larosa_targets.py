"The targets of a stored run follow from its tables."

import json

from helpers import DATA
from llmopt.benchmark.larosa import larosa_targets


def test_stored_targets_follow_from_the_stored_tables():
    stored = json.loads((DATA / "benchmark_larosa.json").read_text(encoding="utf-8"))["tables"]
    assert json.loads(json.dumps(larosa_targets(stored))) == stored["targets"]


def test_a_variant_that_loses_nothing_has_no_ratio():
    "Texts without a loss give a target without a value, not a division by zero."
    rows = [dict(p=0.5, arm=a, kl=0.0) for a in ("threshold", "top-k", "published", "basis learned")]
    targets = larosa_targets(dict(kernel=[], step=[], ablation=rows))
    assert len(targets) == 4 and all(t["measured"] is None and t["met"] is None for t in targets)
