"`llmopt chat` at a keyboard: what is typed, pasted and interrupted, and recipes from files."

import contextlib
import io
import json
from types import SimpleNamespace

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from llmopt.cli import main
from llmopt.cli.chat import COMMANDS, Chat, cost_line, engines, help_lines
from llmopt.cli.checks import settle
from llmopt.cli.lines import Pipe, Terminal, history_file, screen
from llmopt.cli.parser import parser
from llmopt.errors import LlmoptError


@pytest.fixture(scope="module")
def make():
    return engines("llmopt-tiny", max_new_tokens=2)


def talk(make, keys, history=None):
    "The chat after somebody pressed `keys`, and what was written on stdout."
    out = io.StringIO()
    with create_pipe_input() as keyboard, contextlib.redirect_stdout(out):
        terminal = Terminal([*COMMANDS], history, input=keyboard, output=DummyOutput())
        terminal.aside = print
        chat = Chat(make, terminal=terminal)
        keyboard.send_text(keys)
        chat.loop()
    return chat, out.getvalue()


def test_a_pasted_text_is_one_message(make):
    "Three lines in one paste are one question, and Ctrl-D ends."
    chat, _ = talk(make, "\x1b[200~one\ntwo\nthree\x1b[201~\r\x04")
    assert [m["content"] for m in chat.engine.history[::2]] == ["one\ntwo\nthree"]


def test_ctrl_c_at_the_prompt(make):
    "What is half written is taken back without a word; an empty prompt says how to leave; the chat goes on."
    chat, out = talk(make, "half\x03\x03Why?\r/quit\r")
    assert out.count("Ctrl-D or /quit ends the chat") == 1
    assert [m["content"] for m in chat.engine.history[::2]] == ["Why?"]


def test_an_empty_line_does_nothing(make):
    "Neither does it end the chat, nor is it sent."
    chat, _ = talk(make, "\r  \rWhy?\r\x04")
    assert len(chat.engine.history) == 2


def test_tab_completes_commands():
    "Commands at the beginning of a line, and nothing inside of a message."
    with create_pipe_input() as keyboard:
        completer = Terminal([*COMMANDS], input=keyboard, output=DummyOutput()).session.completer
    for typed, found in ("/st", ["/stats"]), ("is /st", []):
        assert [c.text for c in completer.get_completions(Document(typed), CompleteEvent())] == found


def test_lines_are_there_in_the_next_chat(make, tmp_path, monkeypatch):
    "The arrow up brings back what was typed in an earlier process; /help says where it is kept."
    monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path / "cache"))
    path = history_file()
    talk(make, "/reset\r\x04", path)
    _, out = talk(make, "\x1b[A\r/help\r\x04", path)
    assert "forgotten" in out and str(path) in out and max(map(len, out.replace(str(path), "").splitlines())) <= 80


def test_an_error_in_the_middle_of_an_answer(make):
    "It has a line of its own, and the chat goes on."

    def broken(text, **options):
        yield "half an"
        raise LlmoptError("the server is gone")

    chat = Chat(make)
    chat.engine.stream, out = broken, io.StringIO()
    with contextlib.redirect_stdout(out):
        assert chat.turn("Why?")
    assert out.getvalue() == "half an\nllmopt: the server is gone\n" and chat.measurements == []


def test_a_model_cannot_steer_the_terminal(make):
    "Escape sequences in an answer are not passed on."
    chat = Chat(make)
    chat.engine.stream, chat.engine.last = (lambda text, **options: iter(["\x1b[2J"])), make("baseline").run("Why?")
    with contextlib.redirect_stdout(out := io.StringIO()):
        chat.turn("Why?")
    assert "\x1b" not in out.getvalue()


def test_cost_of_a_server_that_tells_little():
    "What is not known is left out."
    known = dict(prompt_tokens=1234, completion_tokens=5, prompt_tokens_base=None, cached_prompt_tokens=None)
    assert cost_line(SimpleNamespace(**known, ttft_ms=None, tpot_ms=None, kv_bytes_peak=None)) == "1,234 in | 5 out"


def test_a_loaded_conversation_without_a_system_prompt(make, tmp_path):
    "The prompt that was set goes, and a line says so."
    chat, talk, out = Chat(make), tmp_path / "talk.json", io.StringIO()
    with contextlib.redirect_stdout(out):
        for line in (f"/save {talk}", "/system Be brief.", f"/load {talk}"):
            chat.turn(line)
    assert "your system prompt is gone: none was saved; /system TEXT sets one" in out.getvalue()
    assert chat.engine.system is None


def test_help_on_a_server_lists_what_is_served():
    "It promises no other recipe; lines are as short as ever."
    served = [f"llmopt-tiny:words:n={n}+kv" for n in range(1, 9)]
    lines = help_lines(served)
    assert "such as words" not in "".join(lines) and max(map(len, lines)) <= 80
    assert all(any(id in line for line in lines[1:]) for id in served)
    assert "such as words:n=2+kv" in help_lines()[0] and "at least 40 tokens" in help_lines()[1]


def test_where_no_terminal_is():
    "In tests, pipes and notebooks lines are read plainly."
    assert isinstance(screen(), Pipe)


def run(monkeypatch, typed, *args):
    "Exit code, stdout and the last line on stderr of the command."
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*map(str, args)])
    return code, out.getvalue(), (err.getvalue().splitlines() or [""])[-1]


def test_a_recipe_file(tmp_path, monkeypatch):
    "It says the recipe and the model; a transcript shows what was piped in; what was saved is a recipe file, too."
    file, saved = tmp_path / "recipe.json", tmp_path / "talk.json"
    file.write_text('{"recipe": "words:n=2", "model": "llmopt-tiny", "goal": "ttft"}')
    args = "chat", "--max-new-tokens", 2, "--recipe"
    code, out, _ = run(monkeypatch, f"Why?\n/save {saved}\n", *args, file)
    assert code == 0 and "llmopt-tiny, word_removal:n=2" in out and "> Why?\n" in out
    assert "saved conversation" not in out
    assert json.loads(saved.read_text())["measurements"][0]["completion_tokens"] == 2
    code, out, _ = run(monkeypatch, f"/load {saved}\n", *args, saved)
    assert code == 0 and "word_removal:n=2" in out and "\n2 messages\n" in out
    assert f"{saved} is a saved conversation; /load {saved} brings its messages" in out


@pytest.mark.parametrize(
    "content, args, says",
    [
        ('{"recipe": "wrds"}', [], "did you mean words?"),
        ('{"recipe": "kv", "model": "smolm2"}', [], "did you mean smollm2?"),
        ('{"recipe": "kv"}', ["--method", "kv"], "two recipes"),
        ('{"recipe": ', [], "damaged or no recipe file"),
        ('{"recipe": "words", "modle": "smollm2"}', [], "unknown key 'modle'; did you mean model?"),
    ],
)
def test_wrong_recipe_files(tmp_path, monkeypatch, content, args, says):
    "One line, and nothing is loaded."
    file = tmp_path / "recipe.json"
    file.write_text(content)
    code, _, line = run(monkeypatch, "", "chat", "--recipe", file, *args)
    assert code == 2 and says in line, line


@pytest.mark.parametrize(
    "line, model, methods",
    [
        ("compare --recipe {}", "./mine", ["baseline", "words:n=2"]),
        ("compare --methods kv --model smollm2 --recipe {}", "smollm2", ["kv", "words:n=2"]),
        ("serve --recipe {}", ["./mine"], ["baseline", "words:n=2"]),
        ("serve", ["llmopt-tiny"], None),
        ("compare", "llmopt-tiny", None),
    ],
)
def test_what_a_recipe_file_fills_in(tmp_path, monkeypatch, line, model, methods):
    "What is typed wins over its model, and its recipe stands beside the methods that are typed."
    monkeypatch.setattr("llmopt.cli.checks.check_model", lambda name: None)
    file = tmp_path / "recipe.json"
    file.write_text('{"recipe": "words:n=2", "model": "./mine"}')
    options = parser().parse_args(line.format(file).split())
    settle(options)
    assert (options.model, options.methods) == (model, methods)
