"""What do the methods of kvpress lose on the prompts of `llmopt benchmark kv`, at equal bytes?

kvpress asks for another version of transformers than llmopt, so it gets an environment of its own, and prompts and
answers travel in a folder:

    python nbs/research/kvpress_beside.py prepare OUT [--model smollm2]   # with llmopt: prompts, answers, the model
    python nbs/research/kvpress_beside.py environment OUT [-- PIP ...]    # OUT/venv with kvpress; PIP: more for pip
    OUT/venv/bin/python nbs/research/kvpress_beside.py run OUT            # measures; goes on where it was stopped
    python nbs/research/kvpress_beside.py show OUT [BENCHMARK.json]       # its means, beside those of ours

- `run` first compares the full cache of both libraries along each answer: `agree` is their largest KL
- kvpress drops no byte: it hides tokens. A share of the tokens is counted as that share of the bytes, which is in its
  favour by the bytes of our positions (1.6 % at heads of 64 in 16 bits)
- run it alone on the machine, on one thread (OMP_NUM_THREADS=1), like `llmopt benchmark kv --model smollm2`
"""

import argparse
import json
import subprocess
import sys
import time
import venv
from pathlib import Path

KVPRESS = "kvpress==0.5.5"
SHARES = 0.5, 0.25, 0.1
PRESSES = (  # name, class, and the class that it wraps; what this version does not have is left out
    ("KVzip", "KVzipPress", None),
    ("AdaKV on expected attention", "AdaKVPress", "ExpectedAttentionPress"),
    ("expected attention", "ExpectedAttentionPress", None),
    ("Compactor", "CompactorPress", None),
    ("KeyDiff", "KeyDiffPress", None),
    ("SnapKV", "SnapKVPress", None),
    ("AdaKV on SnapKV", "AdaKVPress", "SnapKVPress"),
    ("TOVA", "TOVAPress", None),
    ("StreamingLLM", "StreamingLLMPress", None),
)


# ## With llmopt


def prepare(out: Path, name: str):
    "Write the model, and prompts with the full cache's answers and predictions."
    import torch
    from safetensors.torch import save_file

    from llmopt.benchmark.kv_quality import ask_full, needle, passages
    from llmopt.core import load

    out.mkdir(parents=True, exist_ok=True)
    lm = load(name, "cpu", "bfloat16")
    lm.model.save_pretrained(out / "model")
    lm.tokenizer.save_pretrained(out / "model")
    _readable_by_older(out / "model" / "config.json")
    prompts, full = [], {}
    for p in [passages(lm, i) for i in range(3, 8)] + [needle(lm, i) for i in range(3)]:
        asked = ask_full(lm, p)
        told = dict(kind=p.kind, prompt=p.name, context=p.context.tolist(), question=p.question.tolist())
        prompts.append(told | dict(answer=asked.answer, need=asked.need))
        full[p.name.replace(" ", "_")] = asked.full["before"].contiguous()
    save_file(full, out / "full.safetensors")
    (out / "prompts.json").write_text(json.dumps(dict(model=name, prompts=prompts)), encoding="utf-8")
    print(f"{len(prompts)} prompts of {name} and torch {torch.__version__} in {out}")


def _readable_by_older(path):
    "Say in a configuration what versions before transformers 5.3 look for by another name."
    config = json.loads(path.read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
    config.setdefault("torch_dtype", config.get("dtype", "bfloat16"))
    config.pop("quantization_config", None)
    path.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def environment(out: Path, more: list):
    "Make OUT/venv and install kvpress in it."
    venv.create(out / "venv", with_pip=True)
    python = out / "venv" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    subprocess.run([python, "-m", "pip", "install", KVPRESS, "safetensors", *more], check=True)
    print(f"now: {python} {Path(__file__).name} run {out}")


# ## With kvpress


def presses(kept: float) -> dict:  # name -> press; `kept` is the share of the tokens
    "Every press of this version of kvpress, for a share of the tokens."
    import kvpress

    made = {}
    for name, outer, inner in PRESSES:
        if not all(hasattr(kvpress, c) for c in (outer, inner) if c):
            continue
        press = getattr(kvpress, inner or outer)(compression_ratio=1 - kept)
        made[name] = getattr(kvpress, outer)(press) if inner else press
    return made


def read(model, cache, ids, start: int, last: int):  # ids (n,), at positions from `start` on
    "Logits (last, V) after the `last` of `ids`."
    import torch

    at = torch.arange(start, start + len(ids))[None]
    out = model(input_ids=ids[None], position_ids=at, past_key_values=cache, use_cache=True, logits_to_keep=last)
    return out.logits[0].float().log_softmax(-1)


def judged(full, other, ids, need):
    "KL, agreement and whether the answer is written; as `llmopt.benchmark.kv_quality.judged`."
    skipped = len(ids) - len(full)
    kl = (full.exp() * (full - other)).sum(-1).clamp(min=0).mean().item()
    same = (full.argmax(-1) == other.argmax(-1)).tolist()
    found = None if need is None else all(same[: max(need - skipped, 0)])
    return dict(kl=round(kl, 6), top1=round(sum(same) / len(same), 4), found=found)


def one(model, press, held, asked, n: int) -> tuple:  # (n, V) log-probabilities, seconds
    "Compress `held`, then read `asked`; predictions before its last `n` tokens."
    import contextlib

    from transformers import DynamicCache

    cache, start = DynamicCache(), time.perf_counter()
    with press(model) if press else contextlib.nullcontext():
        read(model, cache, held, 0, 1)
    seconds = time.perf_counter() - start
    return read(model, cache, asked[:-1], len(held), n), seconds


def rows_of(model, p: dict) -> list:
    "Every press at every share, before the question is known and after."
    import torch

    context, question, answer = (torch.tensor(p[k]) for k in ("context", "question", "answer"))
    rows = []
    for when in ("before", "after"):
        held = context if when == "before" else torch.cat([context, question])
        asked = torch.cat([question, answer]) if when == "before" else answer
        n = len(answer) - (when == "after")
        if not n:
            continue
        full, plain = one(model, None, held, asked, n)
        for share in SHARES:
            for name, press in presses(share).items():
                told = dict(kind=p["kind"], prompt=p["prompt"], when=when, method=f"kvpress {name}", budget=share)
                try:
                    got, seconds = one(model, press, held, asked, n)
                except Exception as e:  # a press that cannot this is a row with the reason
                    rows.append(told | dict(kl=None, error=" ".join(str(e).split())[:200]))
                    continue
                cost = dict(bytes=share, prefills=round(seconds / plain, 3))
                rows.append(told | judged(full, got, p["answer"], p["need"]) | cost)
    return rows


def agreement(model, p: dict, theirs) -> float:  # (n, V) log-probabilities of llmopt
    "Largest KL between the full caches of both libraries along an answer."
    import torch

    context, rest = torch.tensor(p["context"]), torch.tensor(p["question"] + p["answer"])
    full, _ = one(model, None, context, rest, len(p["answer"]))
    return (theirs.exp() * (theirs - full)).sum(-1).max().item()


def run(out: Path):
    "Measure with kvpress, in its environment."
    import kvpress
    import torch
    import transformers
    from safetensors.torch import load_file

    told = json.loads((out / "prompts.json").read_text(encoding="utf-8"))
    path, full = out / "kvpress.json", load_file(out / "full.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        out / "model", dtype=torch.bfloat16, attn_implementation="sdpa"
    ).eval()
    done = json.loads(path.read_text(encoding="utf-8")) if path.exists() else dict(agree={}, rows=[])
    done |= dict(model=told["model"], transformers=transformers.__version__, torch=torch.__version__)
    done["kvpress"] = getattr(kvpress, "__version__", KVPRESS)
    with torch.inference_mode():
        for p in told["prompts"]:
            if p["prompt"] in done["agree"]:
                continue
            rows = rows_of(model, p)
            done["agree"][p["prompt"]] = agreement(model, p, full[p["prompt"].replace(" ", "_")])
            done["rows"] += rows
            path.write_text(json.dumps(done).replace("}, {", "},\n{") + "\n", encoding="utf-8")
            print(p["prompt"], f"full caches differ by {done['agree'][p['prompt']]:.1e}")


# ## Both


def means(rows) -> dict:  # (when, kind, share) -> {method: mean KL}
    "Mean KL of each method in each cell; methods with a prompt missing are left out of the cell."
    cells = {}
    for r in rows:
        cell = cells.setdefault((r["when"], r["kind"], r["budget"]), {})
        cell.setdefault(r["method"], []).append(r["kl"])
    return {c: {m: sum(k) / len(k) for m, k in by.items() if None not in k} for c, by in cells.items()}


def show(out: Path, benchmark=None):
    "The best three of kvpress in each cell, and of a `benchmark_kv.json` of ours."
    theirs = json.loads((out / "kvpress.json").read_text(encoding="utf-8"))
    print(f"full caches agree to {max(theirs['agree'].values()):.1e}")
    ours = means(json.loads(Path(benchmark).read_text(encoding="utf-8"))["tables"]["answers"]) if benchmark else {}
    for cell, by in means(theirs["rows"]).items():
        print("{1}, {0} the question, {2:.0%} of the bytes".format(*cell))
        for whose in by, ours.get(cell, {}):
            for method, kl in sorted(whose.items(), key=lambda item: item[1])[:3]:
                print(f"    {kl:.4f}  {method}")


def main(args=None):
    "The command of the first lines."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("prepare", "environment", "run", "show"))
    parser.add_argument("out", type=Path)
    parser.add_argument("more", nargs="*", help="of `environment`, for pip; of `show`, a benchmark_kv.json")
    parser.add_argument("--model", default="smollm2")
    a = parser.parse_args(args)
    if a.step == "prepare":
        prepare(a.out, a.model)
    elif a.step == "environment":
        environment(a.out, a.more)
    elif a.step == "run":
        run(a.out)
    else:
        show(a.out, *a.more)


if __name__ == "__main__":
    main()
