"""Sources, graphs and the truth of benchmarks/matmamba.py. Weights are random, in the released names and shapes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir
import onnxruntime
import scan_ways
import torch
from safetensors.numpy import save_file
from scan_ways import OURS, Sizes, Way
from slice_matmamba import STATE, shapes

import matexport as mx
import matexport_plugins
from matexport.families.matmamba.layout import PREFIXES
from matexport.families.matmamba.mixer import Blocks, States
from matexport.graph import stateful
from matexport.graph.builder import Graph
from matexport.graph.options import GraphOptions
from matexport.parity.comparison import compare
from matexport_plugins.causal_conv1d.reference import causal_conv1d
from matexport_plugins.mamba2_scan.reference import mamba2_scan

CONTRIB, PLAIN, STOCK = "contrib form", "LinearAttention", "stock form"
PREFIX = PREFIXES["lm"]
D_LM, LAYERS_LM, D_VISION, LAYERS_VISION, PATCH, IMAGE = 768, 24, 512, 20, 16, 224
Arrays = dict[str, np.ndarray]


# ------------------------------------------------------------------------------------------- sources
def layer_source(folder: Path) -> Path:
    """One layer of LM-130M, with next to no vocabulary."""
    tensors = shapes(D_LM, 1) | {f"{PREFIX}embedding.weight": (8, D_LM)}
    return _write(folder / "layer", _language_config(1, 8), tensors)


def language_source(folder: Path) -> Path:
    """LM-130M."""
    return _write(folder, _language_config(LAYERS_LM, 50277), shapes(D_LM, LAYERS_LM))


def vision_source(folder: Path) -> Path:
    """Vision-35M."""
    config = {
        "d_model": D_VISION, "n_layer": LAYERS_VISION, "d_intermediate": 0, "n_classes": 1000, "patch_size": PATCH,
        "image_size": IMAGE, "ssm_cfg": {}, "attn_layer_idx": [], "attn_cfg": {}, "norm_epsilon": 1e-5,
        "rms_norm": False, "fused_add_norm": False, "residual_in_fp32": True, "pool": "cls",
    }  # fmt: skip
    d, tensors = D_VISION, shapes(D_VISION, LAYERS_VISION)
    tensors = {n.removeprefix(PREFIX): s for n, s in tensors.items() if not n.startswith(f"{PREFIX}embedding")}
    biases = {n.replace("weight", "bias"): s for n, s in tensors.items() if n.endswith(("s.norm.weight", "_f.weight"))}
    biases |= {f"layers.{i}.norm.bias": (d,) for i in range(LAYERS_VISION)}
    tensors |= biases | {
        "patch_embed.proj.weight": (d, 3, PATCH, PATCH), "patch_embed.proj.bias": (d,), "cls_token": (1, 1, d),
        "pos_embed": (1, (IMAGE // PATCH) ** 2 + 1, d), "head.weight": (1000, d), "head.bias": (1000,),
    }  # fmt: skip
    return _write(folder, config, tensors)


def _language_config(layers: int, vocabulary: int) -> dict[str, Any]:
    return {
        "d_model": D_LM, "d_intermediate": 0, "n_layer": layers, "vocab_size": vocabulary, "ssm_cfg": {},
        "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True,
        "pad_vocab_size_multiple": 8, "tie_embeddings": True,
    }  # fmt: skip


def _write(folder: Path, config: dict[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    arrays = {name: _values(name, rng.standard_normal(shape, np.float32), rng) for name, shape in tensors.items()}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _values(name: str, values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As a trained model could have them: steps and decays of Mamba-2's initialisation, no output that overflows."""
    if name.endswith("dt_bias"):
        dt = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), values.shape))
        return (dt + np.log(-np.expm1(-dt))).astype(np.float32)
    if name.endswith("A_log"):
        return np.log(rng.uniform(1, 16, values.shape)).astype(np.float32)
    if name.endswith(".D") or name.endswith(("norm.weight", "norm_f.weight")):
        return np.float32(1) + np.float32(0.2) * values
    scale = np.prod(values.shape[1:]) ** -0.5 if values.ndim > 1 and "embed" not in name else 0.1
    return values * np.float32(0.5 if "conv1d.weight" in name else scale)


# --------------------------------------------------------------------------------------------- layer
class Layer:
    """The mixer of a planned slice's first layer."""

    def __init__(self, planned: mx.PlannedSlice):
        self.plan, name = planned.plan, f"{PREFIX}layers.0.mixer."
        arrays = {n: t.view.of(planned.checkpoint.read(t.view.source)) for n, t in self.plan.tensors.items()}
        self.arrays = {n: np.ascontiguousarray(array, np.float32) for n, array in arrays.items()}
        self.weights = {n.removeprefix(name): a for n, a in self.arrays.items() if n.startswith(name)}
        self.width, self.heads = len(self.weights["norm.weight"]), len(self.weights["D"])
        self.sizes = Sizes(self.heads, self.width // self.heads, STATE)

    def inputs(self, length: int) -> Arrays:
        """From zero states, except for single steps."""
        rng = np.random.default_rng(1)
        made = {"x": (1, length, D_LM), "conv": (1, self.width + 2 * STATE, 3), "state": (1, self.heads, STATE)}
        made["state"] += (self.sizes.P,)
        return {n: rng.standard_normal(s, np.float32) * np.float32(n == "x" or length == 1) for n, s in made.items()}

    def reference(self, inputs: Arrays) -> tuple[np.ndarray, ...]:
        """The equations, in float64, step by step."""
        w, width = {n: a.astype(np.float64) for n, a in self.weights.items()}, self.width
        z, xbc, dt = np.split(inputs["x"] @ w["in_proj.weight"].T, [width, 2 * width + 2 * STATE], axis=-1)
        xbc, conv = causal_conv1d(xbc, w["conv1d.weight"], w["conv1d.bias"], inputs["conv"])
        x, B, C = np.split(xbc, [width, width + STATE], axis=-1)
        y, state = mamba2_scan(x, dt, -np.exp(w["A_log"]), B, C, w["D"], w["dt_bias"], inputs["state"])
        y = y * z / (1 + np.exp(-z))
        y = y / np.sqrt((y * y).mean(-1, keepdims=True) + 1e-5) * w["norm.weight"]
        return y @ w["out_proj.weight"].T, conv, state

    def model(self, form: str) -> bytes:
        g = Graph("layer", GraphOptions(form))
        x = g.input("x", "F32", ["batch", "sequence", D_LM])
        sizes = {"batch": g.op("Shape", x, start=0, end=1), "length": g.op("Shape", x, start=1, end=2)}
        mask = None
        if form == "stock":  # which fills chunks up, and hides that
            mask = g.op("Expand", g.constant(True, "BOOL"), g.op("Concat", *sizes.values(), axis=0))
        blocks = Blocks(g, self.plan, prefix=PREFIX, mask=mask, **sizes)
        conv, scan = blocks.state_shapes(0)
        states = States(g.input("conv", "F32", ["batch", *conv]), g.input("state", "F32", ["batch", *scan]))
        y, after = blocks.mixer(blocks.into_chunks(x), 0, states)
        assert after is not None
        y = blocks.by_step(blocks.out_of_chunks(y), D_LM) if blocks.filling else y
        for name, value, shape in (("y", y, ["sequence", D_LM]), ("c", after.conv, conv), ("s", after.scan, scan)):
            g.output(value, name, "F32", ["batch", *shape])
        for name, weight in g.weights.items():
            weight.value.const_value = ir.tensor(self.arrays[name], name=name)
        return ir.to_proto(g.to_model(producer_version="", metadata={})).SerializeToString()

    @cached_property
    def models(self) -> dict[str, bytes]:
        with plain_attention():
            plain = self.model("contrib")
        forms = {OURS: "custom", CONTRIB: "contrib", STOCK: "stock"}
        return {**{way: self.model(form) for way, form in forms.items()}, PLAIN: plain}

    def ways(self, inputs: Arrays, threads: int, mobius: str | None) -> dict[str, Way]:
        models = self.models | ({"mobius-onnx": self.mobius()} if mobius else {})
        return {way: scan_ways.ort_way(model, inputs, threads, ours=way == OURS) for way, model in models.items()}

    def mobius(self) -> bytes:
        """mobius-onnx's own graph of a Mamba-2 mixer, with these weights."""
        from mobius._testing import create_test_builder, create_test_input
        from mobius.components import Mamba2Block

        builder, op, graph = create_test_builder()
        block = Mamba2Block(D_LM, self.width, self.heads, self.sizes.P, STATE)
        shapes = {
            "x": ["batch", "sequence", D_LM], "conv": ["batch", self.width + 2 * STATE, 3],
            "state": ["batch", self.heads, STATE, self.sizes.P],
        }  # fmt: skip
        values = block(op, *(create_test_input(builder, name, shape) for name, shape in shapes.items()))
        for value, name in zip(values, "ycs", strict=True):
            value.name, value.type = name, ir.TensorType(ir.DataType.FLOAT)
            graph.outputs.append(value)
        for name, value in graph.initializers.items():
            if value.const_value is None:
                array = next(a for n, a in self.weights.items() if name == n or name.endswith(f".{n}"))
                if value.shape is not None and tuple(value.shape) == array.shape[::-1] != array.shape:
                    array = np.ascontiguousarray(array.T)
                value.const_value = ir.tensor(array, name=name)
        return ir.to_proto(ir.Model(graph, ir_version=11)).SerializeToString()


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Graphs built here have com.microsoft::LinearAttention as it is."""

    def scan(g: Graph, form: str, *values: Any, heads: int, head_dim: int, **_: Any) -> tuple[ir.Value, ir.Value]:
        assert values[-1] is None  # no mask
        names = ("x", "dt_raw", "A", "B", "C", "D", "dt_bias", "state")
        return scan_ways.linear_attention(g, dict(zip(names, values, strict=False)), Sizes(heads, head_dim))

    with mock.patch.object(stateful, "mamba2_scan", scan):
        yield


def profile(model: bytes, inputs: Arrays, threads: int) -> Path:
    """ONNX Runtime's own profile of some runs after the first ones."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling, options.log_severity_level = threads, True, 3
    options.register_custom_ops_library(str(matexport_plugins.ort_library()))
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    for _ in range(20):
        session.run(None, inputs)
    return Path(session.end_profiling())


# -------------------------------------------------------------------------------------------- models
def tensors(outputs: Mapping[str, np.ndarray]) -> list[torch.Tensor]:
    return [torch.from_numpy(value) for value in outputs.values()]


def losses(models: Sequence[Path]) -> list[dict[str, float]]:
    """Of the logits after 64 random tokens, relative to the first model's: one model in memory at a time."""
    found: list[dict[str, float]] = []
    want: np.ndarray | None = None
    for model in models:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.register_custom_ops_library(str(matexport_plugins.ort_library()))
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        feed = {
            i.name: np.zeros([1, *i.shape[1:]], np.float32) for i in session.get_inputs() if i.name.startswith("past_")
        }
        feed["input_ids"] = np.random.default_rng(0).integers(0, 50277, (1, 64))
        feed["attention_mask"] = np.ones((1, 64), np.int64)
        (got,) = session.run(["logits"], feed)
        want = got if want is None else want
        compared = compare("logits", "onnx", got, want)
        numbers = {"max_rel": compared.max_rel, "top1": compared.top1, "kl": compared.kl}
        found.append({name: float(f"{value:.3g}") for name, value in numbers.items() if value is not None})
    return found
