"What `--output` may name, and what stands there afterwards."

import json
import os
import stat
import subprocess
import sys
import threading

import pytest

from llmopt.errors import ResultsError
from llmopt.evaluation import compare
from llmopt.evaluation.files import Journal, check_writable, keep_aside, read_json, write_text

posix = pytest.mark.skipif(os.name == "nt", reason="no pipes with names on Windows")


def left(folder):
    "The names of all files in `folder`, hidden ones too."
    return sorted(os.listdir(folder))


def refused(path, *says):
    "`check_writable` refuses `path` in one line that holds each of `says`, and `write_text` does, too."
    for f in (check_writable, lambda p: write_text(p, "new")):
        with pytest.raises(ResultsError) as e:
            f(path)
        assert "\n" not in str(e.value) and all(s in str(e.value) for s in says), e.value


@posix
def test_a_pipe_is_written_through(tmp_path):
    "Who reads from the pipe gets the text, and the pipe is still one."
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    write_text(pipe, "{}")
    reader.join(10)
    assert got == ["{}"] and stat.S_ISFIFO(pipe.stat().st_mode) and left(tmp_path) == ["pipe"]


@posix
def test_an_open_stream_goes_on_where_it_is(tmp_path):
    "`--output /dev/stdout`, with the output of the shell going to a file: nothing before or after is lost."
    code = (
        "import sys; from llmopt.evaluation.files import write_text\n"
        "print('before', flush=True); write_text('/dev/stdout', 'results\\n'); print('after')"
    )
    with open(tmp_path / "out.txt", "w") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    assert (tmp_path / "out.txt").read_text() == "before\nresults\nafter\n"


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no /proc on this system")
def test_a_stream_that_is_not_there():
    "Nothing can be made below /proc, and that is said before anything is measured."
    refused("/proc/x/y", "no such device")
    refused("/proc/self/fd/987", "no such device")


@posix
def test_links_lead_to_the_file(tmp_path):
    "A link to a file, to a link, and to nothing yet: the target is written, the links stay."
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("data.json")
    for text in ("one", "two"):
        write_text(tmp_path / "a", text)
        assert (tmp_path / "data.json").read_text() == text and (tmp_path / "a").is_symlink()
    (tmp_path / "loop").symlink_to("loop")
    refused(tmp_path / "loop", "circle")


@posix
def test_permissions_stay(tmp_path):
    "A file that others may read can be read by them afterwards; a new one has the usual permissions."
    path = tmp_path / "r.json"
    path.write_text("old")
    path.chmod(0o640)
    write_text(path, "new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    (tmp_path / "usual").write_text("")
    write_text(tmp_path / "new.json", "")
    assert (tmp_path / "new.json").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_places_that_cannot_be(tmp_path):
    "Folders, read-only files and impossible names are refused before any work, and nothing is left behind."
    (tmp_path / "mine.json").write_text("{}")
    (tmp_path / "mine.json").chmod(0o444)
    refused(tmp_path / "mine.json", "read-only")
    refused(tmp_path, "is a folder")
    refused(tmp_path / "none" / "r.json", "there is no folder")
    refused(tmp_path / "mine.json" / "r.json", "there is no folder")
    refused(tmp_path / ("x" * 300), "too long")
    refused(tmp_path / ("é" * 200), "too long")
    refused(tmp_path / "a\0b", "null")
    assert left(tmp_path) == ["mine.json"] and (tmp_path / "mine.json").read_text() == "{}"


def test_temporary_files_of_others_stay(tmp_path):
    "`r.json.tmp` belongs to somebody else."
    (tmp_path / "r.json.tmp").write_text("theirs")
    write_text(tmp_path / "r.json", "ours")
    assert left(tmp_path) == ["r.json", "r.json.tmp"] and (tmp_path / "r.json.tmp").read_text() == "theirs"


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    "The text cannot be written: one line, no temporary file, the old content."
    path = tmp_path / "r.json"
    write_text(path, "old")

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResultsError, match="No space left"):
        write_text(path, "new")
    assert left(tmp_path) == ["r.json"] and path.read_text() == "old"


def test_an_interrupt_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    "Ctrl-C in the middle of the last write: as with a full disk."
    path = tmp_path / "r.json"
    write_text(path, "old")

    def interrupted(fd):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "new")
    assert left(tmp_path) == ["r.json"] and path.read_text() == "old"


def test_earlier_files_are_numbered(tmp_path):
    "The first free number is taken; a name that is free needs none."
    path = tmp_path / "r.json"
    assert keep_aside(path) is None
    for n in (1, 2, 3):
        path.write_text(str(n))
        assert keep_aside(path).name == f"r.{n}.json"
    assert not path.exists() and (tmp_path / "r.2.json").read_text() == "2"


def test_a_journal_keeps_whole_lines(tmp_path):
    "Wherever a write was torn, the lines before it are read, and new ones follow them."
    rows = [dict(row=i, text="é\u2028\n" * i) for i in range(4)]
    with Journal(tmp_path / "r.json") as journal:
        for row in rows:
            journal.append(row)
        whole = journal.path.read_bytes()
    ends = [i + 1 for i, c in enumerate(whole) if c == 10]
    for cut in range(ends[0], len(whole)):
        journal.path.write_bytes(whole[:cut])
        with Journal(tmp_path / "r.json") as again:
            kept = again.read()
            assert kept == rows[: sum(end <= cut for end in ends)]
            again.append(dict(row="new"))
        with Journal(tmp_path / "r.json") as again:
            assert again.read() == [*kept, dict(row="new")]


def test_a_journal_of_somebody_else_stays(tmp_path):
    "A file of that name that is no journal is refused, and not changed."
    (tmp_path / "r.json.journal").write_text("Dear diary")
    with pytest.raises(ResultsError, match="no journal"), Journal(tmp_path / "r.json") as journal:
        journal.read()
    assert (tmp_path / "r.json.journal").read_text() == "Dear diary"


def test_a_full_disk_tears_no_line(tmp_path, monkeypatch):
    "A line that fits only in part is taken back, so that the journal can go on."
    with Journal(tmp_path / "r.json") as journal:
        journal.append(dict(row=1))
        file = journal.file

        class Short:
            def write(self, line):
                return file.write(line[:5])

            def __getattr__(self, name):
                return getattr(file, name)

        monkeypatch.setattr(journal, "file", Short())
        with pytest.raises(ResultsError, match="No space left"):
            journal.append(dict(row=2))
        monkeypatch.setattr(journal, "file", file)
        assert journal.read() == [dict(row=1)]


def test_bytes_written_grow_with_the_rows(tmp_path):
    "Twice the rows are at most 2.3 times the bytes that go to the disk."
    written = {}
    for n in (50, 100, 200, 400):
        with Journal(tmp_path / "r.json") as journal:
            for i in range(n):
                journal.append(dict(row=i, text="x" * 200))
            written[n] = journal.size
            journal.remove()
    sizes = list(written.values())
    assert all(b <= 2.3 * a for a, b in zip(sizes, sizes[1:]))


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "truncated or not JSON"),
        (b'{"runs": [', "truncated or not JSON"),
        (b"\xff\xfe{\x00}\x00", "cannot read"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"seed": ' + b"7" * 5000 + b"}", "thousands of digits"),
    ],
)
def test_odd_json_is_one_line(tmp_path, content, says):
    "Cut, encoded otherwise, nested without end, with endless integers."
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(ResultsError, match=says) as e:
        read_json(tmp_path / "r.json")
    assert "\n" not in str(e.value)


def test_a_byte_order_mark_is_no_fault(tmp_path):
    "Some editors put one in front of what they save."
    (tmp_path / "r.json").write_text(json.dumps([1]), encoding="utf-8-sig")
    assert read_json(tmp_path / "r.json") == [1]


def test_an_empty_name_is_refused_before_anything_is_measured():
    with pytest.raises(ResultsError, match="give a file name"):
        compare(["What is rain?"], ["baseline"], output="", quick=True, memory=False, progress=False)


def test_a_journal_is_told_from_results(tmp_path):
    "Whoever reads the results of a comparison that was killed, or its journal, hears how to go on."
    with Journal(tmp_path / "r.json") as journal:
        journal.append(dict(row=1))
    for name in ("r.json", "r.json.journal"):
        with pytest.raises(ResultsError, match=f"{name}.* holds rows of an interrupted comparison.* --resume"):
            read_json(tmp_path / name)
    with pytest.raises(ResultsError, match="no results file at '.*other.json'$"):
        read_json(tmp_path / "other.json")
