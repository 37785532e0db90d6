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


@pytest.mark.parametrize("healthy", [True, False])
def test_the_parity_workflow_works(workplace: Path, healthy: bool) -> None:
    """Its steps are run as GitHub would run them, on the bundled model; a failure still gives a summary."""
    text = (REPOSITORY / "examples" / "parity-in-ci" / "parity.yml").read_text()
    variables = dict(re.findall(r"^  (MODEL|ROWS): (.*?)(?: #.*)?$", text, re.M))
    work = text.split("- name: slice, export, verify\n        run: |\n")[1].split("\n      - ")[0]
    summarise = text.split("if: always()\n        run: ")[1].split("\n")[0]
    summary = workplace / "summary.md"
    environment = {
        **os.environ, **variables, "GITHUB_STEP_SUMMARY": str(summary),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    work = work.replace("\n          ", "\n")
    if not healthy:  # a byte of the slice changes between slicing and verifying
        damage = 'printf x | dd of="out/$row/model.safetensors" bs=1 seek=9000 conv=notrunc status=none\n'
        work = work.replace("  matexport onnx", f"  {damage}  matexport onnx", 1)

    def bash(script: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
        return subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True, check=False)

    done = bash(work)
    assert done.returncode == (0 if healthy else 3), done.stderr
    assert bash(summarise).returncode == 0
    verdicts = summary.read_text()
    assert verdicts.count(": passed") == (2 * len(variables["ROWS"].split()) if healthy else 0)
    assert verdicts.count(": FAILED") == (0 if healthy else 1)


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
