"""TensorRT-RTX engines, really built, without a GPU; and what is refused, with the reason."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

import matexport as mx
from matexport.errors import InputError, MatexportError, MissingError
from matexport.tensorrt import build
from matexport.tensorrt.build import rtx_environment, run_builder
from support import DIGITS, content, matexport, vision_checkpoint


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trt") / "onnx"
    mx.export_onnx(DIGITS, folder, slice="eighth", target="portable")
    return folder


def test_an_engine_is_built(exported: Path, tmp_path: Path) -> None:
    result = matexport("trt", "-m", exported, "-o", tmp_path / "rtx")
    assert result.code == 0, result
    assert sorted(content(tmp_path / "rtx")) == ["matexport.json", "model.engine"]
    manifest = json.loads((tmp_path / "rtx" / "matexport.json").read_text())
    assert manifest["kind"] == "engine"
    assert manifest["tensorrt"]["flavour"] == "TensorRT-RTX"
    assert manifest["profiles"]["default"]["pixel_values"] == {
        "min": [1, 3, 8, 8],
        "opt": [8, 3, 8, 8],
        "max": [64, 3, 8, 8],
    }
    assert manifest["files"]["model.engine"]["bytes"] > 50_000
    assert manifest["slice"] == json.loads((exported / "matexport.json").read_text())["slice"]
    shown = matexport("inspect", "-m", tmp_path / "rtx")
    assert "TensorRT-RTX" in shown.stdout
    refused = matexport("verify", "-m", tmp_path / "rtx", "--source", DIGITS)
    assert refused.code == 5
    assert "verify the ONNX folder" in refused.stderr


def test_from_a_checkpoint_with_shapes_of_ones_own(tmp_path: Path) -> None:
    shapes = [f"--{kind}-shapes=pixel_values:{n}x3x8x8" for kind, n in (("min", 2), ("opt", 4), ("max", 6))]
    result = matexport("trt", "-m", DIGITS, "-s", "eighth", "-o", tmp_path / "rtx", *shapes)
    assert result.code == 0, result
    manifest = json.loads((tmp_path / "rtx" / "matexport.json").read_text())
    assert manifest["profiles"]["default"]["pixel_values"]["max"] == [6, 3, 8, 8]


def test_several_chunks_build_too(tmp_path: Path) -> None:
    source = vision_checkpoint(tmp_path / "c", image_size=36, ngroups=2, n_layer=1)
    mx.export_onnx(source, tmp_path / "onnx", target="portable")
    mx.build_trt(tmp_path / "onnx", tmp_path / "rtx")
    assert (tmp_path / "rtx" / "model.engine").exists()


def unknown_op(path: Path) -> Path:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])
    graph = helper.make_graph([helper.make_node("NoSuchOp", ["x"], ["y"], domain="nowhere")], "g", [x], [y])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("nowhere", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def test_a_model_that_is_refused(tmp_path: Path) -> None:
    job = {
        "model": str(unknown_op(tmp_path / "m.onnx")),
        "engine": str(tmp_path / "e"),
        "profiles": [],
        "capabilities": [86],
    }
    with pytest.raises(InputError, match="TensorRT-RTX refuses the model: "):
        run_builder(job, tmp_path, "TensorRT-RTX")
    assert not (tmp_path / "e").exists()


def test_an_abort_of_the_library_is_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = tmp_path / "child.py"
    child.write_text("import os, sys\nprint('terminate called', file=sys.stderr, flush=True)\nos.abort()")
    monkeypatch.setattr(build, "__file__", str(tmp_path / "build.py"))
    with pytest.raises(InputError, match="died with SIGABRT: terminate called"):
        run_builder({}, tmp_path, "TensorRT-RTX")
    child.write_text("raise RuntimeError('odd')")
    with pytest.raises(MatexportError, match="RuntimeError: odd"):
        run_builder({}, tmp_path, "TensorRT-RTX")


def test_the_library_has_its_symlink() -> None:
    with rtx_environment() as environment:
        links = Path(environment["LD_LIBRARY_PATH"].split(":")[0])
        assert (links / "libtensorrt_rtx.so").resolve().name.startswith("libtensorrt_rtx.so.")


def test_without_the_package(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "tensorrt" in name else find_spec(name))
    with pytest.raises(MissingError, match=r"pip install 'matexport\[rtx\]'"):
        mx.build_trt(exported, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_target_tensorrt_needs_tensorrt(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorrt" else find_spec(name))
    result = matexport("trt", "-m", exported, "-o", tmp_path / "out", "--target", "tensorrt")
    assert result.code == 5
    assert "package tensorrt, which is not installed" in result.stderr
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find_spec("json"))
    monkeypatch.setattr(build, "find_gpus", tuple)
    result = matexport("trt", "-m", exported, "-o", tmp_path / "out", "--target", "tensorrt")
    assert result.code == 5
    assert "needs an NVIDIA GPU" in result.stderr


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--min-shapes=pixel_values:1x3x8x8"], 2, "give all three"),
        (["--min-shapes=pixel_values"], 2, "is not a shape"),
        (["--min-shapes=pixel_values:\u00b2x3"], 2, "is not a shape"),
        (["--min-shapes=a:1,a:2", "--max-shapes=a:3"], 2, "give all three"),
        (["--min-shapes=a:1", "--opt-shapes=a:1", "--max-shapes=a:1"], 4, "has no input 'a'"),
        (["--target=toaster"], 2, "one of rtx, rtx-ampere, rtx-ada, rtx-blackwell, tensorrt"),
        (["--target=rtx-ada", "--target=toaster"], 2, "unknown target 'toaster'"),
        (["-s", "half"], 2, "one slice already"),
    ],
)
def test_usage(exported: Path, tmp_path: Path, options: list[str], code: int, message: str) -> None:
    result = matexport("trt", "-m", exported, "-o", tmp_path / "out", *options)
    assert result.code == code, result
    assert message in result.stderr


def test_the_output_never_overlaps_the_checkpoint(tmp_path: Path) -> None:
    """By way of a temporary ONNX folder the input must be as safe as directly."""
    mx.plan(DIGITS, "eighth").write(tmp_path / "eighth")
    before = content(tmp_path / "eighth")
    for output in (tmp_path / "eighth", tmp_path / "eighth" / "rtx", tmp_path):
        result = matexport("trt", "-m", tmp_path / "eighth", "-o", output, "--force")
        assert result.code == 2, result
        assert "overlaps the input" in result.stderr
    assert content(tmp_path / "eighth") == before


def test_a_tampered_onnx_folder_is_not_built(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "onnx")
    with (tmp_path / "onnx" / "model.onnx_data").open("r+b") as f:
        f.write(b"x")
    result = matexport("trt", "-m", tmp_path / "onnx", "-o", tmp_path / "rtx")
    assert result.code == 3
    assert "'model.onnx_data' was changed" in result.stderr


MASK = {80: 0x02, 86: 0x04, 89: 0x08, 120: 0x10, 121: 0x20}  # what bytes 32 to 35 of an engine say, since 1.7


def test_several_targets(exported: Path, tmp_path: Path) -> None:
    wanted = {"rtx": [86, 89, 120, 121], "rtx-ampere": [86], "rtx-ada": [89], "rtx-blackwell": [120, 121]}
    options = [f"--target={name}" for name in [*wanted, "rtx-ada"]]
    result = matexport("trt", "-m", exported, "-o", tmp_path / "engines", *options)
    assert result.code == 0, result
    assert sorted(path.name for path in (tmp_path / "engines").iterdir()) == sorted(wanted)
    for name, capabilities in wanted.items():
        folder = tmp_path / "engines" / name
        manifest = json.loads((folder / "matexport.json").read_text())
        assert (manifest["target"], manifest["capabilities"]) == (name, capabilities)
        mask = int.from_bytes((folder / "model.engine").read_bytes()[32:36], "little")
        assert mask == sum(MASK[n] for n in capabilities)
