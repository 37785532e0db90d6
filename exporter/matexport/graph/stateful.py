"""The ops of a Mamba-2 mixer for any length, with state in and out: as our own ops, as contrib ops, in standard ones.

One node each serves prefill, continuation and decoding. In form `custom` a file carries functions for our ops, so
that it runs, slower, where our kernels are not registered; where ONNX Runtime has no LinearAttention either, a
function in standard operators takes its place.

Shapes: b batch, T length, h heads, g groups, n state, p head dim, k kernel, m channels of the convolution.
Equations: `matexport_plugins/mamba2_scan/README.md`, `causal_conv1d/README.md`.
"""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir

from matexport.graph.builder import Body, Graph
from matexport.graph.mamba2 import silu

OURS, CONTRIB = "ai.matexport", "com.microsoft"
FORMS = ("custom", "contrib", "stock")
LANES = 32  # ONNX Runtime's LinearAttention is fast for head dims that are multiples of this

Pair = tuple[ir.Value, ir.Value]


# --------------------------------------------------------------------------------------- convolution
def causal_conv1d(
    g: Graph, form: str, x: ir.Value, weight: ir.Value, bias: ir.Value, state: ir.Value, mask: ir.Value | None,
    *, kernel: int,
) -> Pair:  # fmt: skip
    """x (b, T, m), weight (m, 1, k), bias (m), state (b, m, k - 1), mask (b, T) -> y (b, T, m) and the new state."""
    if form == "custom":
        y, final = g.ops("CausalConv1d", x, weight, bias, state, mask, domain=OURS, outputs=2)
        return y, final
    return _conv(g, x, weight, bias, state, mask, kernel=kernel)


def _conv(
    g: Graph, x: ir.Value, weight: ir.Value, bias: ir.Value, state: ir.Value, mask: ir.Value | None, *, kernel: int
) -> Pair:
    """In standard operators. Masked steps are sorted before the state: real steps see their real predecessors."""
    i64, tail = g.constant, kernel - 1
    length = g.op("Shape", x, start=1, end=2)
    steps = g.op("Concat", state, g.op("Transpose", x, perm=[0, 2, 1]), axis=2)  # (b, m, k - 1 + T)
    place = None
    if mask is not None:
        real = g.op("Cast", mask, to=int(ir.DataType.INT64))
        before = g.op("Concat", g.op("Shape", x, start=0, end=1), i64([tail]), axis=0)
        real = g.op("Concat", g.op("Expand", i64(1), before), real, axis=1)  # (b, k - 1 + T)
        masked = g.op("Sub", i64(1), real)
        dropped = g.op("ReduceSum", masked, i64([1]), keepdims=1)
        among_real = g.op("Add", g.op("CumSum", real, i64(1)), dropped)
        among_masked = g.op("CumSum", masked, i64(1))
        target = g.op("Where", g.op("Cast", real, to=int(ir.DataType.BOOL)), among_real, among_masked)
        target = g.op("Sub", target, i64(1))  # where each step goes
        index = g.op("Sub", g.op("CumSum", g.op("Add", real, masked), i64(1)), i64(1))  # 0 .. k - 2 + T
        order = g.op("ScatterElements", index, target, index, axis=1)
        shape = g.op("Shape", steps)
        steps = g.op("GatherElements", steps, g.op("Expand", g.op("Unsqueeze", order, i64([1])), shape), axis=2)
        place = g.op("Slice", target, i64([tail]), i64([1 << 60]), i64([1]))
        place = g.op("Max", g.op("Sub", place, i64(tail)), i64(0))
    taps = g.op("Transpose", weight, perm=[2, 0, 1])  # (k, m, 1)
    y = g.op("Unsqueeze", bias, i64([1]))
    for j in range(kernel):
        window = g.op("Slice", steps, i64([j]), g.op("Add", length, i64([j])), i64([2]))
        y = g.op("Add", y, g.op("Mul", window, g.op("Gather", taps, i64(j))))
    if place is not None:
        y = g.op("GatherElements", y, g.op("Expand", g.op("Unsqueeze", place, i64([1])), g.op("Shape", y)), axis=2)
    final = g.op("Slice", steps, length, i64([1 << 60]), i64([2]))
    return g.op("Transpose", silu(g, y), perm=[0, 2, 1]), final


# ---------------------------------------------------------------------------------------------- scan
def mamba2_scan(
    g: Graph, form: str, x: ir.Value, dt_raw: ir.Value, A: ir.Value, B: ir.Value, C: ir.Value, D: ir.Value,
    dt_bias: ir.Value, state: ir.Value, mask: ir.Value | None,
    *, heads: int, groups: int, dt_limit: tuple[float, float],
) -> Pair:  # fmt: skip
    """x (b, T, h * p), dt_raw (b, T, h), A, D, dt_bias (h), B, C (b, T, g * n), state (b, h, n, p), mask (b, T)
    -> y (b, T, h * p) and the new state."""
    values = (x, dt_raw, A, B, C, D, dt_bias, state, mask)
    if form == "custom":
        options: dict[str, Any] = {"groups": groups, "heads": heads}
        if dt_limit != (0.0, math.inf):
            options["dt_limit"] = list(dt_limit)
        y, final = g.ops("Mamba2Scan", *values, domain=OURS, outputs=2, **options)
        return y, final
    return _scan(g, form, *values, heads=heads, groups=groups, dt_limit=dt_limit)


def _scan(
    g: Graph, form: str, x: ir.Value, dt_raw: ir.Value, A: ir.Value, B: ir.Value, C: ir.Value, D: ir.Value,
    dt_bias: ir.Value, state: ir.Value, mask: ir.Value | None,
    *, heads: Any, groups: Any, dt_limit: tuple[float, float],
) -> Pair:  # fmt: skip
    """As LinearAttention: C is its query, B its key, dt x its value, dt A its decay.

    `heads` and `groups` are numbers, or references to a function's attributes.
    """
    i64 = g.constant
    dt = g.op("Softplus", g.op("Add", dt_raw, dt_bias))
    if dt_limit != (0.0, math.inf):
        dt = g.op("Clip", dt, g.constant(dt_limit[0], "F32"), g.constant(dt_limit[1], "F32"))
    if mask is not None:  # a step of dt = 0 changes nothing
        dt = g.op("Mul", dt, g.op("Unsqueeze", g.op("Cast", mask, to=int(ir.DataType.FLOAT)), i64([2])))
    by_head = g.op("Concat", i64([0, 0]), g.op("Shape", A), i64([-1]), axis=0)
    flat = i64([0, 0, -1])
    x4 = g.op("Reshape", x, by_head)
    value = g.op("Mul", x4, g.op("Unsqueeze", dt, i64([3])))
    decay = g.op("Mul", dt, A)
    if form == "stock":
        y, final = _linear_attention(g, C, B, g.op("Reshape", value, flat), state, decay)
        y = g.op("Reshape", y, by_head)
    else:
        size = g.op("Shape", state, start=3, end=4)  # p, padded with zeros to what is fast
        pads = g.op("Concat", i64([0] * 7), g.op("Mod", g.op("Neg", size), i64([LANES])), axis=0)
        value, padded = g.op("Reshape", g.op("Pad", value, pads), flat), g.op("Pad", state, pads)
        options = {"update_rule": "gated", "scale": 1.0, "q_num_heads": groups, "kv_num_heads": heads}
        y, final = g.ops("LinearAttention", C, B, value, padded, decay, domain=CONTRIB, outputs=2, **options)
        y = g.op("Slice", g.op("Reshape", y, by_head), i64([0]), size, i64([3]))
        final = g.op("Slice", final, i64([0]), size, i64([3]))
    y = g.op("Add", y, g.op("Mul", x4, g.op("Unsqueeze", D, i64([1]))))
    return g.op("Reshape", y, flat), final


def _linear_attention(
    g: Graph, query: ir.Value, key: ir.Value, value: ir.Value, past: ir.Value, decay: ir.Value
) -> Pair:
    """com.microsoft::LinearAttention with the gated rule and scale 1, one step after the other: r heads share a key."""
    i64 = g.constant
    b, h, n, p = (g.op("Shape", past, start=i, end=i + 1) for i in range(4))
    groups = g.op("Div", g.op("Shape", query, start=2, end=3), n)
    repeat, one, same = g.op("Div", h, groups), i64([1]), i64([0, 0])

    def shaped(x: ir.Value, *sizes: ir.Value) -> ir.Value:
        return g.op("Reshape", x, g.op("Concat", *sizes, axis=0))

    body = Body("step", inside=g)
    S, a, k, v, q = (body.input(body.unique(name), "F32", [None] * 5) for name in ("S", "a", "k", "v", "q"))
    new = body.op("Add", body.op("Mul", S, a), body.op("Mul", k, v))
    body.outputs = [new, body.op("MatMul", q, new)]
    # ONNX's reference evaluator scans along the first axis only
    query, key, value, decay = (g.op("Transpose", v, perm=[1, 0, 2]) for v in (query, key, value, g.op("Exp", decay)))
    final, y = g.ops(
        "Scan", shaped(past, b, groups, repeat, n, p), shaped(decay, same, groups, repeat, one, one),
        shaped(key, same, groups, one, n, one), shaped(value, same, groups, repeat, one, p),
        shaped(query, same, groups, one, one, n), outputs=2, body=body.to_graph(), num_scan_inputs=4,
    )  # fmt: skip
    y = g.op("Transpose", g.op("Reshape", y, i64([0, 0, -1])), perm=[1, 0, 2])
    return y, g.op("Reshape", final, g.op("Shape", past))


# ----------------------------------------------------------------------------------------- functions
def functions(form: str, *, kernel: int, masked: bool, dt_limit: tuple[float, float]) -> list[ir.Function]:
    """What the ops of a form are where no kernel is registered for them; a function stands before its callers."""
    if form == "stock":
        return []
    names = ("query", "key", "value", "past_state", "decay")
    body = Body("LinearAttention")
    values = [body.input(name, "F32", None) for name in names]
    _named(body, _linear_attention(body, *values), ("output", "present_state"))
    attention = {"update_rule": None, "scale": None, "q_num_heads": None, "kv_num_heads": None}
    found = [body.to_function(CONTRIB, attention)]
    if form == "custom":
        mask = ["mask"] if masked else []
        body = Body("CausalConv1d")
        x, weight, bias, state, *rest = (body.input(n, "F32", None) for n in ["x", "weight", "bias", "state", *mask])
        _named(
            body, _conv(body, x, weight, bias, state, rest[0] if rest else None, kernel=kernel), ("y", "final_state")
        )
        found.append(body.to_function(OURS, {}))
        body = Body("Mamba2Scan")
        inputs = ["x", "dt_raw", "A", "B", "C", "D", "dt_bias", "state", *mask]
        arguments = [*(body.input(name, "F32", None) for name in inputs), *([] if masked else [None])]
        heads, groups = (
            ir.RefAttr(theirs, ours, ir.AttributeType.INT)
            for theirs, ours in (("kv_num_heads", "heads"), ("q_num_heads", "groups"))
        )
        pair = _scan(body, "contrib", *arguments, heads=heads, groups=groups, dt_limit=dt_limit)  # type: ignore[arg-type]
        _named(body, pair, ("y", "final_state"))
        found.append(body.to_function(OURS, {"groups": None, "heads": None, "dt_limit": [0.0, math.inf]}))
    return found


def _named(body: Body, outputs: Pair, names: tuple[str, str]) -> None:
    body.outputs = list(outputs)
    for value, name in zip(outputs, names, strict=True):
        value.name = name
