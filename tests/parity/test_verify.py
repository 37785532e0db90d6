"""`verify` passes what is right, and fails, with exit code 3 and the name, whatever was tampered with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

import matexport as mx
from matexport.dims import Dims
from matexport.slice_table import Row
from support import content, matexport, vision_checkpoint

ROW = Row("mixed", skipped=(1,), mamba=Dims(head=(32, 5)))


@pytest.fixture(scope="module")
def artefacts(vision: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artefacts")
    planned = mx.plan(vision, ROW)
    planned.write(folder / "checkpoint")
    mx.export_onnx(planned, folder / "onnx")
    return folder


@pytest.mark.parametrize("kind", ["checkpoint", "onnx"])
def test_what_is_right_passes(artefacts: Path, vision: Path, kind: str, tmp_path: Path) -> None:
    result = matexport(
        "verify", "-m", artefacts / kind, "--source", vision, "--format", "json", "--report", tmp_path / "r.md"
    )
    assert result.code == 0, result
    assert result.json["passed"]
    kinds = [comparison["kind"] for comparison in result.json["comparisons"]]
    assert kinds.count(kind) == 1
    assert kinds.count("provenance") == len(mx.plan(vision, ROW).plan.tensors)
    assert (tmp_path / "r.md").read_text().startswith(f"# Parity of `{kind}`: passed")


def tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        arrays = load_file(path)
        change(arrays)
        save_file(arrays, path, metadata={"format": "pt"})

    return apply


def manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "matexport.json"
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))

    return apply


def flip(arrays: dict[str, np.ndarray]) -> None:
    """The last bit of one element."""
    arrays["layers.1.mixer.norm.weight"].view(np.uint32)[2] ^= 1


CHECKPOINT_DAMAGE = {
    "one bit": (tensors(flip), "layers.1.mixer.norm.weight"),
    "wrong conv tail": (
        tensors(lambda a: a.update({"layers.0.mixer.conv1d.bias": np.roll(a["layers.0.mixer.conv1d.bias"], 1)})),
        "layers.0.mixer.conv1d.bias",
    ),
    "missing tensor": (tensors(lambda a: a.pop("head.bias")), "head.bias"),
    "extra tensor": (tensors(lambda a: a.update(extra=np.zeros(3, np.float32))), "extra"),
    "other shape": (tensors(lambda a: a.update({"head.bias": np.zeros(3, np.float32)})), "head.bias"),
    "other dtype": (tensors(lambda a: a.update({"head.bias": a["head.bias"].astype(np.float16)})), "head.bias"),
    "NaN": (tensors(lambda a: a["cls_token"].fill(np.nan)), "cls_token"),
    "config": (lambda f: (f / "config.json").write_text("{}"), "config.json"),
    "file gone": (lambda f: (f / "modeling_matmamba.py").unlink(), "modeling_matmamba.py"),
    "other width": (manifest(lambda m: m["slice"]["layers"][0].update(width=16)), "layers.0.mixer"),
    "other view": (
        manifest(lambda m: m["tensors"]["layers.0.mixer.D"].update(ranges=[[[1, 33]]])),
        "layers.0.mixer.D",
    ),
}


@pytest.mark.parametrize("damage", CHECKPOINT_DAMAGE)
def test_damaged_checkpoints_fail(artefacts: Path, vision: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(artefacts / "checkpoint", folder)
    apply, name = CHECKPOINT_DAMAGE[damage]
    apply(folder)
    result = matexport("verify", "-m", folder, "--source", vision, "--format", "json")
    assert result.code == 3, result
    assert name in result.stderr
    assert "Traceback" not in result.stderr
    failed = [c for c in result.json["comparisons"] if not c["passed"]]
    assert any(name in c["name"] for c in failed)


def edit_onnx(change: Callable[[onnx.ModelProto], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        change(model)
        onnx.save(model, folder / "model.onnx")

    return apply


def full_width_norm(model: onnx.ModelProto) -> None:
    """Divides the gated norm's mean by a larger width, as if it were taken over the full one."""
    for node in model.graph.node:
        if node.name == "/layers.0/mixer/norm/ReduceMean":
            node.op_type = "ReduceSum"


def flip_weight(folder: Path) -> None:
    data = bytearray((folder / "model.onnx_data").read_bytes())
    data[5000] ^= 1
    (folder / "model.onnx_data").write_bytes(data)


ONNX_DAMAGE = {
    "one bit": (flip_weight, "provenance"),
    "wrong norm": (edit_onnx(full_width_norm), "onnx"),
    "graph touched": (edit_onnx(lambda m: setattr(m, "doc_string", "x")), "digest"),
}


@pytest.mark.parametrize("damage", ONNX_DAMAGE)
def test_damaged_onnx_fails(artefacts: Path, vision: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(artefacts / "onnx", folder)
    apply, kind = ONNX_DAMAGE[damage]
    apply(folder)
    result = matexport("verify", "-m", folder, "--source", vision, "--format", "json")
    assert result.code == 3, result
    assert kind in {c["kind"] for c in result.json["comparisons"] if not c["passed"]}


def test_another_source_fails(artefacts: Path, tmp_path: Path) -> None:
    other = vision_checkpoint(tmp_path / "other")
    arrays = load_file(other / "model.safetensors")
    flip(arrays)
    save_file(arrays, other / "model.safetensors")
    for kind in ("checkpoint", "onnx"):
        assert matexport("verify", "-m", artefacts / kind, "--source", other).code in (0, 3)
    arrays["layers.2.mixer.norm.weight"][0] += 1  # layer 1 of the slice is layer 2 of the source
    save_file(arrays, other / "model.safetensors")
    for kind in ("checkpoint", "onnx"):
        result = matexport("verify", "-m", artefacts / kind, "--source", other)
        assert result.code == 3
        assert "layers.1.mixer.norm.weight" in result.stderr


def test_inputs_of_ones_own(artefacts: Path, vision: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).standard_normal((2, 3, 12, 12)).astype(np.float32)
    np.savez(tmp_path / "golden.npz", pixel_values=pixels)
    command = ["verify", "-m", artefacts / "onnx", "--source", vision, "--inputs"]
    assert matexport(*command, tmp_path / "golden.npz").code == 0
    (tmp_path / "bad.npz").write_text("no")
    result = matexport(*command, tmp_path / "bad.npz")
    assert result.code == 4
    assert "not an .npz file" in result.stderr
    np.savez(tmp_path / "other.npz", images=pixels)
    result = matexport(*command, tmp_path / "other.npz")
    assert result.code == 4, result
    assert "pixel_values" in result.stderr
    np.savez(tmp_path / "shape.npz", pixel_values=pixels[:, :, :5])
    result = matexport(*command, tmp_path / "shape.npz")
    assert result.code == 4
    assert "(any, 3, 12, 12) expected" in result.stderr


def test_a_checkpoint_of_another_tool(artefacts: Path, vision: Path, tmp_path: Path) -> None:
    """Without a manifest, -s says which slice it claims to be."""
    folder = tmp_path / "plain"
    shutil.copytree(artefacts / "checkpoint", folder)
    (folder / "matexport.json").unlink()
    table = tmp_path / "t.csv"
    table.write_text('name,Layers Skipped,Mamba Dims\nmixed,[1],"[32, 5]"\nother,[1],"[32, 6]"\n')
    command = ["verify", "-m", folder, "--source", vision]
    assert matexport(*command, "-c", table, "-s", "mixed").code == 0
    assert matexport(*command, "-c", table, "-s", "other").code == 3
    result = matexport(*command)
    assert result.code == 4
    assert "has no manifest" in result.stderr


def test_nothing_is_written(artefacts: Path, vision: Path) -> None:
    before = content(artefacts) | content(vision)
    matexport("verify", "-m", artefacts / "onnx", "--source", vision)
    assert content(artefacts) | content(vision) == before
