"""Gemma 3n in one graph or in two; tables that stay as they are stored, of more than 2^31 elements too."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest

import matexport as mx
from gemma import multimodal_checkpoint, tensors, text_checkpoint, text_config, write_hollow
from matexport.checkpoint import Checkpoint
from matexport.graph.builder import Weight
from matexport.graph.options import GraphOptions
from matexport.manifest import read_manifest
from matexport.onnx import export
from matexport.onnx.weights import lay_out, stored_blocks
from matexport.slice_table import Row
from support import matexport

EMBED, DECODER = "embed_tokens", "decoder_model_merged"
TABLE = "model.embed_tokens_per_layer.weight"


def io(file: Path) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """Inputs and outputs of a model with their shapes."""
    graph = onnx.load(file, load_external_data=False).graph
    return tuple(  # type: ignore[return-value]
        {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
        for values in (graph.input, graph.output)
    )


def test_two_graphs(tmp_path: Path) -> None:
    """Each with weights of its own: the tables in one, the rest, with the tied head, in the other."""
    source = text_checkpoint(tmp_path / "source")
    result = matexport("onnx", "-m", source, "-o", tmp_path / "out", "--split-embeddings")
    assert result.code == 0, result.stderr
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "matexport.json"} | {
        f"{name}.onnx{part}" for name in (EMBED, DECODER) for part in ("", "_data")
    }
    tokens = ["batch", "sequence"]
    embeddings = {"inputs_embeds": [*tokens, 64], "per_layer_inputs": [*tokens, 10, 8]}
    assert io(tmp_path / "out" / f"{EMBED}.onnx") == ({"input_ids": tokens}, embeddings)
    inputs, outputs = io(tmp_path / "out" / f"{DECODER}.onnx")
    caches = [f"{i}.{kind}" for i in range(6) for kind in ("key", "value")]
    past = [f"past_key_values.{name}" for name in caches]
    assert list(inputs) == [*embeddings, "attention_mask", "position_ids", *past]
    assert {name: inputs[name] for name in embeddings} == embeddings
    assert list(outputs) == ["logits", *(f"present.{name}" for name in caches)]
    manifest = read_manifest(tmp_path / "out")
    assert set(manifest["graphs"]) == {f"{EMBED}.onnx", f"{DECODER}.onnx"}
    for file, weights in manifest["graphs"].items():
        stored = onnx.load(tmp_path / "out" / file, load_external_data=False).graph.initializer
        assert sorted(i.name for i in stored if i.external_data) == sorted(weights)
        assert {e.value for i in stored for e in i.external_data if e.key == "location"} == {f"{file}_data"}
        assert (TABLE in weights) == (file == f"{EMBED}.onnx")
        assert "model.embed_tokens.weight" in weights
    assert set(manifest["weights"]) == {name for weights in manifest["graphs"].values() for name in weights}
    assert matexport("verify", "-m", tmp_path / "out", "--source", source).code == 0
    (tmp_path / "out" / f"{EMBED}.onnx_data").unlink()
    assert matexport("verify", "-m", tmp_path / "out", "--source", source).code == 3


@pytest.mark.parametrize(
    "options",
    [["-o", "x.onnx"], ["--in-place"], ["-o", "x", "-s", "#1", "-s", "#2"], ["-o", "x", "--opset", "22"]],
    ids=["one file", "in place", "bundle", "opset"],
)
def test_what_two_graphs_cannot_be(tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = text_checkpoint(tmp_path / "source")
    (source / "slices.csv").write_text("name\na\nb\n")
    result = matexport("onnx", "-m", source, *options, "--split-embeddings")
    assert (result.code, sorted(p.name for p in tmp_path.iterdir())) == (2, ["source"]), result.stderr


def test_other_families_have_one_graph(language: Path, tmp_path: Path) -> None:
    for option, what in (("--split-embeddings", "no embeddings to split off"), ("--opset=22", "opset 22")):
        result = matexport("onnx", "-m", language, "-o", tmp_path / "out", option)
        assert result.code == 2
        assert what in result.stderr


@pytest.mark.parametrize(("dtype", "split"), [("float32", False), ("bfloat16", False), ("bfloat16", True)])
def test_of_multimodal_bf16(tmp_path: Path, dtype: str, split: bool) -> None:
    """The text decoder of a released layout; the table stays in bf16 with --dtype, and is never cast as a whole."""
    source = multimodal_checkpoint(tmp_path / "source")
    how = ["--split-embeddings"] if split else []
    result = matexport("onnx", "-m", source, "-o", tmp_path / "out", "--dtype", dtype, *how)
    assert result.code == 0, result.stderr
    report = mx.verify(tmp_path / "out", source)
    assert report.passed, report.to_markdown()
    model = onnx.load(tmp_path / "out" / f"{EMBED if split else 'model'}.onnx", load_external_data=False)
    table = next(i.name for i in model.graph.initializer if "per_layer.weight" in i.name)
    assert [node.op_type for node in model.graph.node if table in node.input] == ["Gather"]


# ------------------------------------------------------------------------------ more than 2^31 elements
ROWS, WIDTH = 1 << 18, 4128  # per-layer rows, and their width: two layers of three are 2.16e9 elements, 8.7 GB in fp32
LAST = np.array([[0, ROWS - 2, ROWS - 1]])
SLICE = Row("two of three", skipped=(1,))
# in a process of its own, whose memory is measured: the embeddings of some tokens, and what follows
CHILD = """
import sys
from pathlib import Path
import numpy as np, onnxruntime
known = dict(np.load(sys.argv[1]))
for file in sys.argv[3:]:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    past = {i.name: np.zeros([1, *(n if isinstance(n, int) else 0 for n in i.shape[1:])], np.float32)
            for i in session.get_inputs() if i.name.startswith("past")}
    known |= past
    known |= zip(names, session.run(names, {i.name: known[i.name] for i in session.get_inputs()}))
np.savez(sys.argv[2], **{name: known[name] for name in ("logits", "per_layer_inputs") if name in known})
status = Path("/proc/self/status").read_text()
print(next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) // 1024)
"""


@pytest.fixture(scope="module")
def hollow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bf16 whose tables are holes but for their first and last rows; all the rest is random."""
    sizes = {"hidden_size": 8, "head_dim": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    vocabulary = {"vocab_size": ROWS, "vocab_size_per_layer_input": ROWS, "hidden_size_per_layer_input": WIDTH}
    config = {"architectures": ["Gemma3nForCausalLM"], **text_config("sfs", shared=0, width=16, **sizes, **vocabulary)}
    folder = write_hollow(tmp_path_factory.mktemp("hollow"), config, shards=1)
    small = tensors({**config, "vocab_size": 3, "vocab_size_per_layer_input": 3}, dtype=ml_dtypes.bfloat16)
    for name, tensor in mx.plan(folder).checkpoint.tensors.items():
        with tensor.file.open("r+b") as f:
            row = small[name].nbytes // len(small[name])
            if "embed_tokens" not in name:
                f.seek(tensor.start)
                f.write(small[name].tobytes())
            else:
                for k, i in enumerate(LAST[0].tolist()):
                    f.seek(tensor.start + i * row)
                    f.write(small[name][k].tobytes())
    return folder


def rows_of(checkpoint: Checkpoint) -> np.ndarray:
    """The kept layers' parts of the rows `LAST` of the per-layer table: (3, 2 * WIDTH)."""
    tensor = checkpoint.tensors[TABLE]
    table = np.memmap(tensor.file, ml_dtypes.bfloat16, "r", tensor.start, (ROWS, 3, WIDTH))
    return np.asarray(table[LAST[0]][:, [0, 2]], np.float32).reshape(3, -1)


def store(planned: mx.PlannedSlice, folder: Path, *, split: bool, quantize: str | None) -> list[Path]:
    """Writes what an export writes, but for the zeros of its tables: those are holes."""
    build = planned.family.build_split if split else planned.family.build_graph
    graphs: Any = build(planned.plan, GraphOptions("contrib", quantize=quantize))
    files = []
    for name, graph in graphs.items() if split else [("model", graphs)]:
        layout, data = lay_out([graph]), folder / f"{name}.onnx_data"
        with data.open("wb") as f:
            f.truncate(layout.size)
            for weight, offset in layout.stored:
                for part, start in _parts(weight):
                    f.seek(offset + start)
                    for block in stored_blocks(planned.checkpoint, part):
                        f.write(block.view(np.uint8))
        places = export._places(layout.offsets[0], data.name)
        files.append(folder / f"{name}.onnx")
        files[-1].write_bytes(export._model(graph, planned.plan, places, folder))
    return files


def _parts(weight: Weight) -> Iterator[tuple[Weight, int]]:
    """A weight and 0; of one with as many rows as a table those that are no zeros, and where each of them starts."""
    shape, view = weight.tensor.shape, weight.tensor.view
    if shape[0] != ROWS:
        yield weight, 0
        return
    for i in LAST[0].tolist():
        row = replace(replace(view, shape=view.taken).restrict(0, (i, i + 1)), shape=(1, *shape[1:]))
        part = replace(weight, tensor=replace(weight.tensor, view=row))
        yield part, i * part.nbytes


def run(folder: Path, files: list[Path]) -> tuple[dict[str, np.ndarray], int]:
    """What models one after the other give for the tokens `LAST`, and the memory that this took, in MiB."""
    feed = {"input_ids": LAST, "attention_mask": np.ones_like(LAST), "position_ids": np.arange(3)[None]}
    np.savez(folder / "feed.npz", **feed)
    paths = map(str, (folder / "feed.npz", folder / "found.npz", *files))
    done = subprocess.run([sys.executable, "-c", CHILD, *paths], capture_output=True, text=True, check=True)
    return dict(np.load(folder / "found.npz")), int(done.stdout)


@pytest.mark.parametrize("quantize", [None, "int8-block"])
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_tables_of_more_than_2_31_elements(hollow: Path, tmp_path: Path, quantize: str | None) -> None:
    """Rows at the far end of the table are read right, from a file that is mapped: the table is never in memory."""
    planned = mx.plan(hollow, SLICE)
    assert math.prod(planned.plan.tensors[TABLE].shape) > 2**31
    two, one = (store(planned, tmp_path, split=split, quantize=quantize) for split in (True, False))
    assert all((tmp_path / f"{name}.onnx_data").stat().st_size > 2**31 for name in (EMBED, "model"))
    found, memory = run(tmp_path, two)
    got, want = found["per_layer_inputs"].reshape(3, -1), rows_of(planned.checkpoint) * np.float32(np.sqrt(WIDTH))
    assert (np.abs(want).max(1) > 1).all()
    assert np.abs(got - want).max() <= (0.01 if quantize else 1e-6) * np.abs(want).max()
    again, same = run(tmp_path, one)
    assert np.abs(again["logits"] - found["logits"]).max() <= 1e-6 * np.abs(found["logits"]).max()
    assert len(set(found["logits"][0].argmax(-1).tolist())) > 1
    assert max(memory, same) < 1024


def test_a_table_in_place(hollow: Path, tmp_path: Path) -> None:
    """Nothing of a table of 3.2e9 elements is copied: the model uses the checkpoint's own bytes."""
    before = {path.name for path in hollow.iterdir()}
    model = mx.export_in_place(hollow)
    assert {path.name for path in hollow.iterdir()} == before | {"model.onnx", "model.onnx.json"}
    found, memory = run(tmp_path, [model])
    assert np.isfinite(found["logits"]).all()
    assert len(set(found["logits"][0].argmax(-1).tolist())) > 1
    assert memory < 1024
