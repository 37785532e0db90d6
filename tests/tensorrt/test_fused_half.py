"""Fused engines in half precision: what the ops read and write along the sequence is in the type of the products."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

import matexport as mx
import matexport_plugins
from matexport.tensorrt.fused import fused_model
from support import DIGITS, language_checkpoint, matexport

KINDS = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
ROWS = {"Mamba2Scan": (0, 1, 3, 4), "CausalConv1d": (0,)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    folder = tmp_path_factory.mktemp("half")
    small = language_checkpoint(folder / "source", n_layer=2, ngroups=2)
    made = {}
    for dtype in KINDS:
        for model, source, row in (("vision", DIGITS, "half"), ("language", small, None)):
            made[model, dtype] = folder / f"{model}-{dtype}"
            mx.export_onnx(source, made[model, dtype], slice=row, target="cuda", dtype=dtype)
    return made


def fused(folder: Path, *, weights: bool = False) -> onnx.ModelProto:
    model = onnx.load(folder / "model.onnx", load_external_data=weights)
    fused_model(model)
    return model


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    known = {t.name: t.data_type for t in model.graph.initializer}
    values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    return known | {v.name: v.type.tensor_type.elem_type for v in values}


@pytest.mark.parametrize("dtype", list(KINDS))
@pytest.mark.parametrize("model", ["vision", "language"])
def test_types(model: str, dtype: str, exported: dict[tuple[str, str], Path]) -> None:
    """All that may be is in half precision, the rest is not; and nothing is cast there and back."""
    made = fused(exported[model, dtype])
    known, kind = types_of(made), KINDS[dtype]
    casts = {n.output[0]: n for n in made.graph.node if n.op_type == "Cast"}
    for node in made.graph.node:
        if node.domain:
            rows = ROWS[node.op_type]
            found = {i: known[name] for i, name in enumerate(node.input)}
            assert {found[i] for i in rows} == {kind}
            others = {found[i] for i in found if i not in rows}
            assert others <= {TensorProto.FLOAT, TensorProto.BOOL}
            assert known[node.output[0]] == kind
            assert all(known[name] == TensorProto.FLOAT for name in node.output[1:])
        if node.op_type == "Cast" and node.input[0] in casts and node.attribute[0].i == kind:
            assert known[casts[node.input[0]].input[0]] != kind, node.name
    before = onnx.load(exported[model, dtype] / "model.onnx", load_external_data=False)
    layers = sum(n.op_type == "Mamba2Scan" for n in before.graph.node)
    added = sum(n.op_type == "Cast" for n in made.graph.node) - sum(n.op_type == "Cast" for n in before.graph.node)
    assert layers > 0
    assert (
        added <= 2 * layers + 1
    )  # the gate's and y's where there was one; of a last layer in standard operators, more


@pytest.mark.parametrize("plugin", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", list(KINDS))
def test_engines_are_built(plugin: str, dtype: str, exported: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    """Strongly typed: a plugin that got another type than it takes would be refused."""
    if plugin == "cuda" and matexport_plugins.trt_library() is None:
        pytest.skip("there is no nvcc: libmatexport_cuda was NOT built and NOT tested")
    for model in ("vision", "language"):
        options = ["--plugin", plugin, "--target", "rtx-ada"]
        result = matexport("trt", "-m", exported[model, dtype], "-o", tmp_path / model, *options)
        assert result.code == 0, result
        assert b"ai.matexport" in (tmp_path / model / "model.engine").read_bytes()


def in_float32(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same with ops in float32 between casts, as ONNX Runtime's CPU has them."""
    known, nodes = types_of(model), []
    for node in model.graph.node:
        if not node.domain:
            nodes.append(node)
            continue
        for i in ROWS[node.op_type]:
            wide = f"{node.name}/{i}/wide"
            nodes.append(helper.make_node("Cast", [node.input[i]], [wide], to=TensorProto.FLOAT))
            node.input[i] = wide
        narrow, node.output[0] = node.output[0], f"{node.name}/y"
        nodes += [node, helper.make_node("Cast", [node.output[0]], [narrow], to=known[narrow])]
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)
    return model


@pytest.mark.parametrize("model", ["vision", "language"])
def test_it_computes_the_same_but_for_rounding(model: str, exported: dict[tuple[str, str], Path]) -> None:
    library = matexport_plugins.ort_library()
    if library is None:
        pytest.skip("there is no libmatexport_ort")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.register_custom_ops_library(str(library))
    folder, rng = exported[model, "float16"], np.random.default_rng(0)
    original = onnx.load(folder / "model.onnx")
    inputs: dict[str, Any] = {}
    for value in original.graph.input:
        shape = [d.dim_value or 3 for d in value.type.tensor_type.shape.dim]
        integers = value.type.tensor_type.elem_type == TensorProto.INT64
        inputs[value.name] = np.ones(shape, int) if integers else rng.standard_normal(shape, np.float32)
    runs = [
        onnxruntime.InferenceSession(m.SerializeToString(), options).run(None, inputs)
        for m in (original, in_float32(fused(folder, weights=True)))
    ]
    for want, got in zip(*runs, strict=True):
        scale = np.abs(want).max()
        assert np.abs(got - want).max() < 5e-3 * scale
    assert any((got != want).any() for want, got in zip(*runs, strict=True))  # it is not the same file
