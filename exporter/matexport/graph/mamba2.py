"""The ops of a Mamba-2 mixer in ai.onnx operators alone, for a fixed length and any batch size.

Shapes: b batch, T length, c chunks, q chunk length, h heads, g groups, n state, p head dim, w = h * p.
Equations: SSD paper (arXiv 2405.21060), section 6 and listing 1.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from matexport.graph.builder import Graph

CHUNK = 64


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


def segment_sums(g: Graph, v: ir.Value, *, exclusive: bool = False) -> ir.Value:
    """s_ij = v_j+1 + ... + v_i (without v_i if `exclusive`) along the last axis of v, for j <= i.

    A difference of two cumulative sums would cancel: its error grows with the sums, not with s_ij. So v
    is split into a multiple of 1/256, whose sums are exact in fp32 up to 2^16, and a small rest.
    """
    grid = g.constant(256.0, "F32")
    coarse = g.op("Div", g.op("Round", g.op("Mul", v, grid)), grid)
    parts = []
    for part in (coarse, g.op("Sub", v, coarse)):
        columns = g.op("CumSum", part, g.constant(-1))
        rows = g.op("CumSum", part, g.constant(-1), exclusive=1) if exclusive else columns
        parts.append(
            g.op("Sub", g.op("Unsqueeze", rows, g.constant([-1])), g.op("Unsqueeze", columns, g.constant([-2])))
        )
    return g.op("Add", *parts)


def scan(
    g: Graph, x: ir.Value, dt: ir.Value, A: ir.Value, B: ir.Value, C: ir.Value, D: ir.Value,
    *, length: int, heads: int, head_dim: int, groups: int, state: int, chunk: int = CHUNK,
) -> ir.Value:  # fmt: skip
    """The Mamba-2 scan from a zero state, by chunks of matrix products.

    Args:
        x: (b, T, w); dt: (b, T, h) after softplus; A, D: (h); B, C: (b, T, g * n).
    Returns:
        y (b, T, w).
    """
    q = min(chunk, length)
    c = -(-length // q)
    i64 = g.constant

    def reshape(v: ir.Value, *shape: int) -> ir.Value:
        return g.op("Reshape", v, i64(shape))

    def axis(v: ir.Value, at: int) -> ir.Value:
        return g.op("Unsqueeze", v, i64([at]))

    def full_chunks(v: ir.Value) -> ir.Value:  # steps with dt = 0 at the end change nothing
        tail = c * q - length
        return g.op("Pad", v, i64([0, 0, 0, 0, tail, 0])) if tail else v

    def chunked(v: ir.Value, parts: int, size: int) -> ir.Value:  # (b, T, parts * size) -> (b, parts, c, q, size)
        v = g.op("Transpose", reshape(full_chunks(v), 0, c * q, parts, size), perm=[0, 2, 1, 3])
        return reshape(v, 0, parts, c, q, size)

    def per_head(v: ir.Value) -> ir.Value:  # (b, g, ...) -> (b, h, ...), or what broadcasts to it
        return (
            v if groups in (1, heads) else g.op("Gather", v, i64(np.repeat(np.arange(groups), heads // groups)), axis=1)
        )

    by_head = reshape(x, 0, 0, heads, head_dim)
    scaled = reshape(g.op("Mul", by_head, axis(dt, -1)), 0, 0, heads * head_dim)
    X = chunked(scaled, heads, head_dim)  # b h c q p
    B, C = chunked(B, groups, state), chunked(C, groups, state)  # b g c q n
    # log of each step's decay, <= 0; below -128 it is 0 in fp32 anyway, and longer sums stay exact
    a = g.op("Max", g.op("Mul", dt, A), g.constant(-128.0, "F32"))
    a = reshape(g.op("Transpose", full_chunks(a), perm=[0, 2, 1]), 0, heads, c, q)

    # inside each chunk: sum over j <= i of (C_i . B_j) exp(a_j+1 + ... + a_i) dt_j x_j; masked before exp
    causal = g.constant(np.tril(np.ones((q, q), bool)), "BOOL")
    decay = g.op("Exp", g.op("Where", causal, segment_sums(g, a), g.constant(-math.inf, "F32")))
    Bt = g.op("Transpose", B, perm=[0, 1, 2, 4, 3])  # b g c n q
    scores = per_head(g.op("MatMul", C, Bt))  # b h c q q
    y = g.op("MatMul", g.op("Mul", scores, decay), X)  # b h c q p

    if c > 1:
        # what each chunk adds to the state by its end: (b, h, c, n * p)
        to_end = axis(g.op("Gather", decay, i64(q - 1), axis=3), 4)
        added = reshape(g.op("MatMul", per_head(Bt), g.op("Mul", X, to_end)), 0, 0, 0, state * head_dim)
        # the state before chunk i: sum over j < i of exp(log decay of the chunks between j and i) added_j
        total = g.op("Max", g.op("ReduceSum", a, i64([3]), keepdims=0), g.constant(-128.0, "F32"))  # (b, h, c)
        before = g.constant(np.tril(np.ones((c, c), bool), -1), "BOOL")
        between = g.op("Where", before, segment_sums(g, total, exclusive=True), g.constant(-math.inf, "F32"))
        states = reshape(g.op("MatMul", g.op("Exp", between), added), 0, 0, 0, state, head_dim)
        y = g.op(
            "Add", y, g.op("Mul", g.op("MatMul", per_head(C), states), axis(g.op("Exp", g.op("CumSum", a, i64(3))), 4))
        )

    y = g.op("Transpose", reshape(y, 0, heads, c * q, head_dim), perm=[0, 2, 1, 3])
    if c * q > length:
        y = g.op("Slice", y, i64([0]), i64([length]), i64([1]))
    y = g.op("Add", y, g.op("Mul", by_head, axis(D, -1)))
    return reshape(y, 0, 0, heads * head_dim)


def last_output(
    g: Graph, x: ir.Value, dt: ir.Value, A: ir.Value, B: ir.Value, C: ir.Value, D: ir.Value,
    *, heads: int, head_dim: int, groups: int, state: int,
) -> ir.Value:  # fmt: skip
    """What `scan` gives for the last step alone: sum over j of (C_T . B_j) exp(a_j+1 + ... + a_T) dt_j x_j, and D x_T.

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
