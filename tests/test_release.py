"A release is refused unless its tag, the settings and the changelog agree; workflows are valid and run the checks."

import importlib.util
from pathlib import Path

import pytest
import yaml

from helpers import ROOT

SCRIPT = ROOT / ".ci" / "release.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="not in a checkout")
CHANGELOG = (
    "# Changelog\n\n## 1.2.0 - 2026-12-01\n\n- New.\n\n### Mended\n\n- Old.\n\n## 1.1.0 - 2026-01-01\n\n- Older.\n"
)


@pytest.fixture(scope="module")
def release():
    spec = importlib.util.spec_from_file_location("release", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tree(root: Path, version="1.2.0", changelog=CHANGELOG):
    (root / "settings.ini").write_text(f"[DEFAULT]\nversion = {version}\n", encoding="utf-8")
    (root / "CHANGELOG.md").write_text(changelog, encoding="utf-8")
    return root


def test_the_notes_are_the_section_of_the_version(release, tmp_path, capsys):
    release.main("v1.2.0", tree(tmp_path))
    assert capsys.readouterr().out == "- New.\n\n### Mended\n\n- Old.\n"


@pytest.mark.parametrize(
    "tag, version, changelog, why",
    [
        ("v1.3.0", "1.2.0", CHANGELOG, "the tag is v1.3.0, but settings.ini says 1.2.0"),
        ("v1.3.0", "1.3.0", CHANGELOG, "has no section '## 1.3.0"),
        ("v1.2.0", "1.2.0", CHANGELOG.replace("2026-12-01", "unreleased"), "says 'unreleased'"),
        ("v1x2.0", "1x2.0", CHANGELOG, "has no section"),
    ],
)
def test_what_does_not_agree_is_refused_in_one_line(release, tmp_path, tag, version, changelog, why):
    said = release.problem(tag, tree(tmp_path, version, changelog))
    assert why in said and "\n" not in said


def test_the_version_of_this_tree_has_its_section(release):
    assert release.notes((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), release.version(ROOT))[1]


def runs(name):
    "When a workflow runs, and the commands of its jobs."
    flow = yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8"))
    return flow[True], [s.get("run", s.get("uses")) for job in flow["jobs"].values() for s in job["steps"]]


def test_pages_and_readme_are_checked_on_pull_requests():
    "The pages are rendered, but put nowhere."
    for name in ("test.yml", "docs.yml"):
        when, commands = runs(name)
        assert "pull_request" in when
        assert {"python .ci/nb.py docs"} <= {*commands} and any(
            c.startswith("python .ci/nb.py check") for c in commands
        )
    assert "quarto render _proc --no-cache" in commands


def test_a_tag_publishes_a_wheel_that_was_tried():
    when, commands = runs("release.yml")
    assert when["push"]["tags"] == ["v*"]
    order = [
        next(i for i, c in enumerate(commands) if part in c)
        for part in ("release.py", "-m build", "llmopt ask", "gh release")
    ]
    assert order == sorted(order)
