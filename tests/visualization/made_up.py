"""Results files of every shape, made up: any methods, queries and rounds, and rows that fail.

Made-up numbers appear in tests only. The ratios are round numbers, so that a test can tell where they are drawn.
"""

import math

import numpy as np

from llmopt.evaluation.results import Floor, Method, Query, Results, Run, Summary


def made_up_run(rng, m, k, q, j, r):
    "Made-up times, tokens and bytes: query number `j` costs `k` times what the baseline takes."
    t, n = rng.normal(20, 0.5, 8) * k, 10 + 7 * (j % 20)
    first = n * k + t[0]
    return Run(
        arm="speed",
        query=q,
        method=m,
        round=r,
        preprocess_ms=0.2,
        prefill_ms=first - 0.2,
        ttft_ms=first,
        tpot_ms=t.mean(),
        e2el_ms=n * k + t.sum(),
        itl_ms=list(t[1:]),
        decode_base_tok_per_s=1000 / t.mean(),
        prefill_eff_tok_per_s=n * 1000 / first,
        prompt_tokens=math.ceil(n * k),
        prompt_tokens_base=n,
        completion_tokens=8,
        completion_tokens_base=8,
        kv_bytes_live=1000 * n,
        kv_bytes_peak=1200 * n,
        kv_bytes_reserved=2048 * n,
        weight_bytes=2**24,
    )


def made_up_answer(m, i, q, j):
    "A made-up answer of method number `i`, which drops every third word."
    words = " ".join(f"word{w}" for w in range(10 + 7 * (j % 20)) if w % 3 or not i)
    return Run(
        arm="quality",
        query=q,
        method=m,
        prompt_text=words,
        output_text=f"Answer {q} of {m}, which goes on. " * 8,
        prompt_tokens=9,
        prompt_tokens_base=10,
        completion_tokens=9,
        completion_tokens_base=9,
        kl_mean=0.1 * i + 0.01 * j * (i > 0),
        kl_p99=0.5 * i,
        top1_agree=1 - 0.02 * i - 0.01 * j * (i > 0),
        bits_per_byte_delta=0.01 * i,
        rougeL_vs_base=1 / (1 + i),
        keyword_recall=0.5,
    )


def made_up_ratios(methods, fail):
    "The summary that says how fast each method is."

    def rate(k):
        return "per_s" in k

    keys = "ttft_ms", "tpot_ms", "e2el_ms", "decode_base_tok_per_s", "prefill_eff_tok_per_s"
    ratios = [
        (m, k, 0.95 ** (-i if rate(k) else i)) for i, m in enumerate(methods) if i and m not in fail for k in keys
    ]
    return [
        Summary(method=m, metric=k, median=1, ratio=x, ratio_low=x * 0.97, ratio_high=x * 1.03, verdict="better")
        for m, k, x in ratios
    ]


def made_up(methods=("baseline", "fast"), queries=2, rounds=2, fail=(), kind="compare"):
    "Results with made-up numbers; `fail` are methods whose rows are errors."
    rng, qs = np.random.default_rng(0), [f"q{j}" for j in range(1, queries + 1)]
    arms = [*methods, "baseline*"]
    speed = {m: 1 if m.startswith("baseline") else 0.95**i for i, m in enumerate(arms)}
    runs = [made_up_run(rng, m, speed[m], q, j, r) for m in arms for j, q in enumerate(qs) for r in range(rounds)]
    runs += [made_up_answer(m, i, q, j) for i, m in enumerate(methods) for j, q in enumerate(qs)]
    runs += [
        Run(arm="memory", query=qs[-1], method=m, peak_rss_bytes=5 * 10**8 + 10**6 * i, peak_rss_delta_bytes=10**7)
        for i, m in enumerate(methods)
    ]
    runs = [
        Run(arm=r.arm, query=r.query, method=r.method, round=r.round, error="it broke") if r.method in fail else r
        for r in runs
    ]
    floor = {k: Floor(median=1, low=0.97, high=1.04) for k in ("ttft_ms", "tpot_ms", "e2el_ms")}
    return Results(
        kind=kind,
        runs=runs,
        summary=made_up_ratios(methods, fail),
        methods=[Method(id=m) for m in methods],
        queries=[Query(id=q, text=f"What is the {q}?") for q in qs],
        noise_floor=floor,
        config=dict(model_id="made up"),
        warnings=["made-up numbers"],
    )
