"""Can the sum of what layers lose alone be trusted? python nbs/models/kv_bits_beside.py

Writes data/smollm2/kv_bits.json: on texts that the table of SmolLM2 was not measured on, what many choices lose, and
what the table expects of them; beside it what the relative errors of the layers' attention outputs expect. KL does not
depend on the machine's load; it takes some ten minutes on one core.
"""

import json
from pathlib import Path

import numpy as np
import torch
from kv_bits import READ, SEED
from kv_maps import texts

from llmopt.core import kl, load, user
from llmopt.kv_cache import fit_bits as fit
from llmopt.kv_cache.allotted_cache import cost_of
from llmopt.kv_cache.bit_table import LossTable, choose_bits, table_of
from llmopt.kv_cache.quantize import BITS

ROOT = Path(__file__).resolve().parents[2]
BUDGETS = 0.25, 0.125, 0.1
FILE = ROOT / "data" / "smollm2" / "kv_bits.json"


def error_table(lm, read: list) -> LossTable:
    "As the table of `lm`, but of relative squared errors of a layer's own attention output."
    caught, found = {}, []
    hooks = [
        layer.self_attn.register_forward_hook(lambda m, a, out, i=i: caught.__setitem__(i, out[0].detach()))
        for i, layer in enumerate(lm.model.model.layers)
    ]
    for i, context in read:
        cache, rows, seen = fit.whole_cache(lm, context), [], []
        ids, plain = fit.continuation(lm, cache, context, i % 2 == 0), fit.read_ids

        def spy(*args, plain=plain, rows=rows, seen=seen, **kw):
            out = plain(*args, **kw)
            if not seen:
                seen.append({i: o[:, -24:].clone() for i, o in caught.items()})
            else:
                base = seen[0][len(rows)]
                off = (caught[len(rows)][:, -24:] - base).square().sum((1, 2)) / base.square().sum((1, 2))
                rows.append(off.numpy())
            return out

        fit.read_ids = spy
        fit.layer_losses(lm, cache, ids, 24)
        fit.read_ids = plain
        found.append(np.array(rows))
    for hook in hooks:
        hook.remove()
    return LossTable(fit.joined(np.mean(found, 0), fit.SHARES), list(fit.SHARES), table_of(lm.model).info)


def contexts(lm, first, last) -> list:
    "Token ids of some of the texts, cut as for the table."
    start = lm.chat_text([user("@@")]).partition("@@")[0]
    some = enumerate(texts(SEED)[first:last], first)
    return [
        (i, lm.tokenizer(start + t, add_special_tokens=False, return_tensors="pt").input_ids[0][:800]) for i, t in some
    ]


def plain_cost(tokens):
    "What choices cost in bfloat16, for a context of so many tokens."
    return cost_of(64, torch.bfloat16, tokens, 16)


def ways(table, errors, layers) -> list:  # (name, [(bits, kept)] of each layer)
    "One choice for all layers, what the tables choose, and mixtures of both."
    cost, rng, found = plain_cost(800), np.random.default_rng(0), []
    for budget in BUDGETS:
        same = [(b, max(s for s in np.linspace(0.02, 1, 99) if cost(b, s) <= budget)) for b in BITS]
        found += [(f"{b} bits, {budget:.1%}", [(b, s)] * layers) for b, s in same]
        best = {n: [c[:2] for c in choose_bits(t, budget, cost)] for n, t in (("KL", table), ("error", errors))}
        found += [(f"by {n}, {budget:.1%}", c) for n, c in best.items()]
        for _ in range(2):
            pick = rng.integers(0, 3, layers)
            found.append((f"mixed, {budget:.1%}", [same[p] for p in pick]))
    return found


def expected(table, choices) -> float:
    "The sum of what the layers lose alone."
    losses, shares = np.array(table.losses), np.array(table.shares)[::-1]
    return sum(np.interp(s, shares, losses[i, BITS.index(b)][::-1]) for i, (b, s) in enumerate(choices))


@torch.no_grad()
def lost_by(lm, i, context, choices: list) -> list:
    "KL of what follows a context under each of `choices`, all in one pass."
    cache = fit.whole_cache(lm, context)
    ids = fit.continuation(lm, cache, context, i % 2 == 0)
    cache.batch_repeat_interleave(len(choices))
    full = fit.read_ids(lm, cache, ids[:-1].expand(len(choices), -1), 24).float().log_softmax(-1)
    cache.crop(1 - len(ids))
    for n, layer in enumerate(cache.slab_layers):
        fit.damage(cache, layer, [c[n][1] for c in choices], [c[n][0] for c in choices])
    off = fit.read_ids(lm, cache, ids[:-1].expand(len(choices), -1), 24).float().log_softmax(-1)
    return kl(full, off).mean(-1).tolist()


def predicted() -> list:
    "What choices lose on other texts, and what was expected of them."
    lm = load("smollm2", "cpu", "float32")
    table, errors = table_of(lm.model), error_table(lm, contexts(lm, 0, READ))
    found = ways(table, errors, len(table.losses))
    lost = np.mean([lost_by(lm, i, c, [w for _, w in found]) for i, c in contexts(lm, READ, READ + 3)], 0)
    return [
        dict(choice=name, kl=float(x), by_kl=expected(table, w), by_error=expected(errors, w))
        for (name, w), x in zip(found, lost)
    ]


if __name__ == "__main__":
    found = dict(command="python nbs/models/kv_bits_beside.py", predicted=predicted())
    FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
