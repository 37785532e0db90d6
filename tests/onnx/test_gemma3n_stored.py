"""Gemma 3n's weights in ONNX: one file for rows of any widths and layers, and in fewer bits."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import matexport as mx
from gemma import text_checkpoint, text_config, write_gemma
from matexport.dims import Dims
from matexport.onnx.export import slug
from matexport.runtimes.ort import load_onnx
from matexport.slice_table import Row
from support import matexport

TABLE, PROJECTION = "model.embed_tokens_per_layer.weight", "model.per_layer_model_projection.weight"
ROWS = [
    Row("full"),
    Row("narrow", ffn=Dims(head=(64, 32, 16, 64, 8, 64, 32, 64, 16, 64))),
    Row("mixed", skipped=(0, 3, 8), ffn=Dims(fill=24)),
]


def places(model: Path) -> dict[str, dict[str, int]]:
    """Offset and length of every weight."""
    found = onnx.load(model, load_external_data=False).graph.initializer
    return {
        i.name: {e.key: int(e.value) for e in i.external_data if e.key != "location"} for i in found if i.external_data
    }


# -------------------------------------------------------------------------------------------- bundle
@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_checkpoint(tmp_path_factory.mktemp("gemma") / "source")


@pytest.fixture(scope="module")
def bundle(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "out"
    mx.export_bundle([mx.plan(source, row) for row in ROWS], folder)
    return folder


def test_one_file_is_as_large_as_the_widest_row(source: Path, bundle: Path, tmp_path: Path) -> None:
    mx.export_onnx(mx.plan(source, ROWS[0]), tmp_path / "own")
    own, shared = (folder / "model.onnx_data" for folder in (tmp_path / "own", bundle))
    assert shared.stat().st_size == own.stat().st_size
    full = places(bundle / "full.onnx")
    for row in ROWS[1:]:
        found = places(bundle / f"{slug(row.name)}.onnx")
        for name in (TABLE, PROJECTION):  # of all layers, whichever a row keeps
            assert found[name] == full[name]
    kept = [i for i in range(10) if i not in ROWS[2].skipped]
    mixed = places(bundle / "mixed.onnx")
    for new, old in enumerate(kept):
        for part in ("gate_proj", "down_proj"):
            narrow, wide = mixed[f"model.layers.{new}.mlp.{part}.weight"], full[f"model.layers.{old}.mlp.{part}.weight"]
            assert narrow["offset"] == wide["offset"]
            assert narrow["length"] == wide["length"] * 24 // 64


def test_rows_equal_their_own_export(source: Path, bundle: Path, tmp_path: Path) -> None:
    found = []
    for row in ROWS:
        planned = mx.plan(source, row)
        mx.export_onnx(planned, tmp_path / "own", force=True)
        inputs = planned.family.sample_inputs(planned.checkpoint.config, 2, seed=5)
        want, got = (
            load_onnx(path)(inputs)["logits"]
            for path in (tmp_path / "own/model.onnx", bundle / f"{slug(row.name)}.onnx")
        )
        assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()
        found.append(got)
    assert all(np.abs(a - b).max() > 0.1 for a, b in itertools.pairwise(found))  # rows differ


def test_rows_are_verified(source: Path, bundle: Path) -> None:
    report = mx.verify(bundle, source)
    assert report.passed, report.to_markdown()
    assert len({c.name.partition(":")[0] for c in report.comparisons if c.kind == "onnx gemma3n"}) == len(ROWS)


def test_layers_of_another_row_fail(source: Path, bundle: Path, tmp_path: Path) -> None:
    """Negative control: parts of the per-layer table that belong to other layers."""
    for path in bundle.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    model = onnx.load(tmp_path / "mixed.onnx", load_external_data=False)
    parts = next(node for node in model.graph.node if node.op_type == "Split" and len(node.output) == 10).output
    first, second = (node.input for node in model.graph.node if {parts[1], parts[2]} & {*node.input})
    first[1], second[1] = second[1], first[1]
    onnx.save(model, tmp_path / "mixed.onnx")
    failed = {c.kind for c in mx.verify(tmp_path / "mixed.onnx", source).comparisons if not c.passed}
    assert "onnx gemma3n" in failed


CHILD = """
import sys
import onnxruntime

def anonymous():
    line = next(x for x in open("/proc/self/status") if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

def opened(name):
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_prepacking", sys.argv[2])
    return onnxruntime.InferenceSession(f"{sys.argv[1]}/{name}.onnx", options, providers=["CPUExecutionProvider"])

first, before = opened("full"), anonymous()
second = opened("half")
print(anonymous() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_second_row_takes_next_to_no_memory(tmp_path: Path) -> None:
    config = text_config("sfsf", shared=2, width=16384, hidden_size=256, hidden_size_per_layer_input=32)
    source = write_gemma(tmp_path / "source", {"architectures": ["Gemma3nForCausalLM"], **config})
    rows = [Row("full"), Row("half", skipped=(3,), ffn=Dims(fill=8192))]
    mx.export_bundle([mx.plan(source, row) for row in rows], tmp_path / "out")
    added = {}
    for prepacking in ("1", "0"):
        command = [sys.executable, "-c", CHILD, str(tmp_path / "out"), prepacking]
        added[prepacking] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    weights = sum(place["length"] for place in places(tmp_path / "out" / "half.onnx").values())
    assert weights > 70e6
    assert added["1"] < 0.2 * weights
    assert added["0"] > 0.5 * weights  # what it is with copies of its own


# ------------------------------------------------------------------------------------------- quantised
@pytest.mark.parametrize("method", ["int8-block", "int4-block"])
@pytest.mark.parametrize("row", [ROWS[0], ROWS[2]], ids=lambda row: row.name)
def test_quantised(tmp_path: Path, method: str, row: Row) -> None:
    """Random weights lose much, and the report says how much; that what is stored is computed with is proven apart."""
    config = {"architectures": ["Gemma3nForCausalLM"], **text_config(hidden_size_per_layer_input=32)}
    source = write_gemma(tmp_path / "source", config)
    planned = mx.plan(source, row)
    mx.export_onnx(planned, tmp_path / "out", quantize=method)
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    gathered = {node.input[0] for node in graph.node if "Gather" in node.op_type}
    assert {f"{TABLE}.codes", "model.embed_tokens.weight.codes"} <= gathered
    report = mx.verify(tmp_path / "out", source)
    assert report.passed, report.to_markdown()
    kinds = {c.kind for c in report.comparisons}
    assert kinds == {"provenance", "digest", "onnx gemma3n", "decode gemma3n", f"onnx {method}", "loss"}
    for c in report.comparisons:
        if c.kind == "loss":
            assert c.kl is not None
            assert c.kl > (1e-2 if method == "int4-block" else 1e-4)
            assert c.top1 is not None
            assert c.top1 < 1
    sizes = report.to_json()["weights"]
    stored = (tmp_path / "out" / "model.onnx_data").stat().st_size
    assert sizes["bytes"] == pytest.approx(stored, rel=0.2)
    assert sizes["bytes"] < (0.45 if method == "int8-block" else 0.35) * sizes["float32_bytes"]


def test_quantised_for_cuda(tmp_path: Path) -> None:
    """Attention in float16 between products with quantised weights."""
    config = {"architectures": ["Gemma3nForCausalLM"], **text_config("sfs", shared=1, hidden_size_per_layer_input=32)}
    source = write_gemma(tmp_path / "source", config)
    mx.export_onnx(mx.plan(source), tmp_path / "out", target="cuda", quantize="int4-block")
    report = mx.verify(tmp_path / "out", source)
    assert report.passed, report.to_markdown()
    assert {"onnx float16", "onnx int4-block", "loss"} <= {c.kind for c in report.comparisons}


def test_a_wrong_code_fails(tmp_path: Path) -> None:
    """Negative control: the lowest bit of each scale's exponent in one matrix."""
    config = {"architectures": ["Gemma3nForCausalLM"], **text_config("sfssf", shared=2, hidden_size_per_layer_input=32)}
    source = write_gemma(tmp_path / "source", config)
    mx.export_onnx(mx.plan(source), tmp_path / "out", quantize="int4-block")
    place = places(tmp_path / "out" / "model.onnx")["model.layers.1.mlp.down_proj.weight.scales"]
    data = tmp_path / "out" / "model.onnx_data"
    raw = np.frombuffer(data.read_bytes(), np.uint8).copy()
    part = raw[place["offset"] : place["offset"] + place["length"]].view(np.float32)
    part *= np.float32(1.5)
    data.write_bytes(raw.tobytes())
    result = matexport("verify", "-m", tmp_path / "out", "--source", source, "--format", "json")
    assert result.code == 3
    failed = {c["kind"] for c in json.loads(result.stdout)["comparisons"] if not c["passed"]}
    assert failed >= {"digest", "provenance", "onnx gemma3n"}
