"The rows of a file, in the order of its methods."

import pandas as pd
from fastcore.test import test_close, test_eq

from llmopt.evaluation.results import Results
from llmopt.visualization.view import View, beaten
from visualization.made_up import made_up


def test_views():
    "A method whose every row failed keeps its place, and missing numbers are left out."
    v = View(made_up(["fast", "baseline", "gone"], fail=["gone"]))
    test_eq(v.methods, ["baseline", "baseline*", "fast", "gone"])
    test_eq(v.arms("quality"), ["baseline", "fast", "gone"])
    test_eq(set(v.values("ttft_ms").method), {"baseline", "baseline*", "fast"})
    test_eq(len(v.values("decode_char_per_s")), 0)
    test_eq(v.values(lambda d: d.prompt_tokens / d.prompt_tokens_base, "speed").x.max(), 1.0)
    assert v.usable()
    assert not View(made_up(["a"], fail=["a", "baseline*"])).usable() and not View(Results()).usable()


def test_phases():
    "The parts of a method add up to its total."
    for rounds in (1, 2, 3):
        v = View(made_up(queries=3, rounds=rounds))
        total = v.values("e2el_ms").groupby(["method", "query"]).x.median().groupby("method").mean()
        test_close(v.phases().sum(axis=1)[total.index], total, 1e-6)


def test_tradeoff():
    "A method that another one beats in both is named; intervals hold their median."
    t = pd.DataFrame(dict(baseline=[1, 0.0], good=[1.5, 0.1], bad=[1.4, 0.2], twin=[1.5, 0.1]), index=["x", "y"]).T
    test_eq(beaten(t), {"bad"})
    t = View(made_up(["baseline", "a", "b"])).tradeoff()
    test_eq(list(t.index), ["a", "b", "baseline"])
    test_close(t.x["a"], 1 / 0.95)
    assert (t.x_low <= t.x).all() and (t.y <= t.y_high).all()
    test_eq(len(View(made_up(fail=["baseline", "fast"])).tradeoff()), 0)
