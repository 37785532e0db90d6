"""Ours and the rivals of benchmarks/scan.py: each computes the same y and state from the same arrays.

Every graph starts from what a mixer has at that point (dt before bias and softplus, B and C per group, channels last)
and includes what its operator needs around it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch

import matexport_plugins
import matexport_plugins.causal_conv1d.torch_op
import matexport_plugins.mamba2_scan.torch_op
from matexport.graph import mamba2, stateful
from matexport.graph.builder import Graph
from matexport.graph.chunks import cut_any

Arrays = dict[str, np.ndarray]
Values = dict[str, ir.Value]
OURS, OURS_BF16 = "ours", "ours in bfloat16"
WEIGHTS = {"A", "D", "dt_bias", "weight", "bias"}  # constants of a graph; all else are its inputs
HIDDEN = {"hidden": np.zeros((1, 1, 8), np.float32)}  # mobius' scan asks it for its type


@dataclass(frozen=True)
class Sizes:
    heads: int
    P: int
    N: int = 128


@dataclass
class Way:
    """Something that can be timed: `run` computes, `results` gives y and, where it has one, the final state."""

    run: Callable[[], Any]
    results: Callable[[], list[np.ndarray]]


# ------------------------------------------------------------------------------------------- running
def ort_way(model: bytes | str, inputs: Arrays, threads: int, *, ours: bool = False, like: Sequence[str] = ()) -> Way:
    """A session with inputs and outputs bound, so that calls cost the same whatever their number.

    The outputs have the shapes of the inputs `like`, or else of those of a first run.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    # a thread that waits for more work would take a core from whatever is timed next, for up to 50 ms
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if ours:
        options.register_custom_ops_library(str(matexport_plugins.ort_library()))
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {i.name: inputs[i.name] for i in session.get_inputs()}
    binding = session.io_binding()
    for name, value in feed.items():
        binding.bind_cpu_input(name, value)
    outputs = [np.full_like(value, np.nan) for value in ([inputs[n] for n in like] or session.run(None, feed))]
    for output, value in zip(session.get_outputs(), outputs, strict=True):
        binding.bind_ortvalue_output(output.name, onnxruntime.OrtValue.ortvalue_from_numpy(value))
    return Way(lambda: session.run_with_iobinding(binding), lambda: outputs)


def torch_way(function: Any, inputs: Mapping[str, np.ndarray], threads: int) -> Way:
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    found: list[Any] = []

    def run() -> None:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            found[:] = function(**tensors)

    return Way(run, lambda: [value.numpy() for value in found])


def graph_bytes(inputs: Arrays, build: Callable[[Graph, Values], Iterable[ir.Value]], name: str) -> bytes:
    g = Graph(name)
    values = {
        k: g.constant(v, "F32")
        if k in WEIGHTS
        else g.input(k, "F32", [None, *v.shape[1:]] if k == "state" else v.shape)
        for k, v in inputs.items()
    }
    for i, value in enumerate(build(g, values)):
        g.output(value, f"output_{i}", "F32", [None] * (3 if i == 0 else inputs["state"].ndim))
    return ir.to_proto(g.to_model(producer_version="", metadata={})).SerializeToString()


# -------------------------------------------------------------------------------------------- scans
def linear_attention(g: Graph, v: Values, s: Sizes, *, expanded: bool = False) -> tuple[ir.Value, ir.Value]:
    """com.microsoft::LinearAttention as it is; `expanded` repeats B and C for every head first."""
    i64 = g.constant
    dt = g.op("Softplus", g.op("Add", v["dt_raw"], v["dt_bias"]))
    x4 = g.op("Reshape", v["x"], i64([0, 0, s.heads, s.P]))
    value = g.op("Reshape", g.op("Mul", x4, g.op("Unsqueeze", dt, i64([3]))), i64([0, 0, s.heads * s.P]))
    query, key, groups = v["C"], v["B"], 1
    if expanded:
        query, key = (
            g.op("Reshape", g.op("Expand", g.op("Unsqueeze", part, i64([2])), i64([1, 1, s.heads, 1])), i64([0, 0, -1]))
            for part in (query, key)
        )
        groups = s.heads
    y, state = g.ops(
        "LinearAttention", query, key, value, v["state"], g.op("Mul", dt, v["A"]), domain="com.microsoft", outputs=2,
        update_rule="gated", scale=1.0, q_num_heads=groups, kv_num_heads=s.heads,
    )  # fmt: skip
    skip = g.op("Reshape", g.op("Mul", x4, g.op("Unsqueeze", v["D"], i64([1]))), i64([0, 0, s.heads * s.P]))
    return g.op("Add", y, skip), state


def in_form(g: Graph, v: Values, s: Sizes, form: str) -> tuple[ir.Value, ...]:
    names = ("x", "dt_raw", "A", "B", "C", "D", "dt_bias", "state")
    pieces = cut_any(g, g.op("Shape", v["x"], start=1, end=2)) if form == "stock" else None
    y, state = stateful.mamba2_scan(
        g, form, *(v[name] for name in names), None, heads=s.heads, head_dim=s.P, groups=1, state=s.N,
        dt_limit=(0.0, np.inf), chunks=pieces,
    )  # fmt: skip
    assert state is not None
    return y, state


def stepwise(g: Graph, v: Values, s: Sizes) -> tuple[ir.Value, ir.Value]:
    """One step after the other: ONNX's Scan."""
    i64 = g.constant
    dt = g.op("Softplus", g.op("Add", v["dt_raw"], v["dt_bias"]))
    x4 = g.op("Reshape", v["x"], i64([0, 0, s.heads, s.P]))
    body = Graph("step")
    with body.scope("step"):  # names in it must differ from those around it
        S, a, k, x, q = (body.input(f"/step/{name}", "F32", [None] * 4) for name in ("S", "a", "k", "x", "q"))
        new = body.op("Add", body.op("Mul", S, a), body.op("Mul", k, x))
        body.outputs = [new, body.op("MatMul", q, new)]
    step = ir.Graph(body.inputs, body.outputs, nodes=body.nodes, name=body.name)
    shaped = {
        "decay": g.op("Reshape", g.op("Exp", g.op("Mul", dt, v["A"])), i64([0, 0, s.heads, 1, 1])),
        "key": g.op("Reshape", v["B"], i64([0, 0, 1, s.N, 1])),
        "value": g.op("Unsqueeze", g.op("Mul", x4, g.op("Unsqueeze", dt, i64([3]))), i64([3])),
        "query": g.op("Reshape", v["C"], i64([0, 0, 1, 1, s.N])),
    }
    steps = (g.op("Transpose", value, perm=[1, 0, 2, 3, 4]) for value in shaped.values())
    state, y = g.ops("Scan", v["state"], *steps, outputs=2, body=step, num_scan_inputs=4)
    y = g.op("Reshape", g.op("Transpose", y, perm=[1, 0, 2, 3, 4]), i64([0, 0, s.heads, s.P]))
    y = g.op("Add", y, g.op("Mul", x4, g.op("Unsqueeze", v["D"], i64([1]))))
    return g.op("Reshape", y, i64([0, 0, s.heads * s.P])), state


def in_bfloat16(g: Graph, v: Values) -> tuple[ir.Value, ...]:
    names = ("x", "dt_raw", "A", "B", "C", "D", "dt_bias", "state")
    return g.ops("Mamba2Scan", *(v[name] for name in names), domain="ai.matexport", outputs=2, bfloat16=1)


def mobius_scan(folder: str, inputs: Arrays, s: Sizes) -> bytes:
    """What lies between the convolution and the norm in mobius-onnx's Mamba2Block."""
    if folder not in sys.path:
        sys.path.append(folder)
    from mobius._testing import create_test_builder, create_test_input
    from mobius.components import Mamba2Block

    builder, op, graph = create_test_builder()
    width = s.heads * s.P
    block = Mamba2Block(d_model=8, d_inner=width, num_heads=s.heads, d_head=s.P, d_state=s.N)
    block(
        op, create_test_input(builder, "hidden", ["b", "t", 8]),
        create_test_input(builder, "conv", ["b", width + 2 * s.N, 3]),
        create_test_input(builder, "state", ["b", s.heads, s.N, s.P]),
    )  # fmt: skip
    projection, mixed = (node for node in graph if node.op_type == "Split")
    attention = next(node for node in graph if node.op_type == "LinearAttention")
    skip = next(node for node in graph if _adds_skip(node))
    for name, value in zip("xBC", mixed.outputs, strict=True):
        value.name = name
    projection.outputs[2].name = "dt_raw"
    skip.outputs[0].name, attention.outputs[1].name = "output_0", "output_1"
    part = ir.convenience.extract(graph, ["x", "B", "C", "dt_raw", "state", "hidden"], ["output_0", "output_1"])
    for name, value in part.initializers.items():
        if name in ("A_log", "D", "dt_bias"):
            array = np.log(-inputs["A"]) if name == "A_log" else inputs[name]
            value.const_value = ir.tensor(array, name=name)
    for value in (*part.inputs, *part.outputs):
        axes = 4 if value.name in ("state", "output_1") else 3
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([None] * axes)
    model = ir.Model(part, ir_version=11)
    return ir.to_proto(model).SerializeToString()


def _adds_skip(node: ir.Node) -> bool:
    """The sum of what LinearAttention gave and D x."""
    return node.op_type == "Add" and all(v is not None and _made_by(v) == "CastLike" for v in node.inputs)


def _made_by(value: ir.Value) -> str:
    producer = value.producer()
    return producer.op_type if producer else ""


def scan_ways(inputs: Arrays, s: Sizes, length: int, threads: int, mobius: str | None) -> dict[str, Way]:
    def ort(build: Callable[[Graph, Values], Iterable[ir.Value]], name: str, *, ours: bool = False) -> Way:
        return ort_way(graph_bytes(inputs, build, name), inputs, threads, ours=ours)

    ways = {
        OURS: ort(lambda g, v: in_form(g, v, s, "custom"), OURS, ours=True),
        "LinearAttention": ort(lambda g, v: linear_attention(g, v, s), "shared"),
        "LinearAttention, B and C expanded": ort(lambda g, v: linear_attention(g, v, s, expanded=True), "expanded"),
        "LinearAttention, padded": ort(lambda g, v: in_form(g, v, s, "contrib"), "padded"),
        "Scan": ort(lambda g, v: stepwise(g, v, s), "scan"),
        "chunked stock ops": ort(lambda g, v: in_form(g, v, s, "stock"), "chunked"),
        "PyTorch chunked": torch_way(torch.ops.matexport.mamba2_scan, inputs, threads),
    }
    if length > 1:
        ways[OURS_BF16] = ort(in_bfloat16, "bfloat16", ours=True)
    if mobius:
        ways["mobius-onnx"] = ort_way(mobius_scan(mobius, inputs, s), inputs | HIDDEN, threads)
    return ways


# -------------------------------------------------------------------------------------- convolutions
def conv_ours(g: Graph, v: Values) -> tuple[ir.Value, ir.Value]:
    return stateful.causal_conv1d(g, "custom", v["x"], v["weight"], v["bias"], v["state"], None, None)


def conv_with_state(g: Graph, v: Values) -> tuple[ir.Value, ir.Value]:
    y, state = g.ops(
        "CausalConvWithState", g.op("Transpose", v["x"], perm=[0, 2, 1]), v["weight"], v["bias"], v["state"],
        domain="com.microsoft", outputs=2, activation="silu",
    )  # fmt: skip
    return g.op("Transpose", y, perm=[0, 2, 1]), state


def conv_stock(g: Graph, v: Values) -> tuple[ir.Value, ir.Value]:
    """A depthwise Conv over the state and x."""
    channels, _, k = (int(size) for size in v["weight"].shape or ())
    steps = g.op("Concat", v["state"], g.op("Transpose", v["x"], perm=[0, 2, 1]), axis=2)
    y = g.op("Conv", steps, v["weight"], v["bias"], group=channels, kernel_shape=[k])
    state = g.op("Slice", steps, g.constant([-(k - 1)]), g.constant([1 << 60]), g.constant([2]))
    return g.op("Transpose", mamba2.silu(g, y), perm=[0, 2, 1]), state


def conv_shifted(g: Graph, v: Values, length: int) -> tuple[ir.Value, ir.Value]:
    """k shifted products with channels last, so that only the state is transposed."""
    i64, k = g.constant, int((v["weight"].shape or ())[2])
    steps = g.op("Concat", g.op("Transpose", v["state"], perm=[0, 2, 1]), v["x"], axis=1)
    taps = g.op("Transpose", v["weight"], perm=[2, 1, 0])  # (k, 1, channels)
    y = v["bias"]
    for i in range(k):
        window = g.op("Slice", steps, i64([i]), i64([i + length]), i64([1]))
        y = g.op("Add", y, g.op("Mul", window, g.op("Gather", taps, i64(i))))
    state = g.op("Slice", steps, i64([length]), i64([1 << 60]), i64([1]))
    return mamba2.silu(g, y), g.op("Transpose", state, perm=[0, 2, 1])


def conv_ways(inputs: Arrays, length: int, threads: int) -> dict[str, Way]:
    def ort(build: Callable[[Graph, Values], Iterable[ir.Value]], *, ours: bool = False) -> Way:
        return ort_way(graph_bytes(inputs, build, "conv"), inputs, threads, ours=ours)

    return {
        OURS: ort(conv_ours, ours=True),
        "CausalConvWithState": ort(conv_with_state),
        "Conv": ort(conv_stock),
        "shifted products": ort(lambda g, v: conv_shifted(g, v, length)),
        "PyTorch": torch_way(torch.ops.matexport.causal_conv1d, inputs, threads),
    }


def gemm_way(threads: int, size: int = 1024) -> Way:
    """This CPU's rate of large float32 products, as ONNX Runtime's MatMul reaches it."""
    rng = np.random.default_rng(0)
    inputs = {name: rng.standard_normal((size, size)).astype(np.float32) for name in "ab"}
    g = Graph("gemm")
    a, b = (g.input(name, "F32", [size, size]) for name in "ab")
    g.output(g.op("MatMul", a, b), "c", "F32", [size, size])
    return ort_way(ir.to_proto(g.to_model(producer_version="", metadata={})).SerializeToString(), inputs, threads)
