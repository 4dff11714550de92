"""The stored design of SmolLM2, as the terminal and the file tell it."""

from functools import cache

from helpers import DATA
from llmopt.evaluation import load, summary_text, table
from llmopt.evaluation.together import on_top, together


@cache
def stored():
    "Ten recipes of four methods."
    return load(DATA / "smollm2" / "compare_ten.json")


def test_a_method_that_is_off_says_so_in_its_row():
    "LaRoSA alone is the plain model; a combination has a mark; what has no LaRoSA has neither."
    cells = table(stored())["total time"]
    assert cells["larosa"] == "plain model"
    assert {m for m in cells.index if cells[m].endswith("°")} == {m for m in cells.index if "larosa" in m} - {"larosa"}
    assert "plain model: LaRoSA is off" in " ".join(summary_text(stored()).split())


def test_no_method_gains_much_more_than_it_could():
    "The ceiling of a gain beyond noise is above the whole interval's lower end; baselines have none."
    gains = {s.method: s for s in stored().summary if s.metric == "e2el_ms" and s.verdict == "better"}
    ceilings = {c.method: c.ratio for c in stored().ceilings if c.metric == "e2el_ms"}
    assert gains and all(ceilings[m] <= s.ratio_high for m, s in gains.items())
    assert list(table(stored()).loc[["baseline", "baseline*"], "at most"]) == ["-", "-"]


def test_effects_stand_in_the_file_in_words():
    "Each combination has expected and measured, in the table as in the file; each method stands on top of the others."
    words = {e.method: e.words for e in stored().effects if e.metric == "e2el_ms" and len(e.factors) > 1}
    shown = together(stored())
    assert len(words) == len(shown) == 5 and len(on_top(stored())) == 4
    for method, said in words.items():
        assert said == f"expected {shown.expected[method]}, measured {shown.measured[method]}"


def test_a_file_without_a_probe_has_no_column_for_ceilings():
    "Older files are shown as they were."
    old = load(DATA / "smollm2" / "compare_long.json")
    assert "at most" not in table(old) and "baseline's time" not in summary_text(old)
