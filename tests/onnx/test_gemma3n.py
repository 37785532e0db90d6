"""Gemma 3n in ONNX: transformers' function in float64 exactly, in fp32 as well as transformers itself."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from transformers import Gemma3nForCausalLM

import matexport as mx
from gemma import multimodal_checkpoint, text_checkpoint
from matexport.dims import Dims
from matexport.families.gemma3n import attention as gemma_attention
from matexport.families.gemma3n import graph as gemma_graph
from matexport.families.gemma3n.config import TextConfig
from matexport.parity.comparison import TOLERANCES
from matexport.slice_table import Row
from matexport.streaming import read
from support import matexport

ROWS = {
    "widths": Row("widths", ffn=Dims(head=(64, 32, 16, 64, 8, 64, 32, 64, 16, 64))),
    "skips": Row("skips", skipped=(1, 7)),
    "mixed": Row("mixed", skipped=(3, 8), ffn=Dims(fill=32)),
}
LENGTH = 11  # nearly three windows


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma")
    text_checkpoint(folder / "source")
    for name, row in ROWS.items():
        planned = mx.plan(folder / "source", row)
        planned.write(folder / f"slice-{name}")
        mx.export_onnx(planned, folder / name)
    return folder


class Session:
    """An ONNX model and its cache, as an application holds them."""

    def __init__(self, model: Path, batch: int):
        self.session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        self.past = {
            i.name: np.zeros([batch, *(n if isinstance(n, int) else 0 for n in i.shape[1:])], np.float32)
            for i in self.session.get_inputs()
            if i.name.startswith("past")
        }
        self.mask = np.zeros((batch, 0), np.int64)

    def run(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        self.mask = np.concatenate([self.mask, np.ones_like(ids) if mask is None else mask], 1)
        positions = np.maximum(self.mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        names = [output.name for output in self.session.get_outputs()]
        feed = {"input_ids": ids, "attention_mask": self.mask, "position_ids": positions, **self.past}
        out = dict(zip(names, self.session.run(names, feed), strict=True))
        self.past = {name: out[name.replace("past_key_values", "present", 1)] for name in self.past}
        return out["logits"]


def ids(batch: int, length: int = LENGTH, seed: int = 0) -> np.ndarray:
    """Some of them above the per-layer table."""
    return np.random.default_rng(seed).integers(0, 97, (batch, length))


def model_of(folder: Path, dtype: torch.dtype) -> Any:
    return Gemma3nForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


@torch.no_grad()
def truth(folder: Path, tokens: np.ndarray, dtype: torch.dtype = torch.float64) -> np.ndarray:
    found: np.ndarray = model_of(folder, dtype)(input_ids=torch.from_numpy(tokens), use_cache=False).logits.numpy()
    return found


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


def in_float64(source: Path, row: Row, tokens: np.ndarray) -> np.ndarray:
    """Logits of the graph in float64, by ONNX's reference evaluator."""
    planned = mx.plan(source, row)
    graph = gemma_graph.decoder_graph(planned.plan.cast("F64"), dtype="F64")
    for name, weight in graph.weights.items():
        array = read(planned.checkpoint, weight.tensor.view).astype(np.float64)
        weight.value.const_value = ir.tensor(array, name=name)
    model = ir.to_proto(graph.to_model(producer_version="test", metadata={}))
    feed = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    feed["position_ids"] = np.tile(np.arange(tokens.shape[1]), (len(tokens), 1))
    for i in graph.inputs[3:]:
        feed[str(i.name)] = np.zeros([len(tokens), *(n if isinstance(n, int) else 0 for n in list(i.shape)[1:])])
    return np.asarray(ReferenceEvaluator(model).run(["logits"], feed)[0])


@pytest.mark.parametrize("name", ROWS)
def test_the_function_is_transformers(gemma: Path, name: str) -> None:
    tokens = ids(2)
    got, want = in_float64(gemma / "source", ROWS[name], tokens), truth(gemma / f"slice-{name}", tokens)
    assert error(got, want) < 5e-5  # transformers computes norms and angles in float32 whatever the model is


@pytest.mark.parametrize("what", ["donor", "base", "sparsity", "window"])
def test_another_function_is_told_apart(gemma: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative controls: each of these mistakes is far outside of the bound above."""
    if what == "donor":
        original = TextConfig.donors
        monkeypatch.setattr(
            "matexport.families.gemma3n.config.TextConfig.donors",
            lambda self: {i: donor - 3 for i, donor in original(self).items()},
        )
    elif what == "base":
        swapped = dict(zip(gemma_attention.BASES, reversed(list(gemma_attention.BASES.values())), strict=True))
        monkeypatch.setattr(gemma_attention, "BASES", swapped)
    elif what == "window":
        monkeypatch.setattr(gemma_attention, "SLIDING", "none")
    else:
        monkeypatch.setattr(gemma_graph.NormalDist, "inv_cdf", lambda self, share: 1.0)
    tokens = ids(2)
    got = in_float64(gemma / "source", ROWS["widths"], tokens)
    assert error(got, truth(gemma / "slice-widths", tokens)) > 1e-3


@pytest.mark.parametrize("name", ROWS)
def test_fp32_is_as_good_as_transformers(gemma: Path, name: str) -> None:
    """A prompt and 64 cached steps against float64: not worse than transformers in fp32, but for a small factor."""
    tokens = ids(2, LENGTH + 64)
    session = Session(gemma / name / "model.onnx", 2)
    pieces = [session.run(tokens[:, :LENGTH])] + [session.run(tokens[:, t : t + 1]) for t in range(LENGTH, LENGTH + 64)]
    want = truth(gemma / f"slice-{name}", tokens)
    theirs = error(truth(gemma / f"slice-{name}", tokens, torch.float32), want)
    assert error(np.concatenate(pieces, 1), want) < max(1e-4, 4 * theirs)
    assert np.array_equal(np.concatenate(pieces, 1).argmax(-1), want.argmax(-1))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_themselves(gemma: Path, side: str) -> None:
    """Each row of a padded batch, prompt and then steps, as if it ran alone."""
    lengths, longest, steps = (4, 9, 7), 9, 6
    tokens = ids(3, longest + steps)
    padded, mask = np.zeros((3, longest), np.int64), np.zeros((3, longest), np.int64)
    for row, length in enumerate(lengths):
        place = slice(longest - length, longest) if side == "left" else slice(0, length)
        padded[row, place], mask[row, place] = tokens[row, :length], 1
    batch = Session(gemma / "mixed" / "model.onnx", 3)
    first = batch.run(padded, mask)
    rest = [batch.run(tokens[:, longest + t : longest + t + 1]) for t in range(steps)]
    for row, length in enumerate(lengths):
        alone = Session(gemma / "mixed" / "model.onnx", 1)
        own = alone.run(tokens[row : row + 1, :length])[0]
        assert error(first[row][mask[row] == 1], own) < 1e-4
        if side == "left":  # on the right, padding lies between the prompt and the window of a step
            for t in range(steps):
                again = alone.run(tokens[row : row + 1, longest + t : longest + t + 1])[0]
                assert error(rest[t][row], again) < 1e-4


def test_verified(gemma: Path, tmp_path: Path) -> None:
    for name in ROWS:
        report = mx.verify(gemma / name, gemma / "source")
        assert report.passed, report.to_markdown()
        assert {c.kind for c in report.comparisons} >= {"onnx gemma3n", "decode gemma3n", "provenance"}
    data = gemma / "mixed" / "model.onnx_data"
    for path in data.parent.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    wrong = np.frombuffer(data.read_bytes(), np.float32).copy()
    wrong[len(wrong) // 2 :] *= np.float32(1.01)
    (tmp_path / data.name).write_bytes(wrong.tobytes())
    failed = {c.kind for c in mx.verify(tmp_path, gemma / "source").comparisons if not c.passed}
    assert failed >= {"provenance", "onnx gemma3n"}
    assert TOLERANCES["onnx gemma3n"] <= 1e-3


@pytest.mark.parametrize(
    ("form", "opset", "most"), [("stock", 21, 160), ("stock", 23, 90), ("contrib", 21, 90), ("contrib", 23, 90)]
)
def test_small_and_readable(gemma: Path, tmp_path: Path, form: str, opset: int, most: int) -> None:
    """Nodes of each layer as written, before ONNX Runtime fuses any."""
    for name in ROWS:
        file = tmp_path / f"{name}.onnx"
        mx.export_onnx(mx.plan(gemma / "source", ROWS[name]), file, form=form, opset=opset)
        model = onnx.load(file, load_external_data=False)
        counts = Counter(node.name.split("/")[2] for node in model.graph.node if node.name.startswith("/model/layers."))
        assert max(counts.values()) <= most
        if (form, opset) != (
            "contrib",
            21,
        ):  # ONNX Runtime's norms are in ai.onnx's domain, where the checker misses them
            onnx.checker.check_model(file, full_check=True)
            assert {node.domain for node in model.graph.node} == {""}
        assert {v.domain: v.version for v in model.opset_import}[""] == opset
        names = {node.name for node in model.graph.node}
        assert "/model/layers.7/mlp/down_proj/Gemm" in names
        kept = 10 - len(ROWS[name].skipped)
        own = {i.name for i in model.graph.input if i.name.startswith("past")}
        shared = 4 - sum(i >= 6 for i in ROWS[name].skipped)
        assert own == {f"past_key_values.{i}.{kind}" for i in range(kept - shared) for kind in ("key", "value")}


def test_of_multimodal_bf16(tmp_path: Path) -> None:
    """The text decoder of a released layout; the table stays in bf16 with --dtype, and is never cast as a whole."""
    source = multimodal_checkpoint(tmp_path / "source")
    for dtype in ("float32", "bfloat16"):
        result = matexport("onnx", "-m", source, "-o", tmp_path / dtype, "--dtype", dtype)
        assert result.code == 0, result.stderr
        report = mx.verify(tmp_path / dtype, source)
        assert report.passed, report.to_markdown()
    model = onnx.load(tmp_path / "bfloat16" / "model.onnx", load_external_data=False)
    table = next(i.name for i in model.graph.initializer if "per_layer.weight" in i.name)
    assert [node.op_type for node in model.graph.node if table in node.input] == ["Gather"]
