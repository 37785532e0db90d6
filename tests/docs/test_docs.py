"""The documentation is true: its commands and its Python run, its links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import matexport
from support import REPOSITORY

PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "examples/**/*.md", "plugins/**/*.md")
    for path in REPOSITORY.glob(pattern)
    if ".venv" not in path.parts
)
RUNNABLE = [page for page in PAGES if re.search(r"^```(bash|python)$", page.read_text(), re.M)]


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    return tmp_path


def blocks(page: Path) -> list[tuple[str, str]]:
    return re.findall(r"^```(bash|python)\n(.*?)^```$", page.read_text(), re.M | re.S)


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_commands_run_in_the_order_of_the_page(page: Path, workplace: Path) -> None:
    bin_folder = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    for language, text in blocks(page):
        command = ["bash", "-euo", "pipefail", "-c", text] if language == "bash" else [sys.executable, "-c", text]
        done = subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{text}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_parity_workflow_works(workplace: Path) -> None:
    """Its step is run as GitHub would run it, on the bundled model."""
    text = (REPOSITORY / "examples" / "parity-in-ci" / "parity.yml").read_text()
    variables = dict(re.findall(r"^  (MODEL|ROWS): (.*?)(?: #.*)?$", text, re.M))
    script = text.split("- name: slice, export, verify\n        run: |\n")[1].split("\n      - ")[0]
    summary = workplace / "summary.md"
    environment = {
        **os.environ, **variables, "GITHUB_STEP_SUMMARY": str(summary),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script.replace("\n          ", "\n")]
    done = subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert summary.read_text().count("passed") == 2 * len(variables["ROWS"].split())


def test_the_demo_runs(tmp_path: Path) -> None:
    script = REPOSITORY / "examples" / "digits" / "demo.py"
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" yes ") == 10
    assert (tmp_path / "size-accuracy.png").stat().st_size > 10_000
    assert (tmp_path / "half" / "rtx" / "model.engine").exists()


def test_the_changelog_knows_this_version() -> None:
    text = (REPOSITORY / "CHANGELOG.md").read_text()
    assert "## Unreleased" in text or f"## {matexport.__version__}" in text


def test_the_screen_of_the_readme_names_every_verb() -> None:
    from matexport.cli.main import VERBS

    [screen] = [text for language, text in blocks(REPOSITORY / "README.md") if language == "bash"]
    assert {shlex.split(line)[1] for line in screen.splitlines()} == set(VERBS)
