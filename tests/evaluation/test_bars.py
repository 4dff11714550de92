"What the progress bars of a comparison say while it works."

from helpers import tiny
from llmopt.evaluation import comparison
from llmopt.evaluation.comparison import compare


def test_the_bar_names_what_runs_now(monkeypatch):
    "Each call of an engine comes after its name, those that warm it up as those that are measured."
    events = []

    class Bar:
        def __init__(self, total, desc):
            self.total, self.desc = total, desc

        def __enter__(self):
            return self

        def __exit__(self, *_):
            events.append(("end", self.desc))

        def set_postfix_str(self, text):
            events.append(("name", text.partition(",")[0]))

        def update(self, n=1):
            events.append(("step", n))

    def watched(f, *args, **kw):
        if recipe := getattr(getattr(f, "__self__", None), "recipe", None):
            events.append(("run", recipe.id))
        return attempt(f, *args, **kw)

    attempt = comparison.attempt
    monkeypatch.setattr(comparison, "tqdm", Bar)
    monkeypatch.setattr(comparison, "attempt", watched)
    monkeypatch.setattr(comparison, "announce", lambda what: None)
    compare(["Why?"], ["word_removal"], tiny(), rounds=1, max_new_tokens=2, memory=False)
    named, moved = None, 0
    for what, value in events:
        if what == "run":
            assert named is not None and value == named.rstrip("*")
        named = value if what == "name" else None if what in ("step", "end") else named
        moved += value if what == "step" else 0
    assert [v for w, v in events if w == "end"] == ["measuring"]
    assert moved == 3 + 2 and ("name", "baseline*") in events
