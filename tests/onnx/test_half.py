"""Products in half precision, target `cuda`: what is stored and computed in which type, and how far it is off."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import matexport as mx
from matexport.dims import Dims
from matexport.parity.comparison import TOLERANCES
from matexport.slice_table import Row
from support import matexport

ROW = Row("mixed", skipped=(1,), mamba=Dims(head=(32, 12)))
NAMES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
PRODUCTS = ("Gemm", "MatMul")


@pytest.fixture(scope="module")
def exported(language: Path, vision: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("half")
    for name, source in (("language", language), ("vision", vision)):
        mx.export_onnx(mx.plan(source, ROW), folder / f"{name}-float16", target="cuda")
        mx.export_onnx(mx.plan(source, ROW), folder / f"{name}-bfloat16", target="cuda", dtype="bfloat16")
    return folder


def types(folder: Path) -> tuple[onnx.ModelProto, dict[str, int]]:
    """A model, and the element type of every value in it."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    graph = model.graph
    found = {v.name: v.type.tensor_type.elem_type for v in [*graph.input, *graph.output, *graph.value_info]}
    return model, found | {i.name: i.data_type for i in graph.initializer}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["language", "vision"])
def test_products_alone_are_in_half_precision(exported: Path, kind: str, dtype: str) -> None:
    model, types_of = types(exported / f"{kind}-{dtype}")
    onnx.checker.check_model(exported / f"{kind}-{dtype}" / "model.onnx", full_check=True)
    assert json.loads((exported / f"{kind}-{dtype}" / "matexport.json").read_text())["dtype"] == dtype
    for value in [*model.graph.input, *model.graph.output]:
        assert types_of[value.name] in (TensorProto.FLOAT, TensorProto.INT64)  # whatever is inside
    for node in model.graph.node:
        half = {NAMES[dtype]} & {types_of.get(name) for name in [*node.input, *node.output]}
        assert not half or node.op_type in (*PRODUCTS, "Cast", "Gather", "Split", "Transpose"), node.name
        if node.op_type in PRODUCTS and "scan" not in node.name and "conv1d" not in node.name:
            assert {types_of[name] for name in [*node.input, *node.output]} == {NAMES[dtype]}
    stored = {i.name: i.data_type for i in model.graph.initializer if not i.name.startswith("/const/")}
    for name, element in stored.items():
        matrix = name.endswith(("in_proj.weight", "out_proj.weight", "embeddings.weight", "head.weight", "head.bias"))
        assert element == (NAMES[dtype] if matrix else TensorProto.FLOAT), name
    assert "layers.0.mixer.A_log" in {name.removeprefix("backbone.") for name in stored}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["language", "vision"])
def test_verified(exported: Path, request: pytest.FixtureRequest, kind: str, dtype: str) -> None:
    """In ONNX Runtime's build for the CPU, which casts what it has no kernel for."""
    report = mx.verify(exported / f"{kind}-{dtype}", request.getfixturevalue(kind))
    assert report.passed, report.to_markdown()
    compared = {c.name: c for c in report.comparisons if c.kind == f"onnx {dtype}"}
    states = {"states.conv", "states.scan"} if kind == "language" else set()
    assert compared.keys() >= {"logits", *states, *(f"decode@{n}.logits" for n in (1, 18, 36) if states)}
    assert all(c.max_rel is not None and c.max_rel > 1e-5 for c in compared.values())  # it is not float32
    assert TOLERANCES["onnx bfloat16"] == 8 * TOLERANCES["onnx float16"]  # by the bits that they have


def test_what_is_wrong_fails(exported: Path, language: Path, tmp_path: Path) -> None:
    """Negative control: D of one layer is not there."""
    folder = tmp_path / "changed"
    shutil.copytree(exported / "language-float16", folder)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    stored = next(i for i in model.graph.initializer if i.name.endswith("layers.0.mixer.D"))
    place = {entry.key: entry.value for entry in stored.external_data}
    with (folder / "model.onnx_data").open("r+b") as f:
        f.seek(int(place["offset"]))
        f.write(bytes(int(place["length"])))
    failed = {c.kind for c in mx.verify(folder, language).comparisons if not c.passed}
    assert failed == {"digest", "provenance", "onnx float16"}


def test_forms_and_one_file_for_many_rows(language: Path, tmp_path: Path) -> None:
    for form in ("contrib", "stock"):
        mx.export_onnx(mx.plan(language, ROW), tmp_path / form, target="cuda", form=form)
        report = mx.verify(tmp_path / form, language)
        assert report.passed, report.to_markdown()
    rows = [mx.plan(language, row) for row in (None, ROW)]
    mx.export_bundle(rows, tmp_path / "elastic", target="cuda")
    report = mx.verify(tmp_path / "elastic", language)
    assert report.passed, report.to_markdown()
    assert "onnx float16" in {c.kind for c in report.comparisons}


def test_command_line(vision: Path, tmp_path: Path) -> None:
    result = matexport("onnx", "-m", vision, "-o", tmp_path / "out", "--target", "cuda")
    assert result.code == 0, result.stderr
    assert "dtype: float16" in matexport("inspect", "-m", tmp_path / "out").stdout
    mx.export_onnx(vision, tmp_path / "float32", target="cuda", dtype="float32")
    assert {c.kind for c in mx.verify(tmp_path / "float32", vision).comparisons} >= {"onnx"}
    result = matexport("onnx", "-m", vision, "--in-place", "--target", "cuda")
    assert (result.code, (vision / "model.onnx").exists()) == (2, False)
    assert "stores weights in its own type" in result.stderr


def test_a_value_beyond_float16_is_refused(tmp_path: Path) -> None:
    from support import language_config, language_tensors, write_checkpoint

    config = language_config(n_layer=1)
    tensors = language_tensors(config)
    tensors["backbone.layers.0.mixer.in_proj.weight"][3, 5] = 1e5
    source = write_checkpoint(tmp_path / "source", config, tensors)
    result = matexport("onnx", "-m", source, "-o", tmp_path / "out", "--target", "cuda")
    assert (result.code, (tmp_path / "out").exists()) == (4, False)
    assert "beyond float16" in result.stderr
    assert np.isfinite(tensors["backbone.layers.0.mixer.in_proj.weight"]).all()
