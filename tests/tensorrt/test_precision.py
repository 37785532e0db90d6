"""Engines in every precision, really built without a GPU; and those that a target has not, refused before a build."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import matexport as mx
from matexport import engines
from matexport.errors import InputError, UsageError
from matexport.parity.comparison import TOLERANCES
from matexport.targets import TARGETS
from matexport.tensorrt import build, precision
from matexport.tensorrt.build import run_builder
from matexport.tensorrt.precision import METHODS, require_precision
from matexport.tensorrt.source import open_source
from support import DIGITS, language_checkpoint, matexport, vision_checkpoint

RTX = ("rtx", "rtx-ampere", "rtx-ada", "rtx-blackwell")
STORED = {"int8": "int8", "int4": "int4", "fp8": "float8e4m3fn", "nvfp4": "float4e2m1"}  # in the list of precisions


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision_checkpoint(tmp_path_factory.mktemp("precision") / "vision", d_model=64, n_layer=1)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return language_checkpoint(tmp_path_factory.mktemp("precision") / "language", d_model=64, n_layer=1)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "images.npz"
    np.savez(path, pixel_values=np.random.default_rng(0).standard_normal((9, 3, 12, 12), dtype=np.float32))
    return path


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_rtx_target_in_half_precision(small: Path, tmp_path: Path, dtype: str) -> None:
    result = matexport("trt", "-m", small, "-o", tmp_path / "out", "--dtype", dtype, *(f"--target={t}" for t in RTX))
    assert result.code == 0, result
    for target in RTX:
        manifest = json.loads((tmp_path / "out" / target / "matexport.json").read_text())
        assert (manifest["dtype"], manifest["tf32"]) == (dtype, True)
        assert manifest["precisions"] == ["float32", dtype]
        assert {entry["dtype"] for entry in (manifest["inputs"] | manifest["outputs"]).values()} == {"float"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_language_models_in_half_precision(text: Path, tmp_path: Path, dtype: str) -> None:
    manifest = mx.build_trt(text, tmp_path / "out", target="rtx", dtype=dtype)
    assert manifest["precisions"] == ["float32", dtype]
    states = {name: entry["dtype"] for name, entry in manifest["inputs"].items() if name.startswith("past_")}
    assert set(states.values()) == {"float"}  # whatever products are computed in
    assert list(manifest["profiles"]) == ["default"]


@pytest.mark.parametrize(
    ("quantize", "target"),
    [("int8", "rtx"), ("int4", "rtx"), ("fp8", "rtx-ada"), ("fp8", "rtx-blackwell"), ("nvfp4", "rtx-blackwell")],
)
def test_quantised(small: Path, tmp_path: Path, calibration: Path, quantize: str, target: str) -> None:
    given = ["--calibration", calibration] if quantize == "fp8" else []
    result = matexport(
        "trt", "-m", small, "-o", tmp_path / "out", "--dtype", "float16", "--quantize", quantize, "--target", target,
        *given,
    )  # fmt: skip
    assert result.code == 0, result
    manifest = json.loads((tmp_path / "out" / "matexport.json").read_text())
    assert manifest["quantize"] == METHODS[quantize]
    assert STORED[quantize] in manifest["precisions"]


@pytest.mark.parametrize(("quantize", "limit"), [("fp8", 0.3), ("int4", TOLERANCES["engine float16"])])
def test_kits_allow_what_rounding_explains(
    small: Path, tmp_path: Path, calibration: Path, quantize: str, limit: float
) -> None:
    """Of the largest golden value: not what weights in fewer bits lose, which golden values have lost as well."""
    given = {"calibration": dict(np.load(calibration))} if quantize == "fp8" else {}
    manifest = mx.build_trt(small, tmp_path / "kit", target="h100", dtype="float16", quantize=quantize, **given)
    assert manifest["tolerance"] == limit < 0.5
    assert mx.verify(tmp_path / "kit", small).passed


def test_a_quantised_language_model(text: Path, tmp_path: Path) -> None:
    manifest = mx.build_trt(text, tmp_path / "out", target="rtx", dtype="bfloat16", quantize="int8")
    assert manifest["precisions"] == ["float32", "bfloat16", "int8"]


@pytest.mark.parametrize(
    ("quantize", "target", "code", "message"),
    [
        ("fp8", "rtx", 2, "'rtx' includes compute capability 8.6, and fp8 needs 8.9"),
        ("fp8", "rtx-ampere", 2, "one of rtx-ada, rtx-blackwell, h100, h200, b200, jetson-thor"),
        ("fp8", "jetson-orin", 2, "compute capability 8.7"),
        ("nvfp4", "rtx-ada", 2, "one of rtx-blackwell, b200, jetson-thor"),
        ("nvfp4", "h100", 2, "nvfp4 needs 10.0"),
        ("fp8", "rtx-ada", 2, "--calibration FILE.npz"),
        ("int3", "rtx", 2, "int3"),
    ],
)
def test_refused_before_anything_is_written(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantize: str, target: str, code: int, message: str
) -> None:
    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("it was exported")

    monkeypatch.setattr(engines, "export_onnx", never)
    monkeypatch.setattr(build, "run_builder", never)
    result = matexport("trt", "-m", small, "-o", tmp_path / "out", "--quantize", quantize, "--target", target)
    assert result.code == code, result
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("method", "lacking"), [("fp8", "rtx-ampere"), ("nvfp4", "rtx-ada")])
def test_the_builder_agrees(
    small: Path, tmp_path: Path, calibration: Path, monkeypatch: pytest.MonkeyPatch, method: str, lacking: str
) -> None:
    """What is refused before a build, the builder would refuse; an ONNX folder is refused just so."""
    given = dict(np.load(calibration)) if method == "fp8" else None
    options = {"target": "cuda", "form": "stock", "quantize": method, "calibration": given}
    mx.export_onnx(small, tmp_path / "onnx", **options)
    with pytest.raises(UsageError, match=f"and {method} needs"):
        mx.build_trt(tmp_path / "onnx", tmp_path / "out", target=lacking)
    monkeypatch.setattr(precision, "NEEDS", {})
    target = TARGETS[lacking]
    source = open_source(tmp_path / "onnx", target, {})
    job = {
        "model": str(source.file), "engine": str(tmp_path / "engine"), "profiles": list(source.profiles.values()),
        "capabilities": target.capabilities,
    }  # fmt: skip
    with pytest.raises(InputError, match="HW-specific datatypes"):
        run_builder(job, tmp_path, "TensorRT-RTX")


def test_an_onnx_folder_has_its_types(small: Path, tmp_path: Path) -> None:
    mx.export_onnx(small, tmp_path / "onnx", target="cuda", form="stock", quantize="int4-weight")
    for option in (["--dtype", "float16"], ["--quantize", "int8"]):
        result = matexport("trt", "-m", tmp_path / "onnx", "-o", tmp_path / "out", *option)
        assert (result.code, (tmp_path / "out").exists()) == (2, False)
        assert "has its types already" in result.stderr
    manifest = mx.build_trt(tmp_path / "onnx", tmp_path / "out", target="rtx-ada")
    assert (manifest["quantize"], manifest["dtype"]) == ("int4-weight", "float16")


def test_every_target_takes_weights_alone() -> None:
    for target in TARGETS.values():
        require_precision(target, "int8-weight")
        require_precision(target, "int4-weight")


def test_kits_are_quantised_too(tmp_path: Path) -> None:
    mx.build_trt(DIGITS, tmp_path / "kit", slice="half", target="a100", dtype="float16", quantize="int4")
    report = mx.verify(tmp_path / "kit", DIGITS)
    assert report.passed, report.to_markdown()
    assert {"onnx int4-weight"} <= {c.kind for c in report.comparisons}
