"""The ops of a Mamba-2 mixer for any length, with state in and out: as our own ops, as contrib ops, in standard ones.

One node each serves prefill, continuation and decoding. In form `custom` a file carries functions for our ops, so
that it runs, slower, where our kernels are not registered; where ONNX Runtime has no LinearAttention either, a
function in standard operators takes its place.

Shapes: b batch, T length, h heads, g groups, n state, p head dim, k kernel, m channels of the convolution.
Equations: `matexport_plugins/mamba2_scan/README.md`, `causal_conv1d/README.md`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import onnx_ir as ir

from matexport.graph.builder import Body, Graph
from matexport.graph.chunks import Chunks, Filling, Result, arange, chunked_attention, cut_any, dims, linear_attention
from matexport.graph.mamba2 import silu, softplus

OURS, CONTRIB = "ai.matexport", "com.microsoft"
FORMS = ("custom", "contrib", "stock")
LANES = 32  # ONNX Runtime's LinearAttention is fast for head dims that are multiples of this

Pair = tuple[ir.Value, ir.Value]
Attention = Callable[..., Result]


# --------------------------------------------------------------------------------------- convolution
@dataclass(frozen=True)
class Taps:
    """Which inputs a convolution takes: rows of (b * (k - 1) + b * T, m), all states and then all steps.

    Attributes:
        rows: (b, T, k), or (b, c, l, k), the oldest tap first.
        final: (b, k - 1), those of the new state.
    """

    rows: ir.Value
    final: ir.Value


def taps(g: Graph, batch: ir.Value, length: ir.Value, mask: ir.Value | None, *, kernel: int) -> Taps:
    """For sizes (1) and a mask (b, T), once for all layers.

    Masked steps are sorted before the state, so that real ones see their real predecessors.
    """
    i64, tail = g.constant, kernel - 1
    real = g.op("Expand", g.constant(True, "BOOL"), g.op("Concat", batch, i64([tail]), axis=0))
    if mask is None:
        mask = g.op("Expand", g.constant(True, "BOOL"), g.op("Concat", batch, length, axis=0))
    counted = g.op("Cast", g.op("Concat", real, mask, axis=1), to=int(ir.DataType.INT64))  # (b, k - 1 + T)
    masked = g.op("Sub", i64(1), counted)
    among_real = g.op("Add", g.op("CumSum", counted, i64(1)), g.op("ReduceSum", masked, i64([1]), keepdims=1))
    target = g.op("Where", g.op("Equal", counted, i64(1)), among_real, g.op("CumSum", masked, i64(1)))
    target = g.op("Sub", target, i64(1))  # where each step goes
    index = arange(g, g.op("Add", length, i64([tail])))
    sequence = g.op("Unsqueeze", arange(g, batch), i64([1]))
    state = g.op("Mul", sequence, i64([tail]))
    step = g.op("Add", g.op("Mul", sequence, length), g.op("Mul", g.op("Sub", batch, i64([1])), i64([tail])))
    row = g.op("Add", index, g.op("Where", g.op("Less", index, i64([tail])), state, step))
    order = g.op("ScatterElements", row, target, row, axis=1)
    place = g.op("Slice", target, i64([tail]), i64([1 << 60]), i64([1]))
    place = g.op("Max", g.op("Sub", place, i64(tail)), i64(0))  # of what each step's oldest tap reads
    taken = [g.op("GatherElements", order, g.op("Add", place, i64(j)), axis=1) for j in range(kernel)]
    rows = g.op("Concat", *(g.op("Unsqueeze", one, i64([2])) for one in taken), axis=2)
    final = g.op("Slice", order, length, i64([1 << 60]), i64([1]))
    return Taps(g.index(rows), g.index(final))


def taps_in_chunks(g: Graph, batch: ir.Value, filling: Filling, *, kernel: int) -> Taps:
    """The same where a sequence is cut into chunks."""
    cut = filling.chunks
    found = taps(g, batch, dims(g, cut.filled), cut.shaped(g, filling.mask, 0, cut.filled), kernel=kernel)
    return replace(found, rows=cut.shaped(g, found.rows, 0, cut.count, cut.steps, kernel))


def causal_conv1d(
    g: Graph, form: str, x: ir.Value, weight: ir.Value, bias: ir.Value, state: ir.Value, mask: ir.Value | None,
    taps: Taps | None,
) -> Pair:  # fmt: skip
    """x (b, T, m), weight (m, 1, k), bias (m), state (b, m, k - 1), mask (b, T) -> y (b, T, m) and the new state.

    Forms in standard operators need `taps`, in which the mask already is; they take x as rows (b * T, m) too, and
    give y (b, c, l, m) if steps are in chunks.
    """
    if form == "custom":
        y, final = g.ops("CausalConv1d", x, weight, bias, state, mask, domain=OURS, outputs=2)
        return y, final
    assert taps is not None
    return _conv(g, x, weight, bias, state, taps)


def _conv(g: Graph, x: ir.Value, weight: ir.Value, bias: ir.Value, state: ir.Value, taps: Taps) -> Pair:
    """In standard operators."""
    states = g.op("Transpose", state, perm=[0, 2, 1])
    channels = weight.shape[0] if weight.shape else None
    if isinstance(channels, int):  # simpler for TensorRT
        rows = [g.op("Reshape", v, g.constant([-1, channels])) for v in (states, x)]
    else:
        rows = [g.op("Flatten", v, axis=2) for v in (states, x)]
    every = g.op("Concat", *rows, axis=0)
    products = g.op("Mul", g.op("Gather", every, taps.rows), g.op("Transpose", weight, perm=[1, 2, 0]))
    y = g.op("Add", g.op("ReduceSum", products, g.constant([-2]), keepdims=0), bias)
    final = g.op("Transpose", g.op("Gather", every, taps.final), perm=[0, 2, 1])
    return silu(g, y), final


# ---------------------------------------------------------------------------------------------- scan
def mamba2_scan(
    g: Graph, form: str, x: ir.Value, dt_raw: ir.Value, A: ir.Value, B: ir.Value, C: ir.Value, D: ir.Value,
    dt_bias: ir.Value, past: ir.Value | None, mask: ir.Value | None,
    *, heads: int, head_dim: int, groups: int, state: int, dt_limit: tuple[float, float], chunks: Chunks | None,
    filled: bool = False,
) -> Result:  # fmt: skip
    """x (b, T, h * p), dt_raw (b, T, h), A, D, dt_bias (h), B, C (b, T, g * n), past (b, h, n, p), mask (b, T)
    -> y (b, T, h * p) and the new state.

    Form `stock` needs `chunks`, and there `past` may be None: zeros; then so is the new state. Forms in standard
    operators take the mask as `numbers` gives it.

    Args:
        filled: whether steps are in chunks already: (b, c, l, ...) in place of (b, T, ...). Then y is rows,
            (b * c * l, h * p).
    """
    values = (x, dt_raw, A, B, C, D, dt_bias, past, mask)
    if form == "custom":
        options: dict[str, Any] = {"groups": groups, "heads": heads}
        if dt_limit != (0.0, math.inf):
            options["dt_limit"] = list(dt_limit)
        y, final = g.ops("Mamba2Scan", *values, domain=OURS, outputs=2, **options)
        return y, final
    by_head = g.constant([0, 0, *([0] if filled else []), heads, head_dim])
    flat = g.constant([-1, heads * head_dim] if filled else [0, 0, -1])
    attention: Attention = partial(_contrib_attention, heads=heads, groups=groups)
    if form == "stock":
        assert chunks is not None
        stock = chunked_attention if filled else linear_attention
        attention = partial(stock, chunks=chunks, heads=heads, groups=groups, state=state, head_dim=head_dim)
    return _scan(g, *values, by_head=by_head, flat=flat, dt_limit=dt_limit, attention=attention)


def numbers(g: Graph, mask: ir.Value) -> ir.Value:
    """(b, T), or (b, c, l), as 0 and 1, with an axis of 1 after it."""
    return g.op("Unsqueeze", g.op("Cast", mask, to=int(ir.DataType.FLOAT)), g.constant([-1]))


def _scan(
    g: Graph, x: ir.Value, dt_raw: ir.Value, A: ir.Value, B: ir.Value, C: ir.Value, D: ir.Value,
    dt_bias: ir.Value, past: ir.Value | None, mask: ir.Value | None,
    *, by_head: ir.Value, flat: ir.Value, dt_limit: tuple[float, float], attention: Attention,
) -> Result:  # fmt: skip
    """As a linear attention: C is its query, B its key, dt x its value, dt A its decay.

    Args:
        by_head, flat: the shapes (b, T, h, p) and (b, T, h * p).
        attention: query, key, value (b, T, h, p), decay, past -> (b, T, h, p) and the new state.
    """
    dt = softplus(g, dt_raw, dt_bias, dt_limit)
    if mask is not None:  # a step of dt = 0 changes nothing
        dt = g.op("Mul", dt, mask)
    x = g.op("Reshape", x, by_head)
    value = g.op("Mul", x, g.op("Unsqueeze", dt, g.constant([-1])))
    y, final = attention(g, query=C, key=B, value=value, decay=g.op("Mul", dt, A), past=past)
    y = g.op("Add", y, g.op("Mul", x, g.op("Unsqueeze", D, g.constant([1]))))
    return g.op("Reshape", y, flat), final


def _contrib_attention(
    g: Graph, query: ir.Value, key: ir.Value, value: ir.Value, decay: ir.Value, past: ir.Value,
    *, heads: Any, groups: Any,
) -> Result:  # fmt: skip
    """com.microsoft::LinearAttention; `heads` and `groups` are numbers, or references to a function's attributes."""
    i64 = g.constant
    size = g.op("Shape", past, start=3, end=4)  # p, padded with zeros to what is fast
    pads = g.op("Concat", i64([0] * 7), g.op("Mod", g.op("Neg", size), i64([LANES])), axis=0)
    flat, padded = g.op("Reshape", g.op("Pad", value, pads), i64([0, 0, -1])), g.op("Pad", past, pads)
    options = {"update_rule": "gated", "scale": 1.0, "q_num_heads": groups, "kv_num_heads": heads}
    y, final = g.ops("LinearAttention", query, key, flat, padded, decay, domain=CONTRIB, outputs=2, **options)
    wide = g.op("Concat", i64([0, 0]), g.op("Shape", past, start=1, end=2), i64([-1]), axis=0)
    y = g.op("Slice", g.op("Reshape", y, wide), i64([0]), size, i64([3]))
    return y, g.op("Slice", final, i64([0]), size, i64([3]))


# ----------------------------------------------------------------------------------------- functions
def functions(form: str, *, kernel: int, masked: bool, dt_limit: tuple[float, float]) -> list[ir.Function]:
    """What the ops of a form are where no kernel is registered for them; a function stands before its callers."""
    if form == "stock":
        return []
    names: tuple[str, ...] = ("query", "key", "value", "past_state", "decay")
    body = Body("LinearAttention")
    query, key, value, past, decay = (body.input(name, "F32", None) for name in names)
    h, n, p = (body.op("Shape", past, start=i, end=i + 1) for i in (1, 2, 3))
    groups = body.op("Div", body.op("Shape", query, start=2, end=3), n)
    y, final = linear_attention(
        body, cut_any(body, body.op("Shape", query, start=1, end=2)), query, key, value, decay, past,
        heads=h, groups=groups, state=n, head_dim=p,
    )  # fmt: skip
    _named(body, (body.op("Reshape", y, body.constant([0, 0, -1])), final), ("output", "present_state"))
    attention = {"update_rule": None, "scale": None, "q_num_heads": None, "kv_num_heads": None}
    found = [body.to_function(CONTRIB, attention)]
    if form == "custom":
        mask = ["mask"] if masked else []
        body = Body("CausalConv1d")
        names = ("x", "weight", "bias", "state", *mask)
        x, weight, bias, state, *rest = (body.input(n, "BOOL" if n == "mask" else "F32", None) for n in names)
        batch, length = (body.op("Shape", x, start=i, end=i + 1) for i in range(2))
        steps = taps(body, batch, length, rest[0] if rest else None, kernel=kernel)
        _named(body, _conv(body, x, weight, bias, state, steps), ("y", "final_state"))
        found.append(body.to_function(OURS, {}))
        body = Body("Mamba2Scan")
        inputs = ["x", "dt_raw", "A", "B", "C", "D", "dt_bias", "state", *mask]
        arguments: list[ir.Value | None] = [body.input(n, "BOOL" if n == "mask" else "F32", None) for n in inputs]
        arguments = [*arguments[:-1], numbers(body, arguments[-1])] if masked else [*arguments, None]  # type: ignore[arg-type]
        kv, q = (
            ir.RefAttr(theirs, ours, ir.AttributeType.INT)
            for theirs, ours in (("kv_num_heads", "heads"), ("q_num_heads", "groups"))
        )
        by_head = body.op(
            "Concat", body.constant([0, 0]), body.op("Shape", body.inputs[2]), body.constant([-1]), axis=0
        )
        contrib, flat = partial(_contrib_attention, heads=kv, groups=q), body.constant([0, 0, -1])
        pair = _scan(body, *arguments, by_head=by_head, flat=flat, dt_limit=dt_limit, attention=contrib)  # type: ignore[arg-type]
        _named(body, pair, ("y", "final_state"))
        found.append(body.to_function(OURS, {"groups": None, "heads": None, "dt_limit": [0.0, math.inf]}))
    return found


def _named(body: Body, outputs: Result, names: tuple[str, str]) -> None:
    for value, name in zip(outputs, names, strict=True):
        assert value is not None
        value.name = name
        body.outputs.append(value)
