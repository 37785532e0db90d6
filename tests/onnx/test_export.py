"""ONNX folders: one file loads everywhere, its weights are the source's bytes, its names can be read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest

import matexport as mx
from matexport.checkpoint import open_checkpoint
from matexport.dims import Dims
from matexport.errors import UsageError
from matexport.slice_table import Row
from support import content, matexport, vision_checkpoint, vision_config, vision_tensors, write_checkpoint

ROW = Row("mixed", skipped=(1,), mamba=Dims(head=(32, 5)))


@pytest.fixture(scope="module")
def exported(vision: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / "out"
    mx.export_onnx(mx.plan(vision, ROW), folder, target="portable")
    return folder


def test_the_files(exported: Path) -> None:
    assert sorted(content(exported)) == ["config.json", "matexport.json", "model.onnx", "model.onnx_data"]
    onnx.checker.check_model(exported / "model.onnx", full_check=True)
    model = onnx.load(exported / "model.onnx", load_external_data=False)
    assert (model.ir_version, model.opset_import[0].version, len(model.opset_import)) == (10, 21, 1)
    assert (exported / "model.onnx").stat().st_size < 200_000  # no weights inside


def test_readable_names(exported: Path) -> None:
    graph = onnx.load(exported / "model.onnx", load_external_data=False).graph
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    assert "/layers.0/mixer/scan/Softplus" in names
    assert all(re.fullmatch(r"/[\w./]+", name) for name in names)
    weights = {initializer.name for initializer in graph.initializer}
    assert "layers.1.mixer.in_proj.weight" in weights
    assert "layers.2.mixer.in_proj.weight" not in weights
    assert len(graph.value_info) > 0.9 * len(names)  # every shape is known


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_dynamic_batch(exported: Path, vision: Path, batch: int) -> None:
    planned = mx.plan(vision, ROW)
    inputs = planned.family.sample_inputs(planned.checkpoint.config, batch, seed=batch)
    want = planned.family.load_oracle(planned.checkpoint, planned.plan.layers)(inputs)["logits"]
    session = onnxruntime.InferenceSession(exported / "model.onnx", providers=["CPUExecutionProvider"])
    got = session.run(["logits"], inputs)[0]
    assert np.abs(got - want).max() / np.abs(want).max() < 1e-5


def test_weights_are_the_sources_bytes(exported: Path, vision: Path) -> None:
    source = open_checkpoint(vision)
    manifest = json.loads((exported / "matexport.json").read_text())
    model = onnx.load(exported / "model.onnx")  # with its external data, by the onnx library
    plan = mx.plan(vision, ROW).plan
    found = {}
    for initializer in model.graph.initializer:
        if initializer.name in manifest["weights"]:
            tensor = plan.tensors[initializer.name]
            want = tensor.view.of(source.read(tensor.view.source))
            array = onnx.numpy_helper.to_array(initializer)
            found[initializer.name] = array
            assert np.array_equal(array, want.T if manifest["weights"][initializer.name]["transposed"] else want)
    assert found.keys() == plan.tensors.keys()


def test_alignment(exported: Path) -> None:
    for initializer in onnx.load(exported / "model.onnx", load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in initializer.external_data}
        if place:
            large = int(place["length"]) >= 1 << 16
            assert int(place["offset"]) % (4096 if large else 64) == 0


def test_same_input_same_bytes(exported: Path, vision: Path, tmp_path: Path) -> None:
    mx.export_onnx(mx.plan(vision, ROW), tmp_path / "again", target="portable")
    assert content(tmp_path / "again") == content(exported)


def test_from_a_slice_as_from_the_source(exported: Path, vision: Path, tmp_path: Path) -> None:
    mx.plan(vision, ROW).write(tmp_path / "slice")
    mx.export_onnx(tmp_path / "slice", tmp_path / "out", target="portable")
    assert (tmp_path / "out" / "model.onnx_data").read_bytes() == (exported / "model.onnx_data").read_bytes()
    assert mx.verify(tmp_path / "out", tmp_path / "slice").passed


def test_several_chunks(tmp_path: Path) -> None:
    """82 tokens: one full chunk of 64 and a ragged one; the state is carried from one to the other."""
    source = vision_checkpoint(tmp_path / "c", image_size=36, ngroups=2, n_layer=2)
    mx.export_onnx(source, tmp_path / "out", target="portable")
    assert mx.verify(tmp_path / "out", source).passed


def test_one_file(exported: Path, vision: Path, tmp_path: Path) -> None:
    planned = mx.plan(vision, ROW)
    mx.export_onnx(planned, tmp_path / "half.onnx")
    assert sorted(content(tmp_path)) == ["half.onnx", "half.onnx.json", "half.onnx_data"]
    onnxruntime.InferenceSession(tmp_path / "half.onnx", providers=["CPUExecutionProvider"])
    assert mx.verify(tmp_path / "half.onnx", vision).passed
    with pytest.raises(UsageError, match="output exists"):
        mx.export_onnx(planned, tmp_path / "half.onnx")
    mx.export_onnx(planned, tmp_path / "half.onnx", force=True)
    assert len(content(tmp_path)) == 3
    (tmp_path / "other.onnx_data").write_text("precious")
    with pytest.raises(UsageError, match="output exists"):
        mx.export_onnx(planned, tmp_path / "other.onnx")
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(UsageError, match="output exists"):
        mx.export_onnx(planned, tmp_path / "folder.onnx", force=True)
    assert (tmp_path / "other.onnx_data").read_text() == "precious"
    assert len(content(tmp_path)) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "toaster"], "one of cpu, cuda, genai, web, portable"),
        (["--target", "rtx"], "one of cpu, cuda, genai, web, portable"),
        (["--form", "x"], "'stock'"),
    ],
)
def test_usage(vision: Path, tmp_path: Path, options: list[str], message: str) -> None:
    result = matexport("onnx", "-m", vision, "-o", tmp_path / "out", *options)
    assert result.code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_dtypes_are_cast_to_float32(tmp_path: Path, dtype: str) -> None:
    """The cast is recorded, the slice keeps its dtype, and both are verified against the source in fp32."""
    config = vision_config()
    tensors = {name: array.astype(getattr(ml_dtypes, dtype, dtype)) for name, array in vision_tensors(config).items()}
    source = write_checkpoint(tmp_path / "c", config, tensors)
    planned = mx.plan(source, ROW)
    planned.write(tmp_path / "slice")
    mx.export_onnx(planned, tmp_path / "onnx")
    manifest = json.loads((tmp_path / "onnx" / "matexport.json").read_text())
    assert {weight["dtype"] for weight in manifest["weights"].values()} == {"F32"}
    short = {"float16": "F16", "bfloat16": "BF16", "float64": "F64"}[dtype]
    assert {tensor.dtype for tensor in open_checkpoint(tmp_path / "slice").tensors.values()} == {short}
    for name in ("slice", "onnx"):
        report = mx.verify(tmp_path / name, source)
        assert report.passed, report.to_markdown()
