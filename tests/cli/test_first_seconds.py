"What a user sees before torch is loaded: mistakes at once, help at once, and a line for each phase."

import re
import subprocess
import sys

import pytest

from llmopt.cli import main
from llmopt.cli.parser import made_help, stored_help
from llmopt.engine import Recipe
from llmopt.errors import ConfigError

LIGHT = """
import contextlib, sys
from llmopt.cli import main
with contextlib.suppress(SystemExit):
    main(sys.argv[1:])
print("torch" in sys.modules)
"""


@pytest.mark.parametrize(
    "line, says",
    [
        ("compare --help", ""),
        ("plot none.json", "none.json"),
        ("plot none.json --kind pie", "unknown chart 'pie'"),
        ("ask --quick", "message is empty"),
        ("compare --methods wrds:n=2+kv", "did you mean words?"),
        ("compare --methods words:m=3", "bad parameters for words: no 'm'; it has scorer"),
        ("chat --method kv+larosa:p=0.5", "bad parameters for larosa: no 'p'"),
        ("compare --methods words:n", "write name=value"),
        ("chat --model smolm2", "did you mean smollm2?"),
        ("compare --output no/such/folder.json", "no/such"),
        ("benchmark words --texts none", "cannot read texts"),
    ],
)
def test_mistakes_and_help_need_no_torch(tmp_path, line, says):
    "The answer comes without torch, in one line."
    p = subprocess.run([sys.executable, "-c", LIGHT, *line.split()], capture_output=True, text=True, cwd=tmp_path)
    assert says in p.stderr and len(p.stderr.splitlines()) <= 1, p.stderr
    assert p.stdout.splitlines()[-1] == "False"


def test_queries_are_checked_without_torch():
    "Reading a set of queries imports no torch."
    code = "import sys; from llmopt.evaluation.queries import as_queries as q; q('long'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_stored_help_is_what_the_code_says():
    "If this fails: python -c 'from llmopt.cli.parser import write_help; write_help()'"
    assert stored_help() == made_help()


def test_phases_are_named_on_stderr_only(tmp_path, monkeypatch, capsys):
    "Each phase is named when it begins, and nothing of it is on stdout."
    monkeypatch.chdir(tmp_path)
    words = ["--methods", "word_removal", "--max-new-tokens", "2", "--rounds", "1", "--no-memory"]
    assert main(["ask", "Hello!", *words]) == 0
    out, err = capsys.readouterr()
    phases = [line for line in err.splitlines() if line.endswith(" ...")]
    assert any("loading the model" in line for line in phases) and "llmopt: preparing word_removal ..." in phases
    assert " ...\n" not in out


@pytest.mark.parametrize("line, near", [("compare --qick", "--quick"), ("ask hi --metods kv", "--methods")])
def test_unknown_options_name_the_command_and_what_is_near(capsys, line, near):
    "The help that is pointed to is the command's own."
    with pytest.raises(SystemExit):
        main(line.split())
    error = capsys.readouterr().err
    assert f"did you mean {near}?" in error and f"llmopt {line.split()[0]} --help" in error


def test_a_short_option_for_output(tmp_path):
    "`-o` is `--output`."
    from llmopt.cli.parser import parser

    assert parser().parse_args(["compare", "-o", "x.json"]).output == "x.json"


def test_a_method_is_called_as_the_user_called_it():
    "A bad parameter of `words` names `words`."
    with pytest.raises(ConfigError, match="bad parameters for words: no 'm'"):
        Recipe.parse("words:m=3")
    with pytest.raises(ConfigError, match="bad parameters for word_removal: no 'm'"):
        Recipe.parse("word_removal:m=3")


def test_help_says_what_each_scorer_does():
    "A scorer without a docstring would have an empty line."
    from llmopt.word_removal import SCORERS

    lines = [line.split(maxsplit=1) for line in stored_help()["methods"].splitlines()]
    said = {words[0]: words[1] for words in lines if len(words) == 2}
    assert all(len(said[name]) > 20 for name in SCORERS)


def test_help_is_written_as_recipes_are():
    "No Python in it: what is named there can be typed in a recipe."
    text = stored_help()["methods"]
    assert not re.search(r"\b(None|True|False)\b|`[A-Z]{2,}`|`llmopt\.|''", text)
