"""The scripts of a kit, run as on its machine; and shellcheck."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from support import Result

STUB = Path(__file__).with_name("trtexec.py")


def bash(
    script: Path, tools: Path | None, *options: str, version: int = 101600, fault: str = "", **more: str
) -> Result:
    """Runs a script of a kit from another folder, as a person might."""
    path = f"{tools}{os.pathsep}/usr/bin:/bin" if tools else "/usr/bin:/bin"
    variables = {"PATH": path, "TRTEXEC_VERSION": str(version), "TRTEXEC_FAULT": fault, **more}
    done = subprocess.run(
        [str(script), *options], cwd=tools or "/", env=variables, capture_output=True, text=True, check=False
    )
    return Result(done.returncode, done.stdout, done.stderr)


def shellcheck() -> str:
    beside = Path(sys.executable).with_name("shellcheck")
    found = str(beside) if beside.exists() else shutil.which("shellcheck")
    assert found, "shellcheck is not installed: pip install -e '.[dev]'"
    return found
