"""What a release says of itself: `python .ci/release.py v0.2.0` checks that tag, settings and changelog agree, and
prints the notes of the release."""

import configparser
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def version(root):
    "The version that the package will have"
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(root / "settings.ini", encoding="utf-8")
    return settings["DEFAULT"]["version"]


def notes(changelog, wanted):
    "The date and the text of version `wanted` in a changelog; None and '' if it has no such section"
    found = re.search(rf"^## {re.escape(wanted)}(?: - (\S+))?\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL)
    return (found[1], found[2].strip()) if found else (None, "")


def problem(tag, root):
    "Why `tag` cannot be released from the tree at `root`; None if it can"
    is_now = version(root)
    if tag != f"v{is_now}":
        return f"the tag is {tag}, but settings.ini says {is_now}: set `version` there, run `python .ci/nb.py export`"
    date, text = notes((root / "CHANGELOG.md").read_text(encoding="utf-8"), is_now)
    if not text:
        return f"CHANGELOG.md has no section '## {is_now} - DATE'"
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", date or ""):
        return f"CHANGELOG.md says '{date}' where the date of {is_now} belongs, such as 2026-12-01"
    return None


def main(tag, root=ROOT):
    if wrong := problem(tag, root):
        sys.exit(wrong)
    print(notes((root / "CHANGELOG.md").read_text(encoding="utf-8"), version(root))[1])


if __name__ == "__main__":
    main(*sys.argv[1:2] or sys.exit(__doc__))
