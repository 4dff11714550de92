"""Fit the maps of `policy=foreseen` that come with llmopt: python nbs/models/kv_maps.py [llmopt-tiny] [smollm2]

Texts are what a map may be fitted to: validation articles of WikiText-2, questions and answers of ours and of MedQuAD,
rules of a game, and lists of identifiers (data/texts, llmopt/assets; licences in data/texts/README.md). None of them is
among the texts that `llmopt benchmark kv` asks about. A map takes some minutes on one core.
"""

import gzip
import json
import random
import re
import sys
from pathlib import Path

from llmopt.core import ASSETS, load
from llmopt.kv_cache.fit_foreseen import fit_map
from llmopt.kv_cache.foreseen import save_map

ROOT = Path(__file__).resolve().parents[2]


def lines(path) -> list:
    "The records of a file of JSON lines, which may be compressed."
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def joined(pairs, n, each, rng) -> list:
    "`n` texts of `each` questions with their answers."
    pairs = rng.sample(pairs, n * each)
    return ["\n\n".join(pairs[i * each : (i + 1) * each]) for i in range(n)]


def texts(seed: int = 0) -> list:
    "Thirty texts of five kinds."
    rng, data = random.Random(seed), ROOT / "data" / "texts"
    found = [r["text"] for r in lines(data / "wikitext2_articles.jsonl") if r["split"] == "valid"]
    found += joined([f"{r['question']} {r['answer']}" for r in lines(ASSETS / "calibration.jsonl")], 6, 25, rng)
    medical = [
        re.sub(r"<\|\w+\|>\n?", "", r["text"]) for r in lines(data / "medquad.jsonl.gz") if not r.get("held_out")
    ]
    found += joined(medical, 4, 20, rng)
    rules = [r["text"] for r in lines(data / "games_srd.jsonl.gz")]
    for at in rng.sample(range(len(rules) - 40), 4):
        found.append("\n\n".join(rules[at : at + 40]))
    found += [json.dumps(dict(pairs)) for pairs in lines(data / "kv_retrieval.jsonl")[:4]]
    rng.shuffle(found)
    return found


if __name__ == "__main__":
    for name in sys.argv[1:] or ("llmopt-tiny", "smollm2"):
        dtype = "bfloat16" if name == "smollm2" else "float32"
        found = fit_map(load(name, "cpu", dtype), texts(), keep=False)
        folder = save_map(found, ASSETS / f"{name}-kv-map")
        print(f"{folder}: {found.info['tokens']} tokens, explained {found.info['explained']}")
