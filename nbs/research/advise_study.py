"""Does `llmopt advise` choose well? Recordings, real runs and replays for `advise.ipynb`.

    python nbs/research/advise_study.py MODEL [record] [run] [replay]      # MODEL: llmopt-tiny or smollm2; all steps

- `record` measures every recipe on every prompt, which is the exhaustive search; it goes on where it was stopped
- `run` is `llmopt advise` itself, twice, and once where nothing can win
- `replay` repeats the search on the recording, for other goals, floors and splits of the prompts

Files go to `data/` and `data/smollm2/`. What is there is kept; delete a file to make it anew. Run it alone.
"""

import argparse
import itertools
import json
import random
from functools import cache
from pathlib import Path

import numpy as np

from llmopt.core import ASSETS, load
from llmopt.core.progress import announce
from llmopt.evaluation import advice_text, advise
from llmopt.evaluation.alternatives import ALTERNATIVES, unavailable
from llmopt.evaluation.bench import ModelBench
from llmopt.evaluation.candidates import Candidate, candidate, combinations
from llmopt.evaluation.files import write_text
from llmopt.evaluation.goals import read_limits
from llmopt.evaluation.halving import LEAST_GAIN
from llmopt.evaluation.queries import as_queries
from llmopt.evaluation.recording import RecordedBench, read_recording, record
from llmopt.evaluation.search import Search
from llmopt.evaluation.trial import gain_interval, mean_interval

DATA = Path(__file__).resolve().parents[2] / "data"
QUERIES = DATA / "advise_queries.jsonl"
SETTINGS = ["words:rate=0.5", "words:rate=0.3", "vocab:drafts=true", "larosa:sparsity=0,bits=8"]
SETTINGS += ["larosa:sparsity=0,bits=4", "kv:budget=25%,bits=auto"]  # 36 recipes of these, of which some are refused
PLAIN = ["plain:int8", "plain:bf16", "plain:static_cache", "plain:prompt_lookup"]
GOALS, SPLITS, REPEATS = ("ttft", "total", "memory"), 20, 5
OPTIONS = {  # model -> how many prompts are recorded, tokens of an answer, minutes of a search
    "llmopt-tiny": dict(prompts=27, tokens=24, minutes=3),
    "smollm2": dict(prompts=20, tokens=16, minutes=12),
}
RUNS = {  # model -> what `llmopt advise` itself is given
    "llmopt-tiny": dict(minutes=2.5),
    "smollm2": dict(minutes=18, max_new_tokens=16, alternatives=["plain:int8", "plain:llama_cpp"]),
}
FLOORS = {  # model -> floors of replays: where recipes begin to be allowed, and where most of them are
    "llmopt-tiny": ("kl=0.05", "kl=1", "kl=2", "kl=3"),
    "smollm2": ("kl=0.05", "kl=0.2", "kl=0.5", "kl=1"),
}


def folder(model):
    "Where the files of a model go."
    return DATA if model == "llmopt-tiny" else DATA / model


def write_queries():
    "Forty passages that ship with llmopt, each with its first question."
    lines = (ASSETS / "reading.jsonl").read_text(encoding="utf-8").splitlines()
    for n, d in enumerate(map(json.loads, lines)):
        if n < 40:
            yield json.dumps(dict(id=d["id"], document=d["text"], question=d["questions"][0]["question"]))


def candidates():
    "The recipes of `SETTINGS` and what stands beside them."
    settings = [candidate(s) for s in SETTINGS]
    return settings, combinations(settings), [Candidate(p, alternative=True) for p in PLAIN]


def recorded(recording):
    "The settings and the plain alternatives that a recording knows, or knows to be refused."
    names = [name for name in [*recording.times, *recording.refused] if "+" not in name]
    return [Candidate(n, alternative=True) if n.startswith("plain:") else candidate(n) for n in names]


def record_all(model):
    "The exhaustive measurement."
    o, lm = OPTIONS[model], load(model)
    makers = {p: ALTERNATIVES[p].make for p in PLAIN if p not in unavailable(lm)}
    queries = as_queries(QUERIES)[: o["prompts"]]
    bench = ModelBench(lm, queries, o["tokens"], 0, makers)
    names = [c.id for c in itertools.chain(*candidates()) if not c.alternative or c.id in makers]
    record(bench, names, folder(model) / "advise_recording.json", rounds=1, tell=lambda q: announce(f"prompt {q}"), **o)


def run_all(model, only=None):
    "`llmopt advise` itself; `only`: some of the kinds below."
    kinds = {
        "1": dict(goal="total", seed=0),
        "2": dict(goal="total", seed=0),
        "ttft": dict(goal="ttft", floor="kl=1", seed=0),
        "nothing": dict(goal="ttft", methods=["larosa", "vocab:drafts=true", "kv"], alternatives=(), seed=0),
    }
    for name, kw in kinds.items():
        path = folder(model) / f"advise_{name}.json"
        if not path.exists() and (only is None or name in only):
            found = advise(model, QUERIES, output=path, recipe=None, **RUNS[model] | kw)
            print(f"== {path}", advice_text(found), sep="\n", flush=True)


recording_at = cache(read_recording)


@cache
def gains(path, goal):
    "Recipe -> gain over all prompts of the recording at `path`."
    recording, found = recording_at(path), {}
    for recipe, by_query in recording.times.items():
        pairs = {q: [(x.method.get(goal), x.base.get(goal)) for x in rounds] for q, rounds in by_query.items()}
        ratios = {q: [float(np.log(m / b)) for m, b in some if m and b] for q, some in pairs.items()}
        found[recipe] = gain_interval(ratios).value
    return found


def best_allowed(recording, gain, limit, queries, plain):
    "The best recipe by its interval on `queries`, and by its mean over all; the baseline if none gains enough."
    found = {"sure": ("baseline", 1.0), "mean": ("baseline", 1.0)}
    for recipe in gain:
        loss = {q: x["kl"] for q, x in recording.losses[recipe].items()}
        ends = dict(sure=mean_interval([loss[q] for q in queries]).high, mean=float(np.mean(list(loss.values()))))
        for kind, end in ends.items():
            better = gain[recipe] > max(found[kind][1], LEAST_GAIN) and (plain or not recipe.startswith("plain:"))
            if better and end <= limit.allowed:
                found[kind] = recipe, gain[recipe]
    return found


def searched(recording, goal, limits, queries, seed, minutes, plain):
    "A search on the recording, with the plain alternatives or without."
    bench = RecordedBench(recording, queries)
    usable = [c for c in recorded(recording) if plain or not c.alternative]
    return bench, Search(bench, usable, goal, limits, minutes, seed).run()


def replayed(path, goal, floor, seed, held_out, minutes, plain):
    "One search on the recording, judged by all that was recorded; `held_out`: share of prompts that it never sees."
    recording, limits, gain_of = recording_at(path), read_limits(floor), gains(path, goal)
    queries = sorted(recording.queries)
    random.Random(seed).shuffle(queries)
    n = round(len(queries) * held_out)
    test, rest = queries[:n], queries[n:]
    bench, search = searched(recording, goal, limits, rest, seed, minutes, plain)
    chosen = search.chosen.id if search.chosen else "baseline"
    best = best_allowed(recording, gain_of, limits[0], rest, plain)
    gain = gain_of.get(chosen, 1.0)
    lost = float(np.mean([recording.losses[chosen][q]["kl"] for q in test])) if test and search.chosen else 0.0
    scored = sum(len(t.losses[p]) for t in search.trials.values() for p in t.losses)
    return dict(
        goal=goal,
        floor=floor,
        plain=plain,
        seed=seed,
        held_out=len(test),
        chosen=chosen,
        tied=[t.id for t in search.tied],
        gain=gain,
        best=best["sure"][0],
        share=gain / best["sure"][1],
        best_by_mean=best["mean"][0],
        share_by_mean=gain / best["mean"][1],
        kl_held_out=lost,
        kept=lost <= limits[0].allowed,
        seconds=bench.clock(),
        scored=scored,
    )


def short(value):
    "`value` with numbers of five figures."
    if isinstance(value, dict):
        return {k: short(v) for k, v in value.items()}
    if isinstance(value, list):
        return [short(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def replay_all(model):
    "Replays on all prompts, and on splits with a third that no search sees."
    path, rows, minutes = folder(model) / "advise_recording.json", [], OPTIONS[model]["minutes"]
    recording, plans = recording_at(path), [(seed, 0.0) for seed in range(REPEATS)]
    plans += [(seed, 1 / 3) for seed in range(SPLITS)]
    for goal, (i, floor), plain in itertools.product(GOALS, enumerate(FLOORS[model]), (False, True)):
        if not plain or not i:  # with the plain alternatives, at the strictest floor only
            announce(f"replaying {goal}, {floor}, {'all' if plain else 'recipes'}")
            rows += [replayed(path, goal, floor, seed, share, minutes, plain) for seed, share in plans]
    content = dict(model=model, environment=recording.environment, recipes=len(recording.times) + 1, rows=rows)
    write_text(folder(model) / "advise_replays.json", json.dumps(short(content), separators=(",", ":")) + "\n")


STEPS = dict(record=record_all, run=run_all, replay=replay_all)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", choices=OPTIONS)
    p.add_argument("steps", nargs="*", help="some of record, run, replay; all by default")
    a = p.parse_args()
    if not QUERIES.exists():
        write_text(QUERIES, "\n".join(write_queries()) + "\n")
    for step in a.steps or STEPS:
        STEPS[step](a.model)
