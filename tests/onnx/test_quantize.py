"""Quantised exports: the codes of ONNX Runtime's own quantiser, sensitive tensors as they were, stated losses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnxruntime.capi import _pybind_state as runtime

import matexport as mx
from matexport.checkpoint import open_checkpoint
from matexport.dims import Dims
from matexport.errors import UsageError
from matexport.graph.encoding import BLOCK, TYPED, Encoding, restored
from matexport.graph.encoding import METHODS as ALL
from matexport.slice_table import Row
from support import matexport

METHODS = [method for method in ALL if method not in TYPED]  # TensorRT's are in tests/tensorrt
ROW = Row("Half", mamba=Dims(fill=32))
RANDOM = np.random.default_rng(3)


@pytest.mark.parametrize("k", [32, 64, 256, 24, 70])
@pytest.mark.parametrize("method", ["int4-block", "int8-block"])
def test_codes_are_those_of_onnxruntime(method: str, k: int) -> None:
    n, bits = 40, Encoding(method, "codes").bits
    rows = RANDOM.standard_normal((n, k), dtype=np.float32) * RANDOM.uniform(0.01, 10, (n, 1)).astype(np.float32)
    rows[3] = 0
    blocks = -(-k // BLOCK)
    codes, scales = np.zeros((n, blocks, BLOCK * bits // 8), np.uint8), np.zeros((n, blocks), np.float32)
    zeros = np.zeros((n, -(-blocks * bits // 8)), np.uint8)
    theirs = runtime.quantize_matmul_4bits if bits == 4 else runtime.quantize_matmul_8bits
    theirs(codes, np.ascontiguousarray(rows.T), scales.reshape(-1), zeros.reshape(-1), BLOCK, n, k, True)
    got = {part: Encoding(method, part).encode(rows) for part in ("codes", "scales")}
    assert np.array_equal(got["scales"][rows.any(1)], scales[rows.any(1)])
    mine, other = (_restored(c, s, bits)[:, :k] for c, s in ((got["codes"], got["scales"]), (codes, scales)))
    assert np.abs(mine - rows).max() <= np.abs(other - rows).max() * (1 + 1e-6)
    assert (mine != other).mean() < 0.001  # ties may round otherwise


def _restored(codes: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    """From codes to weights, by the definition in MatMulNBits' documentation."""
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:-1], -1)
    values = (codes.astype(np.float32) - (1 << (bits - 1))) * scales[..., None]
    return values.reshape(len(values), -1)


def test_int8_is_a_scale_a_row() -> None:
    rows = RANDOM.standard_normal((7, 33), dtype=np.float32)
    codes, scales = (Encoding("int8", part).encode(rows) for part in ("codes", "scales"))
    assert np.abs(codes * scales[:, None] - rows).max() <= 0.5001 * scales.max()
    assert np.abs(codes).max(1).tolist() == [127] * 7


@pytest.fixture(scope="module")
def exported(language: Path, vision: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantised")
    for method in METHODS:
        for name, source in (("language", language), ("vision", vision)):
            mx.export_onnx(mx.plan(source, ROW), folder / f"{name}-{method}", quantize=method)
    return folder


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["language", "vision"])
def test_verified(exported: Path, request: pytest.FixtureRequest, kind: str, method: str) -> None:
    source = request.getfixturevalue(kind)
    report = mx.verify(exported / f"{kind}-{method}", source)
    assert report.passed, report.to_markdown()
    by_kind = {kind: [c for c in report.comparisons if c.kind == kind] for kind in (f"onnx {method}", "loss", "onnx")}
    assert by_kind["loss"]
    for c in by_kind["loss"]:  # it is quantised, and it says how far
        assert c.max_rel
        assert c.max_rel > 1e-3
        assert c.kl is not None
        assert c.top1 is not None
    assert all(c.of_loss and 0.01 < c.of_loss < c.tolerance for c in by_kind[f"onnx {method}"])
    assert bool(by_kind["onnx"]) == (method != "int8")  # where products can be in float32, they are right in it
    written = report.to_json()["weights"]
    data = (exported / f"{kind}-{method}" / "model.onnx_data").stat().st_size
    assert data - (256 << 10) < written["bytes"] <= data
    assert written["bytes"] < 0.5 * written["float32_bytes"]
    assert f"{written['bytes']:,} bytes" in report.to_markdown()
    stored = onnx.load(exported / f"{kind}-{method}" / "model.onnx").graph.initializer
    plain = open_checkpoint(source)
    for part in ("A_log", "D", "dt_bias", "conv1d.weight", "norm.weight"):
        name = next(i.name for i in stored if i.name.endswith(f"layers.1.mixer.{part}"))
        array = onnx.numpy_helper.to_array(next(i for i in stored if i.name == name))
        assert array.dtype == np.float32
        assert np.isin(array, plain.read(name)).all()


@pytest.mark.parametrize("method", ["int8-block", "int4-block"])
def test_a_table_and_a_tied_head_are_one(exported: Path, method: str) -> None:
    graph = onnx.load(exported / f"language-{method}" / "model.onnx", load_external_data=False).graph
    for part in ("codes", "scales"):
        users = [node.op_type for node in graph.node if f"backbone.embeddings.weight.{part}" in node.input]
        assert sorted(users) == ["Gather", "MatMulNBits"]
    assert not [i.name for i in graph.initializer if i.name.endswith("embeddings.weight")]


@pytest.mark.parametrize("method", METHODS)
def test_a_wrong_scale_fails(exported: Path, language: Path, tmp_path: Path, method: str) -> None:
    """Negative control of the bytes and of the bounds."""
    model = exported / f"language-{method}" / "model.onnx"
    initializers = onnx.load(model, load_external_data=False).graph.initializer
    scales = [
        {e.key: int(e.value) for e in i.external_data if e.key != "location"}
        for i in initializers
        if i.name.endswith("proj.weight.scales")
    ]
    raw = bytearray((model.parent / "model.onnx_data").read_bytes())
    for place in scales:
        end = place["offset"] + place["length"]
        values = np.frombuffer(bytes(raw[place["offset"] : end]), np.float32)
        raw[place["offset"] : end] = (values * 2).tobytes()
    for path in model.parent.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.onnx_data").write_bytes(raw)
    failed = {c.kind for c in mx.verify(tmp_path, language).comparisons if not c.passed}
    assert failed >= {"provenance", "digest", f"onnx {method}"}


@pytest.mark.parametrize("method", ["int8-block", "int4-block"])
def test_a_wrong_zero_point_fails(exported: Path, language: Path, tmp_path: Path, method: str) -> None:
    """Negative control of the numbers alone: weights are right byte for byte, and taken for others."""
    for path in (exported / f"language-{method}").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "MatMulNBits")
    sizes = {a.name: a.i for a in node.attribute}
    blocks = -(-sizes["K"] // BLOCK)
    shape, zero = (sizes["N"], -(-blocks * sizes["bits"] // 8)), 0x77 if sizes["bits"] == 4 else 127
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.full(shape, zero, np.uint8), "zeros"))
    node.input.append("zeros")
    onnx.save(model, tmp_path / "model.onnx")
    failed = {c.kind for c in mx.verify(tmp_path, language).comparisons if not c.passed}
    assert failed >= {"digest", "onnx"}
    assert "provenance" not in failed


def test_restored_rows_are_those_of_the_definition() -> None:
    for method, bits in (("int4-block", 4), ("int8-block", 8)):
        rows = RANDOM.standard_normal((5, 70), dtype=np.float32)
        codes, scales = (Encoding(method, part).encode(rows) for part in ("codes", "scales"))
        assert np.array_equal(restored(rows, Encoding(method, "codes")), _restored(codes, scales, bits)[:, :70])
    rows = RANDOM.standard_normal((5, 33), dtype=np.float32)
    assert np.abs(restored(rows, Encoding("int8", "codes")) - rows).max() <= 0.5001 * np.abs(rows).max() / 127


def test_command_line(vision: Path, tmp_path: Path) -> None:
    result = matexport("onnx", "-m", vision, "-o", tmp_path / "out", "--quantize", "int8", "--form", "stock")
    assert result.code == 0, result.stderr
    assert json.loads((tmp_path / "out" / "matexport.json").read_text())["quantize"] == "int8"
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    assert {node.domain for node in graph.node} == {""}
    assert mx.verify(tmp_path / "out", vision).passed
    result = matexport("onnx", "-m", vision, "-o", tmp_path / "x", "--quantize", "int4-block", "--form", "stock")
    assert (result.code, (tmp_path / "x").exists()) == (2, False)
    with pytest.raises(UsageError, match="cannot quantise 'int3'"):
        mx.export_onnx(vision, tmp_path / "x", quantize="int3")
