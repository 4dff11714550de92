"The sdist and the wheel hold what the package needs, and say of it what settings.ini says."

import configparser
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytest.importorskip("build", reason='needs the development tools: pip install -e ".[dev]"')
ROOT = Path(__file__).resolve().parent.parent
SOURCES = ["settings.ini", "setup.py", "README.md", "LICENSE"]


@pytest.fixture(scope="module")
def settings():
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


@pytest.fixture(scope="module")
def wheel(settings, tmp_path_factory):
    "The wheel, opened; it is built from the sdist, and that from a copy of the sources"
    tmp = tmp_path_factory.mktemp("package")
    for name in SOURCES:
        shutil.copy(ROOT / name, tmp)
    skip = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    shutil.copytree(ROOT / settings["lib_path"], tmp / settings["lib_path"], ignore=skip)
    command = [sys.executable, "-m", "build", "--no-isolation", "."]
    done = subprocess.run(command, cwd=tmp, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(next((tmp / "dist").glob("*.whl"))) as opened:
        yield opened


def dist_info(wheel, name):
    "The text of a file of the wheel's metadata folder"
    return wheel.read(next(n for n in wheel.namelist() if n.endswith(f".dist-info/{name}"))).decode()


def same(requirements):
    "Requirements in their canonical spelling, to compare as sets"
    return {str(Requirement(r)) for r in requirements}


def test_wheel_holds_the_whole_library(wheel, settings):
    lib = ROOT / settings["lib_path"]
    files = [p for p in lib.rglob("*") if p.is_file() and not {"__pycache__", ".ipynb_checkpoints"} & {*p.parts}]
    packed = {n for n in wheel.namelist() if ".dist-info/" not in n}
    assert packed == {p.relative_to(ROOT).as_posix() for p in files}
    assert any(n.startswith("llmopt/assets/llmopt-tiny/") for n in packed)


def test_metadata_equals_settings(wheel, settings):
    meta = Parser().parsestr(dist_info(wheel, "METADATA"))
    for field, key in {"Name": "lib_name", "Version": "version", "Summary": "description"}.items():
        assert meta[field] == settings[key]
    assert meta["Requires-Python"] == ">=" + settings["min_python"]
    assert settings["license"] in (meta["License"], meta["License-Expression"])


def test_wheel_requires_what_settings_name(wheel, settings):
    wanted = settings["requirements"].split()
    for key in settings:
        if key.endswith("_requirements"):
            wanted += [f"{r};extra=='{key.removesuffix('_requirements')}'" for r in settings[key].split()]
    names = Parser().parsestr(dist_info(wheel, "METADATA")).get_all("Requires-Dist")
    assert same(names) == same(wanted)


def test_wheel_installs_the_command_and_the_doc_links(wheel):
    points = configparser.ConfigParser(delimiters=["="])
    points.read_string(dist_info(wheel, "entry_points.txt"))
    assert points["console_scripts"]["llmopt"] == "llmopt.cli:main"
    assert points["nbdev"]["llmopt"] == "llmopt._modidx:d"
