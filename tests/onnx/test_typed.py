"""Weights for DequantizeLinear: what they are, how far off, the same in ONNX's evaluator; and measured activations."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

import matexport as mx
from matexport import calibration
from matexport.checkpoint import open_checkpoint
from matexport.families.matmamba.oracle import load_model
from matexport.graph.encoding import BLOCKS, TYPED, Encoding, parts_of
from matexport.parity.comparison import TOLERANCES
from matexport.runtimes.ort import load_onnx
from support import language_checkpoint, matexport, vision_checkpoint

RANDOM = np.random.default_rng(5)
SCALES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Matrices whose rows are whole blocks of 64, but for none."""
    folder = tmp_path_factory.mktemp("typed")
    return {
        "language": language_checkpoint(folder / "language", d_model=128, n_layer=2),
        "vision": vision_checkpoint(folder / "vision", d_model=128, n_layer=2),
    }


def samples(kind: str, count: int = 12, seed: int = 1) -> Arrays:
    rng = np.random.default_rng(seed)
    if kind == "language":
        return {"input_ids": rng.integers(0, 101, (count, 20))}
    return {"pixel_values": rng.standard_normal((count, 3, 12, 12), dtype=np.float32)}


@pytest.fixture(scope="module")
def exported(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Language models in float16, vision in bfloat16."""
    folder = tmp_path_factory.mktemp("exported")
    for kind, dtype in (("language", "float16"), ("vision", "bfloat16")):
        for method in TYPED:
            given = samples(kind) if method == "fp8" else None
            options: dict[str, Any] = {"target": "cuda", "form": "stock", "dtype": dtype, "quantize": method}
            mx.export_onnx(sources[kind], folder / f"{kind}-{method}", calibration=given, **options)
    return folder


def restored(method: str, scale: str, rows: np.ndarray) -> np.ndarray:
    """The weights that the arrays stand for, by the definition of DequantizeLinear."""
    largest = float(np.abs(rows).max())
    parts = {part: Encoding(method, part, scale).encode(rows, largest) for part in parts_of(method)}
    codes, scales = parts["codes"], parts["scales"].astype(np.float32)
    if Encoding(method, "codes").dtype in ("I4", "F4"):  # the first of two is the lower half
        pairs = np.stack([codes & 15, codes >> 4], -1).reshape(len(rows), -1)
        if method == "nvfp4":
            codes = pairs.view(ml_dtypes.float4_e2m1fn)
            scales = scales * parts["scale"]
        else:
            codes = np.where(pairs > 7, pairs.astype(np.int8) - 16, pairs)
    each = rows.shape[1] if method not in BLOCKS else BLOCKS[method]
    return codes.astype(np.float32) * np.repeat(scales.reshape(len(rows), -1), each, axis=1)


def exact(method: str, scale: str, rows: np.ndarray) -> np.ndarray:
    """How far each weight may be off: half a step of its scale, which is rounded itself."""
    each = BLOCKS.get(method, rows.shape[1])
    blocks = rows.reshape(len(rows), -1, each)
    largest = np.abs(blocks).max(2, keepdims=True)
    unit = {"F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}[scale]
    if method == "int8-weight":
        bound = largest * (0.5 / 127 + 2 * unit) + np.zeros_like(blocks)
    elif method == "int4-weight":  # a weight of the other sign may be as large, and 7 is the highest code
        bound = largest * (1 / 8 + 2 * unit) + np.zeros_like(blocks)
    elif method == "fp8":  # half a unit of three bits of mantissa, or of the smallest step
        bound = np.abs(blocks) * (2.0**-4 + 2 * unit) + largest * 2.0**-9 / 448
    else:  # the widest step of e2m1 is 2 of 6; scales have three bits too
        bound = np.maximum(np.abs(blocks) / 4, largest / 24) + largest * 2.0**-4
    return np.asarray(bound.reshape(rows.shape))


@pytest.mark.parametrize("scale", list(SCALES))
@pytest.mark.parametrize("method", TYPED)
def test_codes_and_scales(method: str, scale: str) -> None:
    rows = RANDOM.standard_normal((40, 192), dtype=np.float32) * RANDOM.uniform(0.01, 2, (40, 1)).astype(np.float32)
    rows[3] = 0
    got = restored(method, scale, rows)
    assert (np.abs(got - rows) <= exact(method, scale, rows) + 1e-9).all()
    assert not got[3].any()
    for part in parts_of(method):
        encoding = Encoding(method, part, scale)
        array = encoding.encode(rows, float(np.abs(rows).max()))
        assert (array.dtype, array.nbytes) == (encoding.numpy, encoding.nbytes(40, 192))
    assert (np.abs(restored(method, scale, rows * 1.5) - rows) > exact(method, scale, rows)).any()  # it can fail


def test_scales_that_float16_hardly_has() -> None:
    """Codes are found for the scale as it is stored, down to numbers below the smallest normal one."""
    rows = RANDOM.standard_normal((6, 64), dtype=np.float32) * np.float32(1e-4)
    got = restored("int8-weight", "F16", rows)
    assert np.abs(got - rows).max() < 0.06 * np.abs(rows).max()


@pytest.mark.parametrize("method", TYPED)
@pytest.mark.parametrize("kind", ["language", "vision"])
def test_verified(exported: Path, sources: dict[str, Path], kind: str, method: str) -> None:
    report = mx.verify(exported / f"{kind}-{method}", sources[kind])
    assert report.passed, report.to_markdown()
    compared = [c for c in report.comparisons if c.kind == f"onnx {method}"]
    assert compared
    lost = [c for c in report.comparisons if c.kind == "loss"]
    assert lost
    assert all(c.max_rel and c.max_rel > 1e-3 and c.kl is not None for c in lost)  # and it says how far
    proven = {c.name for c in report.comparisons if c.kind == "provenance"}
    prefix = "backbone." if kind == "language" else ""
    assert proven >= {f"{prefix}layers.0.mixer.in_proj.weight.{part}" for part in parts_of(method)}


@pytest.mark.parametrize("method", TYPED)
def test_a_wrong_scale_fails(exported: Path, sources: dict[str, Path], tmp_path: Path, method: str) -> None:
    """Negative control of the bytes and of the bounds: scales of all projections, doubled."""
    shutil.copytree(exported / f"vision-{method}", tmp_path / "wrong")
    model, data = tmp_path / "wrong" / "model.onnx", tmp_path / "wrong" / "model.onnx_data"
    raw = bytearray(data.read_bytes())
    part = parts_of(method)[-1]
    kind = Encoding(method, part, "BF16").numpy
    for stored in onnx.load(model, load_external_data=False).graph.initializer:
        if stored.name.endswith(f"proj.weight.{part}") or stored.name.endswith(f"xbcdt.{part}"):
            place = {entry.key: entry.value for entry in stored.external_data}
            begin, end = int(place["offset"]), int(place["offset"]) + int(place["length"])
            values = np.frombuffer(bytes(raw[begin:end]), kind)
            raw[begin:end] = (values.astype(np.float32) * 2).astype(kind).tobytes()
    data.write_bytes(raw)
    failed = {c.kind for c in mx.verify(tmp_path / "wrong", sources["vision"]).comparisons if not c.passed}
    assert failed >= {"provenance", "digest", f"onnx {method}"}


@pytest.mark.parametrize("method", TYPED)
def test_the_reference_evaluator_agrees(sources: dict[str, Path], tmp_path: Path, method: str) -> None:
    """ONNX's own evaluator runs the file as it is; ONNX Runtime runs e2m1 and bfloat16 as we rewrite them."""
    given = samples("vision") if method == "fp8" else None
    options: dict[str, Any] = {"target": "cuda", "form": "stock", "dtype": "float16", "quantize": method}
    mx.export_onnx(sources["vision"], tmp_path / "out", calibration=given, **options)
    inputs = samples("vision", 2, seed=3)
    want = ReferenceEvaluator(onnx.load(tmp_path / "out" / "model.onnx")).run(None, inputs)[0]
    got = load_onnx(tmp_path / "out" / "model.onnx")(inputs)["logits"]
    # the evaluator sums in float16; with fp8 that rounding meets the one to three bits
    limit = 0.1 if method == "fp8" else TOLERANCES["onnx float16"]
    assert np.abs(got - want).max() <= limit * np.abs(want).max()


def test_rows_that_are_not_whole_blocks_stay(vision: Path, tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    table.write_text("name,Mamba Dims\nnarrow,12\n")  # 24 channels
    mx.export_onnx(
        vision, tmp_path / "out", slice="narrow", table=table, target="cuda", form="stock", quantize="int4-weight"
    )
    stored = {i.name for i in onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph.initializer}
    assert {"layers.0.mixer.in_proj.weight.codes", "layers.0.mixer.out_proj.weight"} <= stored
    assert mx.verify(tmp_path / "out", vision).passed


# --------------------------------------------------------------------------------------- calibration
@pytest.mark.parametrize("kind", ["language", "vision"])
def test_ranges_are_those_of_pytorch(sources: dict[str, Path], kind: str) -> None:
    """What reaches each projection of our module, seen by hooks, on more inputs than run at once."""
    planned, given = mx.plan(sources[kind]), samples(kind)
    got = calibration.measure_ranges(planned.checkpoint, planned.plan, planned.family, given)
    model, want = load_model(open_checkpoint(sources[kind])), {}
    hooked = {n: m for n, m in model.named_modules() if n.endswith(("in_proj", "out_proj"))}
    for name, module in hooked.items():
        module.register_forward_pre_hook(lambda _, x, name=name: want.update({name: x[0].detach()}))
    with torch.no_grad():
        model(*(torch.from_numpy(array) for array in given.values()))
    last = max(hooked)  # of the class token alone, where that is all that is used
    for name, x in want.items():
        found = got.get(f"{name}.weight", got.get(f"{name}.weight.xbcdt"))
        assert found is not None
        taken = x[:, -1] if kind == "vision" and name == last else x
        assert found == pytest.approx(float(taken.abs().max()), rel=1e-4), name


def test_ranges_matter(sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: scales that are too small cut what products take."""
    measure = calibration.measure_ranges
    small = lambda *arguments: {name: value / 30 for name, value in measure(*arguments).items()}  # noqa: E731
    monkeypatch.setattr(calibration, "measure_ranges", small)
    options: dict[str, Any] = {"target": "cuda", "form": "stock", "quantize": "fp8"}
    mx.export_onnx(sources["vision"], tmp_path / "out", calibration=samples("vision"), **options)
    failed = {c.kind for c in mx.verify(tmp_path / "out", sources["vision"]).comparisons if not c.passed}
    assert failed == {"onnx fp8"}


@pytest.mark.parametrize(
    ("arrays", "code", "message"),
    [
        ({"images": np.zeros((2, 3, 12, 12))}, 4, "input 'pixel_values' is missing"),
        ({"pixel_values": np.zeros((2, 3, 8, 8))}, 4, "has shape (2, 3, 8, 8)"),
        ({"pixel_values": np.full((2, 3, 12, 12), np.nan)}, 4, "not finite"),
        (None, 4, "is not an .npz file"),
    ],
)
def test_hostile_calibration(
    sources: dict[str, Path], tmp_path: Path, arrays: Arrays | None, code: int, message: str
) -> None:
    path = tmp_path / "inputs.npz"
    if arrays is None:
        path.write_text("no")
    else:
        np.savez(path, **arrays)
    options = ["--target", "cuda", "--form", "stock", "--quantize", "fp8", "--calibration", path]
    result = matexport("onnx", "-m", sources["vision"], "-o", tmp_path / "out", *options)
    assert (result.code, (tmp_path / "out").exists()) == (code, False), result
    assert message in result.stderr


def test_usage(vision: Path, tmp_path: Path) -> None:
    for options, message in (
        (["--quantize", "int8-weight"], "for target 'cpu'"),
        (["--target", "cuda", "--form", "stock", "--quantize", "int4-block"], "one of int8, int8-weight"),
        (["--target", "cuda", "--quantize", "fp8"], "give inputs: --calibration"),
    ):
        result = matexport("onnx", "-m", vision, "-o", tmp_path / "out", *options)
        assert (result.code, (tmp_path / "out").exists()) == (2, False), result
        assert message in result.stderr


def test_manifests_without_ranges_are_not_read(exported: Path, sources: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(exported / "vision-fp8", tmp_path / "bad")
    path = tmp_path / "bad" / "matexport.json"
    manifest = json.loads(path.read_text())
    del manifest["ranges"]
    path.write_text(json.dumps(manifest))
    result = matexport("verify", "-m", tmp_path / "bad", "--source", sources["vision"])
    assert result.code in (3, 4), result
