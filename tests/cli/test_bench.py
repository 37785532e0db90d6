"""`matexport bench`: figures that fit together, for every kind of model; nothing is said of how fast."""

from __future__ import annotations

from pathlib import Path

import pytest

import matexport as mx
from matexport.dims import Dims
from matexport.slice_table import Row
from support import matexport

ROW = Row("Half", mamba=Dims(fill=32))


@pytest.fixture(scope="module")
def folder(language: Path, vision: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    mx.export_onnx(mx.plan(vision, ROW), folder / "vision")
    mx.export_onnx(mx.plan(language, ROW), folder / "language")
    mx.export_onnx(mx.plan(language, ROW), folder / "int4", quantize="int4-block")
    mx.export_bundle([mx.plan(language, row) for row in (Row("Full"), ROW)], folder / "bundle")
    return folder


def test_language(folder: Path) -> None:
    others = ["--against", folder / "int4", "--against", folder / "bundle" / "half.onnx"]
    result = matexport(
        "bench", "-m", folder / "language", *others, "--lengths", "3,5", "--rounds", "2", "--format", "json"
    )
    assert result.code == 0, result.stderr
    models = result.json["models"]
    names = {"prefill tokens/s, 3 tokens", "prefill tokens/s, 5 tokens", "decode tokens/s"}
    assert [each["rates"].keys() for each in models] == [names] * 3
    assert models[0]["ratio"] == {}
    for each in models[1:]:
        for name in names:
            rates, first = each["rates"][name], models[0]["rates"][name]
            low, high = rates["min"] / first["max"], rates["max"] / first["min"]
            assert low * 0.999 <= each["ratio"][name]["min"] <= each["ratio"][name]["max"] <= high * 1.001
    assert all(0 < each["anonymous_mib"] <= each["peak_mib"] for each in models)


def test_vision(folder: Path) -> None:
    result = matexport("bench", "-m", folder / "vision", "--rounds", "1", "--batches", "2", "--no-kernels")
    assert result.code == 0, result.stderr
    assert "images/s, batch 2" in result.stdout
    assert "peak memory" in result.stdout


def test_what_cannot_be_measured(folder: Path, vision: Path, tmp_path: Path) -> None:
    for path, message in ((vision, "no ONNX model"), (tmp_path / "nothing", "no ONNX model")):
        result = matexport("bench", "-m", path)
        assert (result.code, message in result.stderr) == (4, True), result.stderr
    (tmp_path / "model.onnx").write_bytes(b"\x08\x07nonsense")
    result = matexport("bench", "-m", tmp_path)
    assert (result.code, "cannot be measured" in result.stderr) == (4, True), result.stderr
    result = matexport("bench", "-m", folder / "vision", "--against", folder / "language")
    assert (result.code, "not of the same kind" in result.stderr) == (4, True), result.stderr
    assert matexport("bench", "-m", folder / "vision", "--batches", "0").code == 2
