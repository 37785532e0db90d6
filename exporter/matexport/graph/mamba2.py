"""Parts of a Mamba-2 mixer in ai.onnx operators alone, from a zero state.

Shapes: b batch, T length, h heads, g groups, n state, p head dim, w = h * p.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from matexport.graph.builder import Graph


def silu(g: Graph, x: ir.Value) -> ir.Value:
    """x * sigmoid(x)."""
    return g.op("Mul", x, g.op("Sigmoid", x))


def softplus(g: Graph, dt_raw: ir.Value, dt_bias: ir.Value, limit: tuple[float, float]) -> ir.Value:
    """dt, the length of each step: softplus(dt_raw + dt_bias), clamped to `limit`."""
    dt = g.op("Softplus", g.op("Add", dt_raw, dt_bias))
    if limit != (0.0, math.inf):
        dt = g.op("Clip", dt, g.constant(limit[0], "F32"), g.constant(limit[1], "F32"))
    return dt


def causal_conv1d(g: Graph, x: ir.Value, weight: ir.Value, bias: ir.Value, channels: int, kernel: int) -> ir.Value:
    """Depthwise causal convolution and SiLU: x (b, T, channels), weight (channels, 1, kernel) -> (b, T, channels)."""
    x = g.op("Transpose", x, perm=[0, 2, 1])
    x = g.op("Conv", x, weight, bias, group=channels, kernel_shape=[kernel], pads=[kernel - 1, 0])
    return g.op("Transpose", silu(g, x), perm=[0, 2, 1])


def last_output(
    g: Graph, x: ir.Value, dt: ir.Value, A: ir.Value, B: ir.Value, C: ir.Value, D: ir.Value,
    *, heads: int, head_dim: int, groups: int, state: int,
) -> ir.Value:  # fmt: skip
    """The last step of the scan alone: sum over j of (C_T . B_j) exp(a_j+1 + ... + a_T) dt_j x_j, and D x_T.

    One query on T keys: the state, N times as large as y, is never written down.

    Args:
        x: (b, T, w); dt: (b, T, h) after softplus; A, D: (h); B: (b, T, g * n); C: (b, 1, g * n).
    Returns:
        y (b, 1, w).
    """
    i64 = g.constant
    keys = g.op("Transpose", g.op("Reshape", B, i64([0, 0, groups, state])), perm=[0, 2, 3, 1])  # b g n T
    scores = g.op("MatMul", g.op("Reshape", C, i64([0, groups, 1, state])), keys)  # b g 1 T
    to_end = g.op("Exp", g.op("CumSum", g.op("Mul", dt, A), i64(1), exclusive=1, reverse=1))  # b T h
    weights = g.op("Transpose", g.op("Mul", to_end, dt), perm=[0, 2, 1])
    weights = g.op("Mul", g.op("Reshape", weights, i64([0, groups, heads // groups, -1])), scores)
    by_head = g.op("Transpose", g.op("Reshape", x, i64([0, 0, heads, head_dim])), perm=[0, 2, 1, 3])  # b h T p
    y = g.op("MatMul", g.op("Reshape", weights, i64([0, heads, 1, -1])), by_head)  # b h 1 p
    last = g.op("Slice", by_head, i64([-1]), i64([1 << 60]), i64([2]))
    y = g.op("Add", y, g.op("Mul", last, g.op("Unsqueeze", D, i64([1, 2]))))
    return g.op("Reshape", y, i64([0, 1, heads * head_dim]))
