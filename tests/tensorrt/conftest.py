"""Kits that several files test, and a trtexec for them."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

import matexport as mx
from kits import STUB
from support import DIGITS, language_checkpoint, matexport


@pytest.fixture(scope="session")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with trtexec, for PATH."""
    folder = tmp_path_factory.mktemp("bin")
    program = folder / "trtexec"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(STUB))} "$@"\n')
    program.chmod(0o755)
    return folder


@pytest.fixture(scope="session")
def vision_kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kit = tmp_path_factory.mktemp("kits") / "a kit's folder"  # names that a shell could trip over
    result = matexport("trt", "-m", DIGITS, "-s", "eighth", "-o", kit, "--target", "h100")
    assert result.code == 0, result
    return kit


@pytest.fixture(scope="session")
def kit_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return language_checkpoint(tmp_path_factory.mktemp("kits") / "source", n_layer=2, ngroups=2)


@pytest.fixture(scope="session")
def language_kit(kit_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kit = tmp_path_factory.mktemp("kits") / "language"
    mx.build_trt(kit_source, kit, target="jetson-thor")
    return kit


@pytest.fixture(scope="session", params=["vision", "language"])
def kit(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(f"{request.param}_kit")
    return found


@pytest.fixture(scope="session")
def plugin_kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """From an ONNX folder with the ops as such."""
    folder = tmp_path_factory.mktemp("kits")
    mx.export_onnx(DIGITS, folder / "onnx", slice="eighth")
    mx.build_trt(folder / "onnx", folder / "plugin", target="jetson-orin", plugin="cuda")
    return folder / "plugin"
