"""A linear recurrence with decay by chunks of matrix products, in ai.onnx operators, from a state to a state.

    S_t = exp(a_t) S_t-1 + k_t v_t^T,    y_t = S_t^T q_t

Shapes: b batch, T length, c chunks, l steps of a chunk, h heads, g groups that share q and k, r = h / g, n state,
p head dim. Source: SSD paper (arXiv 2405.21060), section 6 and listing 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from matexport.graph.builder import Graph

LENGTH, MOST = 64, 512  # steps of a chunk, while there are not more chunks than that
LOWEST = -128.0  # of a step's log decay: it is 0 in float32 anyway, and sums of 512 are exact (see `segment_sums`)

Size = int | ir.Value  # a Value has shape (1)


@dataclass(frozen=True)
class Chunks:
    """How a length is cut, and what depends on that alone: made once for all layers.

    Attributes:
        count, steps: c and l; c is known only if it is a number.
        pads: what fills the last chunk of (b, T, m) up with zeros; None if it is full.
        causal: (l, l), true where j <= i.
        earlier: (c + 1, c + 1), the same.
    """

    length: Size
    count: int | None
    steps: Size
    pads: ir.Value | None
    causal: ir.Value
    earlier: ir.Value
    shapes: dict[tuple[int, ...], ir.Value] = field(default_factory=dict)


def cut(g: Graph, length: int) -> Chunks:
    """A length that is known."""
    count = min(-(-length // LENGTH), MOST)
    steps = min(length, -(-length // (4 * count)) * 4)
    count = -(-length // steps)
    causal, earlier = (g.constant(np.tril(np.ones((n, n), bool)), "BOOL") for n in (steps, count + 1))
    pads = g.constant([0, 0, 0, 0, count * steps - length, 0]) if length % steps else None
    return Chunks(length, count, steps, pads, causal, earlier)


def cut_any(g: Graph, length: ir.Value) -> Chunks:
    """A length (1) that is known when the model runs. Chunks are of equal length, in rows of 16 bytes."""
    i64 = g.constant

    def ceil(a: ir.Value, b: ir.Value) -> ir.Value:
        return g.op("Div", g.op("Sub", g.op("Add", a, b), i64([1])), b)

    count = g.op("Min", ceil(length, i64([LENGTH])), i64([MOST]))
    steps = g.op("Min", length, g.op("Mul", ceil(length, g.op("Mul", count, i64([4]))), i64([4])))
    count = ceil(length, steps)
    tail = g.op("Sub", g.op("Mul", count, steps), length)
    pads = g.op("Concat", i64([0] * 4), tail, i64([0]), axis=0)
    causal, earlier = (_triangle(g, n) for n in (steps, g.op("Add", count, i64([1]))))
    return Chunks(length, None, steps, pads, causal, earlier)


def _triangle(g: Graph, size: ir.Value) -> ir.Value:
    """(size, size), true where the column is not after the row."""
    i64 = g.constant
    index = g.op("Range", i64(0), g.op("Squeeze", size), i64(1))
    return g.op("LessOrEqual", g.op("Unsqueeze", index, i64([0])), g.op("Unsqueeze", index, i64([1])))


def segment_sums(g: Graph, v: ir.Value) -> ir.Value:
    """s_ij = v_j+1 + ... + v_i along the last axis of v, for j <= i.

    A difference of two cumulative sums would cancel: its error grows with the sums, not with s_ij. So v
    is split into a multiple of 1/256, whose sums are exact in fp32 up to 2^16, and a small rest.
    """
    grid = g.constant(256.0, "F32")
    coarse = g.op("Div", g.op("Round", g.op("Mul", v, grid)), grid)
    parts = []
    for part in (coarse, g.op("Sub", v, coarse)):
        sums = g.op("CumSum", part, g.constant(-1))
        parts.append(g.op("Sub", g.op("Unsqueeze", sums, g.constant([-1])), g.op("Unsqueeze", sums, g.constant([-2]))))
    return g.op("Add", *parts)


def linear_attention(
    g: Graph, chunks: Chunks, query: ir.Value, key: ir.Value, value: ir.Value, decay: ir.Value, past: ir.Value | None,
    *, heads: Size, groups: Size, state: Size, head_dim: Size,
) -> tuple[ir.Value, ir.Value | None]:  # fmt: skip
    """The recurrence: query and key are (b, T, g * n), value (b, T, h * p) or (b, T, h, p).

    Args:
        decay: a (b, T, h), at most 0.
        past: the state before, (b, h, n, p); None for zeros.
    Returns:
        y (b, T, h, p), and the state after (b, h, n, p), or None if there was none before.
    """
    i64 = g.constant
    l = chunks.steps
    if isinstance(heads, int) and isinstance(groups, int):
        each: Size = heads // groups
    else:
        each = g.op("Div", heads, groups)  # type: ignore[arg-type]

    def shaped(v: ir.Value, *sizes: Size) -> ir.Value:
        key = tuple(size if isinstance(size, int) else id(size) for size in sizes)
        if key not in chunks.shapes:
            chunks.shapes[key] = dims(g, *sizes)
        return g.op("Reshape", v, chunks.shapes[key])

    def filled(v: ir.Value) -> ir.Value:  # steps with a = 0 and k v^T = 0 at the end change nothing
        return v if chunks.pads is None else g.op("Pad", v, chunks.pads)

    def chunked(v: ir.Value, rows: Size, each: Size, size: Size) -> ir.Value:  # (b, T, rows * size) -> b g r c l size
        v = g.op("Transpose", shaped(filled(v), 0, -1, rows, size), perm=[0, 2, 1, 3])
        return shaped(v, 0, groups, each, -1, l, size)

    def weights(triangle: ir.Value, steps: ir.Value) -> ir.Value:  # masked before exp
        sums = g.op("Where", triangle, segment_sums(g, steps), g.constant(-math.inf, "F32"))
        return g.op("Exp", sums)

    def part(v: ir.Value, axis: int, start: int, end: int) -> ir.Value:
        return g.op("Slice", v, i64([start]), i64([end]), i64([axis]))

    Q, K = (chunked(v, groups, 1, state) for v in (query, key))
    V = chunked(shaped(value, 0, 0, -1), heads, each, head_dim)
    a = g.op("Max", decay, g.constant(LOWEST, "F32"))
    a = shaped(g.op("Transpose", filled(a), perm=[0, 2, 1]), 0, groups, each, -1, l)  # b g r c l

    # inside each chunk: sum over j <= i of (q_i . k_j) exp(a_j+1 + ... + a_i) v_j
    Kt = g.op("Transpose", K, perm=[0, 1, 2, 3, 5, 4])  # b g 1 c n l
    y = g.op("MatMul", g.op("Mul", g.op("MatMul", Q, Kt), weights(chunks.causal, a)), V)

    final = None
    if past is not None or chunks.count != 1:
        # what each chunk adds to the state by its end
        to_end = g.op("Exp", g.op("CumSum", a, i64(-1), exclusive=1, reverse=1))
        added = g.op("MatMul", Kt, g.op("Mul", V, g.op("Unsqueeze", to_end, i64([-1]))))
        added = shaped(added, 0, 0, 0, 0, -1)  # b g r c (n p)
        # the state before chunk i: the one before all, and sum over j < i of what chunk j added, decayed in between
        total = g.op("Pad", g.op("ReduceSum", a, i64([-1]), keepdims=0), i64([0, 0, 0, 1, 0, 0, 0, 0]))
        between = weights(chunks.earlier, g.op("Max", total, g.constant(LOWEST, "F32")))  # b g r c+1 c+1
        if past is None:
            before = g.op("MatMul", part(part(between, 3, 0, -1), 4, 1, 1 << 60), added)
        else:
            added = g.op("Concat", shaped(past, 0, groups, each, 1, -1), added, axis=3)
            states = g.op("MatMul", between, added)
            before = part(states, 3, 0, -1)
            final = shaped(part(states, 3, -1, 1 << 60), 0, heads, state, head_dim)
        from_start = g.op("Unsqueeze", g.op("Exp", g.op("CumSum", a, i64(-1))), i64([-1]))
        before = shaped(before, 0, 0, 0, 0, state, head_dim)
        y = g.op("Add", y, g.op("Mul", g.op("MatMul", Q, before), from_start))

    y = g.op("Transpose", shaped(y, 0, heads, -1, head_dim), perm=[0, 2, 1, 3])
    if chunks.pads is not None:
        y = g.op("Slice", y, i64([0]), dims(g, chunks.length), i64([1]))
    return y, final


def dims(g: Graph, *sizes: Size) -> ir.Value:
    """A shape."""
    if all(isinstance(size, int) for size in sizes):
        return g.constant(sizes)
    return g.op("Concat", *(_value(g, size) for size in sizes), axis=0)


def _value(g: Graph, size: Size) -> ir.Value:
    return g.constant([size]) if isinstance(size, int) else size
