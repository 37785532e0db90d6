"""Gemma 3n in ONNX is the function of transformers: in every form, with a cache, padded, in one graph and in two."""

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
from gemma import text_checkpoint
from matexport.dims import Dims
from matexport.families.gemma3n import attention as gemma_attention
from matexport.families.gemma3n import graph as gemma_graph
from matexport.families.gemma3n.config import TextConfig
from matexport.graph.options import GraphOptions
from matexport.parity.comparison import TOLERANCES
from matexport.slice_table import Row
from matexport.streaming import read

ROWS = {
    "widths": Row("widths", ffn=Dims(head=(64, 32, 16, 64, 8, 64, 32, 64, 16, 64))),
    "skips": Row("skips", skipped=(1, 7)),
    "mixed": Row("mixed", skipped=(3, 8), ffn=Dims(fill=32)),
}
# how a graph can be written -> options, and the most nodes of a layer
WAYS: dict[str, tuple[dict[str, Any], int]] = {
    "stock": ({"form": "stock"}, 137),
    "contrib": ({"form": "contrib"}, 75),
    "opset 23": ({"form": "stock", "opset": 23}, 69),
    "split": ({"form": "contrib", "split_embeddings": True}, 75),
}
LENGTH, STEPS = 11, 64  # nearly three windows, and steps after them
SPLIT = ("embed_tokens.onnx", "decoder_model_merged.onnx")


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma")
    text_checkpoint(folder / "source")
    for name, row in ROWS.items():
        planned = mx.plan(folder / "source", row)
        planned.write(folder / f"slice-{name}")
        for way, (options, _) in WAYS.items():
            mx.export_onnx(planned, folder / f"{name} {way}", **options)
    return folder


class Session:
    """A model in one or two graphs and its cache, as an application holds them."""

    def __init__(self, folder: Path, batch: int):
        files = [folder / name for name in SPLIT] if (folder / SPLIT[0]).is_file() else [folder / "model.onnx"]
        self.sessions = [onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]) for file in files]
        self.past = {
            i.name: np.zeros([batch, *(n if isinstance(n, int) else 0 for n in i.shape[1:])], np.float32)
            for i in self.sessions[-1].get_inputs()
            if i.name.startswith("past")
        }
        self.mask = np.zeros((batch, 0), np.int64)

    def run(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        self.mask = np.concatenate([self.mask, np.ones_like(ids) if mask is None else mask], 1)
        positions = np.maximum(self.mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        known = {"input_ids": ids, "attention_mask": self.mask, "position_ids": positions, **self.past}
        for session in self.sessions:
            names = [output.name for output in session.get_outputs()]
            known |= zip(names, session.run(names, {i.name: known[i.name] for i in session.get_inputs()}), strict=True)
        self.past = {name: known[name.replace("past_key_values", "present", 1)] for name in self.past}
        return np.asarray(known["logits"])


def ids(batch: int, length: int = LENGTH, seed: int = 0) -> np.ndarray:
    """Some of them above the per-layer table."""
    return np.random.default_rng(seed).integers(0, 97, (batch, length))


@torch.no_grad()
def truth(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """transformers in float64, all at once; its norms, angles and softmax are float32 throughout."""
    model: Any = Gemma3nForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    return np.asarray(model.eval()(input_ids=torch.from_numpy(tokens), use_cache=False).logits.numpy())


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


def in_float64(source: Path, row: Row, tokens: np.ndarray, **options: Any) -> np.ndarray:
    """Logits of the graph in float64, by ONNX's reference evaluator."""
    planned = mx.plan(source, row)
    graph = gemma_graph.decoder_graph(planned.plan.cast("F64"), GraphOptions(dtype="F64", **options))
    for name, weight in graph.weights.items():
        array = read(planned.checkpoint, weight.tensor.view).astype(np.float64)
        weight.value.const_value = ir.tensor(array, name=name)
    model = ir.to_proto(graph.to_model(producer_version="test", metadata={}))
    feed = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    feed["position_ids"] = np.tile(np.arange(tokens.shape[1]), (len(tokens), 1))
    for i in graph.inputs[3:]:
        feed[str(i.name)] = np.zeros([len(tokens), *(n if isinstance(n, int) else 0 for n in list(i.shape)[1:])])
    return np.asarray(ReferenceEvaluator(model).run(["logits"], feed)[0])


@pytest.mark.parametrize("opset", [21, 23])
@pytest.mark.parametrize("name", ROWS)
def test_the_function_is_transformers(gemma: Path, name: str, opset: int) -> None:
    tokens = ids(2)
    got = in_float64(gemma / "source", ROWS[name], tokens, opset=opset)
    assert error(got, truth(gemma / f"slice-{name}", tokens)) < 1e-5


@pytest.mark.parametrize("what", ["donor", "base", "sparsity", "window"])
def test_another_function_is_told_apart(gemma: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative controls: each of these mistakes is far outside of the bound above."""
    if what == "donor":
        original = TextConfig.donors
        monkeypatch.setattr(TextConfig, "donors", lambda self: {i: d - 3 for i, d in original(self).items()})
    elif what == "base":
        bases = gemma_attention.BASES
        swapped = dict(zip(bases, reversed(list(bases.values())), strict=True))
        monkeypatch.setattr(gemma_attention, "BASES", swapped)
    elif what == "window":
        monkeypatch.setattr(gemma_attention, "SLIDING", "none")
    else:
        monkeypatch.setattr(gemma_graph.NormalDist, "inv_cdf", lambda self, share: 1.0)
    tokens = ids(2)
    got = in_float64(gemma / "source", ROWS["widths"], tokens)
    assert error(got, truth(gemma / "slice-widths", tokens)) > 1e-3


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ROWS)
def test_a_prompt_and_cached_steps(gemma: Path, name: str, way: str) -> None:
    """In fp32, against float64: logits within 1e-4 of the largest, greedy tokens equal."""
    tokens = ids(2, LENGTH + STEPS)
    session = Session(gemma / f"{name} {way}", 2)
    pieces = [session.run(tokens[:, :LENGTH])]
    pieces += [session.run(tokens[:, t : t + 1]) for t in range(LENGTH, LENGTH + STEPS)]
    got, want = np.concatenate(pieces, 1), truth(gemma / f"slice-{name}", tokens)
    assert error(got, want) <= 1e-4
    assert np.array_equal(got.argmax(-1), want.argmax(-1))


@pytest.mark.parametrize("way", WAYS)
def test_a_prompt_in_pieces(gemma: Path, way: str) -> None:
    """Several tokens after others, in a batch."""
    tokens = ids(2, 3 * LENGTH)
    session = Session(gemma / f"mixed {way}", 2)
    got = np.concatenate([session.run(piece) for piece in np.split(tokens, [5, 6, 20], axis=1)], 1)
    assert error(got, truth(gemma / "slice-mixed", tokens)) <= 1e-4


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_themselves(gemma: Path, side: str, way: str) -> None:
    """Each row of a padded batch, the prompt and steps past the window, is what it is alone, on either side."""
    lengths, longest, steps = (4, 9, 7), 9, 8
    tokens = ids(3, longest + steps)
    padded, mask = np.zeros((3, longest), np.int64), np.zeros((3, longest), np.int64)
    for row, length in enumerate(lengths):
        place = slice(longest - length, longest) if side == "left" else slice(0, length)
        padded[row, place], mask[row, place] = tokens[row, :length], 1
    new = [tokens[:, longest + t : longest + t + 1] for t in range(steps)]
    batch, unmasked = (Session(gemma / f"mixed {way}", 3) for _ in range(2))
    first, rest = batch.run(padded, mask), [batch.run(step) for step in new]
    seen = [unmasked.run(step) for step in (padded, *new)]  # negative control: padding as if it were tokens
    for row, length in enumerate(lengths):
        own = np.concatenate([tokens[row, :length], tokens[row, longest:]])[None]
        got, want = first[row][mask[row] == 1], truth(gemma / "slice-mixed", own)[0]
        assert error(np.concatenate([got, *(logits[row] for logits in rest)]), want) <= 1e-4
        assert length == longest or error(seen[1][row, 0], want[length]) > 1e-3


def test_as_deep_as_the_released_model(tmp_path: Path) -> None:
    """35 layers in E4B's order: 10 of them sparse, the last 15 without keys and values."""
    pattern = [0.95] * 10 + [0.0] * 25
    source = text_checkpoint(tmp_path / "source", "ssssf" * 7, shared=15, activation_sparsity_pattern=pattern)
    tokens = ids(2, 40)
    want = truth(source, tokens)
    for way in ("stock", "contrib"):
        mx.export_onnx(mx.plan(source), tmp_path / way, **WAYS[way][0])
        session = Session(tmp_path / way, 2)
        got = np.concatenate([session.run(piece) for piece in np.split(tokens, range(35, 40), axis=1)], 1)
        assert error(got, want) <= 1e-4
        assert np.array_equal(got.argmax(-1), want.argmax(-1))


@pytest.mark.parametrize(
    "options", [{"altup_active_idx": 2}, {"num_key_value_heads": 4}, {"altup_correct_scale": False}]
)
def test_options_of_the_config(tmp_path: Path, options: dict[str, Any]) -> None:
    source, tokens = text_checkpoint(tmp_path / "source", "sfsf", shared=1, **options), ids(2)
    want = truth(source, tokens)
    for way, (how, _) in WAYS.items():
        mx.export_onnx(mx.plan(source), tmp_path / way, **how)
        assert error(Session(tmp_path / way, 2).run(tokens), want) <= 1e-4


@pytest.mark.parametrize("way", WAYS)
def test_verified(gemma: Path, way: str) -> None:
    for name in ROWS if way == "contrib" else ["mixed"]:
        report = mx.verify(gemma / f"{name} {way}", gemma / "source")
        assert report.passed, report.to_markdown()
        steps = {c.name: c for c in report.comparisons if c.kind == "decode gemma3n"}
        assert set(steps) == {f"decode@{split}.logits" for split in (1, 37, 74, "left", "right")}
        compared = [*steps.values(), *(c for c in report.comparisons if c.kind == "onnx gemma3n")]
        assert len(compared) == 6
        assert all(c.tolerance == TOLERANCES["onnx gemma3n"] == 1e-4 and c.top1 == 1 for c in compared)


@pytest.mark.parametrize("way", ["contrib", "split"])
def test_what_is_wrong_is_found(gemma: Path, tmp_path: Path, way: str) -> None:
    for path in (gemma / f"mixed {way}").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for data in tmp_path.glob("*.onnx_data"):
        wrong = np.frombuffer(data.read_bytes(), np.float32).copy()
        wrong[len(wrong) // 2 :] *= np.float32(1.01)
        data.write_bytes(wrong.tobytes())
        failed = {c.kind for c in mx.verify(tmp_path, gemma / "source").comparisons if not c.passed}
        assert failed >= {"provenance", "onnx gemma3n", "decode gemma3n"}
        data.write_bytes((gemma / f"mixed {way}" / data.name).read_bytes())


@pytest.mark.parametrize(("form", "opset", "most"), [("stock", 21, 157), ("contrib", 21, 95), ("stock", 23, 87)])
def test_casts_of_half_precision(gemma: Path, tmp_path: Path, form: str, opset: int, most: int) -> None:
    """They stand around products, and not between two of them."""
    mx.export_onnx(gemma / "source", tmp_path / "out", target="cuda", form=form, opset=opset)
    model = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    names = [node.name for node in model.graph.node if node.name.startswith("/model/layers.")]
    assert max(Counter(name.split("/")[2] for name in names).values()) <= most
    made = {name: node.op_type for node in model.graph.node for name in node.output}
    casts = [node for node in model.graph.node if node.op_type == "Cast"]
    assert casts
    assert not [node.name for node in casts if made.get(node.input[0]) == "Cast"]


@pytest.mark.parametrize("way", WAYS)
def test_small_and_readable(gemma: Path, way: str) -> None:
    """Nodes of each layer as written, before ONNX Runtime fuses any, under names that stay."""
    options, most = WAYS[way]
    for name, row in ROWS.items():
        folder = gemma / f"{name} {way}"
        file = folder / (SPLIT[1] if way == "split" else "model.onnx")
        model = onnx.load(file, load_external_data=False)
        names = [node.name for node in model.graph.node]
        assert len(set(names)) == len(names)
        counts = Counter(name.split("/")[2] for name in names if name.startswith("/model/layers."))
        assert len(counts) == 10 - len(row.skipped)
        assert max(counts.values()) <= most
        assert {f"/model/layers.7/{node}" for node in ("mlp/down_proj/Gemm", "self_attn/q_proj/Gemm")} <= set(names)
        assert {v.domain: v.version for v in model.opset_import}[""] == options.get("opset", 21)
        if options["form"] == "stock":  # ONNX Runtime's own norm is in ai.onnx's domain, where the checker misses it
            onnx.checker.check_model(file, full_check=True)
            assert {node.domain for node in model.graph.node} == {""}
        else:
            assert {"SimplifiedLayerNormalization", "RotaryEmbedding"} <= {node.op_type for node in model.graph.node}
        shared = 4 - sum(i >= 6 for i in row.skipped)
        own = {i.name for i in model.graph.input if i.name.startswith("past")}
        layers = range(10 - len(row.skipped) - shared)
        assert own == {f"past_key_values.{i}.{kind}" for i in layers for kind in ("key", "value")}
