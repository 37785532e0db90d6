"""`verify` passes what is right, and fails, with exit code 3 and the name, whatever was tampered with."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
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


def hide(folder: Path, name: str, data: bytes) -> None:
    """Changes a file and its digest in the manifest alike."""
    (folder / name).write_bytes(data)
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest(lambda m: m["files"].update({name: entry}))(folder)


def config_with(folder: Path, **changes: Any) -> bytes:
    return json.dumps({**json.loads((folder / "config.json").read_text()), **changes}).encode()


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
    "config value": (
        lambda f: (f / "config.json").write_text(
            (f / "config.json").read_text().replace('"head_dim": 2', '"head_dim": 7')
        ),
        "config.json",
    ),
    "unversioned": (
        lambda f: (manifest(lambda m: m.pop("matexport"))(f), (f / "README.md").write_text("x")),
        "README.md",
    ),
    "a file more": (lambda f: (f / "extra.py").write_text("x"), "extra.py"),
    "other code": (lambda f: hide(f, "modeling_matmamba.py", b"evil"), "modeling_matmamba.py"),
    "config hidden": (lambda f: hide(f, "config.json", config_with(f, model_type="vit")), "config.json"),
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


def forget_weights(folder: Path) -> None:
    flip_weight(folder)
    hide(folder, "model.onnx_data", (folder / "model.onnx_data").read_bytes())
    manifest(lambda m: m.update(weights={}))(folder)


ONNX_DAMAGE = {
    "forgotten weights": (forget_weights, "provenance"),
    "truncated": (lambda f: (f / "model.onnx").write_bytes((f / "model.onnx").read_bytes()[:99]), "digest"),
    "model gone": (lambda f: (f / "model.onnx").unlink(), "digest"),
    "weights gone": (lambda f: (f / "model.onnx_data").unlink(), "digest"),
    "output renamed": (edit_onnx(lambda m: setattr(m.graph.output[0], "name", "/const/i64/[0,0,64,2]")), "digest"),
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
    for kind in ("checkpoint", "onnx"):  # that bit is in a layer that the slice skips
        assert matexport("verify", "-m", artefacts / kind, "--source", other).code == 0
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


def test_artefacts_of_slices_are_verified_against_the_origin(artefacts: Path, vision: Path, tmp_path: Path) -> None:
    """slice, slice again, export: the ONNX folder is proven against the direct source and against the first one."""
    again = mx.plan(artefacts / "checkpoint", Row("again", skipped=(1,), mamba=Dims(fill=3)))
    again.write(tmp_path / "two")
    mx.export_onnx(tmp_path / "two", tmp_path / "onnx")
    for artefact in ("two", "onnx"):
        report = mx.verify(tmp_path / artefact, vision)
        assert report.passed, report.to_markdown()
    assert mx.verify(tmp_path / "two", artefacts / "checkpoint").passed
    assert mx.verify(tmp_path / "onnx", tmp_path / "two").passed
    record = json.loads((tmp_path / "onnx" / "matexport.json").read_text())["origin"]
    assert record["slice"]["layers"] == [{"source": 0, "width": 3}]
    assert record["slice"]["skipped"] == [1, 2]
    other = vision_checkpoint(tmp_path / "other", n_layer=2)
    assert matexport("verify", "-m", tmp_path / "onnx", "--source", other).code in (3, 4)


@pytest.mark.parametrize("data", [b"", b"PK\3\4", b"\x93NUMPY"])
def test_inputs_that_are_no_npz(artefacts: Path, vision: Path, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "bad.npz").write_bytes(data)
    result = matexport("verify", "-m", artefacts / "onnx", "--source", vision, "--inputs", tmp_path / "bad.npz")
    assert result.code == 4
    np.savez(tmp_path / "text.npz", pixel_values=np.full((2, 3, 12, 12), "x"))
    result = matexport("verify", "-m", artefacts / "onnx", "--source", vision, "--inputs", tmp_path / "text.npz")
    assert result.code == 4
    assert "holds no numbers" in result.stderr


def test_a_report_that_cannot_be_written_hides_no_verdict(artefacts: Path, vision: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(artefacts / "checkpoint", folder)
    tensors(flip)(folder)
    result = matexport("verify", "-m", folder, "--source", vision, "--report", tmp_path)
    assert result.code == 3
    assert "report cannot be written" in result.stderr


def test_without_torch(artefacts: Path, vision: Path) -> None:
    code = "import sys\nsys.modules['torch'] = None\nfrom matexport.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "verify", "-m", str(artefacts / "onnx"), "--source", str(vision)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 5
    assert "pip install 'matexport[torch]'" in done.stderr


def test_nothing_is_written(artefacts: Path, vision: Path) -> None:
    before = content(artefacts) | content(vision)
    matexport("verify", "-m", artefacts / "onnx", "--source", vision)
    assert content(artefacts) | content(vision) == before
