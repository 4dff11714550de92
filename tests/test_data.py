"Each measured file says where it comes from."

import fnmatch
import re
from pathlib import Path

import pytest

DATA = Path(__file__).parent.parent / "data"


@pytest.mark.skipif(not DATA.exists(), reason="not in a checkout")
def test_every_file_is_listed():
    names = [
        n.replace("NAME", "*")
        for n in re.findall(r"`([\w*./]+\.(?:jsonl?|gz))`", (DATA / "README.md").read_text(encoding="utf-8"))
    ]
    files = [p.relative_to(DATA).as_posix() for p in DATA.rglob("*.*") if p.suffix not in (".md", ".LICENSE")]
    assert files and not [f for f in files if not any(fnmatch.fnmatch(f, n) for n in names)]
    assert not [n for n in names if "*" not in n and n not in files]
