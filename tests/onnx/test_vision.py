"""MatMamba-Vision in every form: the last layer computes only what the class token needs, and the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import matexport as mx
from matexport.dims import Dims
from matexport.graph.stateful import FORMS
from matexport.runtimes.ort import load_onnx
from matexport.slice_table import Row
from support import vision_checkpoint

ROW = Row("mixed", skipped=(1,), mamba=Dims(head=(32, 6)))


def lengths(folder: Path, *nodes: str) -> list[int]:
    """How many tokens the outputs of these nodes have, when the model runs."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    names = [next(node.output[0] for node in model.graph.node if node.name == name) for name in nodes]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    onnx.save(model, folder / "probed.onnx")
    pixels = np.zeros((2, 3, 12, 12), np.float32)
    session = onnxruntime.InferenceSession(folder / "probed.onnx", providers=["CPUExecutionProvider"])
    return [array.shape[1] for array in session.run(names, {"pixel_values": pixels})]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{}, {"ngroups": 2}, {"dt_limit": [0.01, 0.1]}, {"d_conv": 2}], ids=str)
def test_the_last_layer_computes_the_class_token_alone(tmp_path: Path, form: str, options: dict[str, Any]) -> None:
    """The oracle computes all tokens of all layers."""
    source = vision_checkpoint(tmp_path / "source", **options)
    mx.export_onnx(mx.plan(source, ROW), tmp_path / "out", form=form)
    report = mx.verify(tmp_path / "out", source)
    assert report.passed, report.to_markdown()
    for layer, length in ((0, 10), (1, 1)):  # 9 patches and the class token
        assert lengths(tmp_path / "out", f"/layers.{layer}/mixer/norm/Mul", f"/layers.{layer}/Add") == [length, length]


@pytest.mark.parametrize("form", FORMS)
def test_pooling_needs_all_tokens(tmp_path: Path, form: str) -> None:
    source = vision_checkpoint(tmp_path / "source")
    config = (source / "config.json").read_text()
    (source / "config.json").write_text(config.replace('"pool": "cls"', '"pool": "avg"'))
    mx.export_onnx(mx.plan(source, ROW), tmp_path / "out", form=form)
    assert mx.verify(tmp_path / "out", source).passed
    assert lengths(tmp_path / "out", "/layers.1/Add") == [10]


def test_forms_agree(vision: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).standard_normal((3, 3, 12, 12)).astype(np.float32)
    outputs = {}
    for form in FORMS:
        mx.export_onnx(mx.plan(vision, ROW), tmp_path / form, form=form)
        for library in (True, False) if form == "custom" else (False,):
            run = load_onnx(tmp_path / form / "model.onnx", library=library)
            outputs[form, library] = run({"pixel_values": pixels})["logits"]
    want = outputs["stock", False]
    assert all(np.abs(got - want).max() < 1e-5 * np.abs(want).max() for got in outputs.values())
    assert any(not np.array_equal(got, want) for got in outputs.values())  # other code has run
