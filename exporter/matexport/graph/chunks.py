"""A linear recurrence with decay by chunks of matrix products, in ai.onnx operators, from a state to a state.

    S_t = exp(a_t) S_t-1 + k_t v_t^T,    y_t = S_t^T q_t

Shapes: b batch, T length, c chunks, l steps of a chunk, h heads, g groups that share q and k, r = h / g, n state,
p head dim. Source: SSD paper (arXiv 2405.21060), section 6 and listing 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

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
        tail, pads: the steps that fill the last chunk up, and that for `Pad` of (b, T, m); None if it is full.
        causal: (1, 1, 1, 1, l, l), what is added to sums: 0 where j <= i, and minus infinity.
        earlier: (1, 1, 1, c + 1, c + 1), the same.
        last: c, the index of the state after all.
        before: 0 to c - 1.
    """

    length: Size
    count: int | None
    steps: Size
    tail: Size
    pads: ir.Value | None
    causal: ir.Value
    earlier: ir.Value
    last: ir.Value
    before: ir.Value
    shapes: dict[tuple[int, ...], ir.Value] = field(default_factory=dict)


def cut(g: Graph, length: int) -> Chunks:
    """A length that is known."""
    count = min(-(-length // LENGTH), MOST)
    steps = min(length, -(-length // (4 * count)) * 4)
    count = -(-length // steps)
    causal, earlier = (
        g.constant(np.triu(np.full((*[1] * (rank - 2), n, n), -np.inf), 1), "F32")
        for rank, n in ((6, steps), (5, count + 1))
    )
    tail = count * steps - length
    pads = g.constant([0, 0, 0, 0, tail, 0]) if tail else None
    return Chunks(length, count, steps, tail, pads, causal, earlier, g.constant(count), g.constant(np.arange(count)))


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
    last = g.op("Squeeze", count)
    causal, earlier = _triangle(g, g.op("Squeeze", steps), 6), _triangle(g, g.op("Add", last, i64(1)), 5)
    before = g.index(g.op("Range", i64(0), last, i64(1)))
    return Chunks(length, None, steps, tail, pads, causal, earlier, g.index(last), before)


def _triangle(g: Graph, size: ir.Value, rank: int) -> ir.Value:
    """(1, ..., size, size), 0 where the column is not after the row, and minus infinity."""
    i64 = g.constant
    index = g.op("Range", i64(0), size, i64(1))
    columns = g.op("Unsqueeze", index, i64([i for i in range(rank) if i != rank - 1]))
    rows = g.op("Unsqueeze", index, i64([i for i in range(rank) if i != rank - 2]))
    allowed = g.op("LessOrEqual", columns, rows)
    return g.op("Where", allowed, g.constant(0.0, "F32"), g.constant(-math.inf, "F32"))


@dataclass(frozen=True)
class Filling:
    """A length filled up to whole chunks, once for all layers: what is added has no effect, whatever it holds.

    Attributes:
        chunks: of the longer length.
        source: (c l), from where each step is taken.
        mask: (b, c l), false for what was added too.
        back: (T), the steps themselves.
    """

    chunks: Chunks
    source: ir.Value
    mask: ir.Value
    back: ir.Value


def fill(g: Graph, length: ir.Value, mask: ir.Value) -> Filling:
    """Of a length (1) with its mask (b, T), which are known when the model runs."""
    i64, chunks = g.constant, cut_any(g, length)
    steps = g.op("Range", i64(0), g.op("Squeeze", g.op("Add", length, _value(g, chunks.tail))), i64(1))
    source = g.op("Min", steps, g.op("Sub", length, i64([1])))
    filled = g.op("And", g.op("Gather", mask, source, axis=1), g.op("Less", steps, length))
    back = g.index(g.op("Range", i64(0), g.op("Squeeze", length), i64(1)))
    return Filling(replace(chunks, pads=None), g.index(source), filled, back)


def segment_sums(g: Graph, v: ir.Value, rank: int) -> tuple[ir.Value, ir.Value]:
    """Of v (..., k, 1): s_ij = v_j+1 + ... + v_i for j <= i, (..., k, k), and v_0 + ... + v_i.

    A difference of two cumulative sums would cancel: its error grows with the sums, not with s_ij. So v
    is split into a multiple of 1/256, whose sums are exact in fp32 up to 2^16, and a small rest.
    """
    grid, swapped = g.constant(256.0, "F32"), [*range(rank - 2), rank - 1, rank - 2]
    coarse = g.op("Div", g.op("Round", g.op("Mul", v, grid)), grid)
    sums = [g.op("CumSum", part, g.constant(-2)) for part in (coarse, g.op("Sub", v, coarse))]
    segments = (g.op("Sub", part, g.op("Transpose", part, perm=swapped)) for part in sums)
    return g.op("Add", *segments), g.op("Add", *sums)


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
        v = filled(v)
        if not (isinstance(rows, int) and rows == 1):
            v = g.op("Transpose", shaped(v, 0, -1, rows, size), perm=[0, 2, 1, 3])
        return shaped(v, 0, groups, each, -1, l, size)

    Q, K = (chunked(v, groups, 1, state) for v in (query, key))
    V = chunked(shaped(value, 0, 0, -1) if chunks.pads else value, heads, each, head_dim)
    a = g.op("Max", decay, g.constant(LOWEST, "F32"))
    a = shaped(g.op("Transpose", filled(a), perm=[0, 2, 1]), 0, groups, each, -1, l, 1)  # b g r c l 1

    # inside each chunk: sum over j <= i of (q_i . k_j) exp(a_j+1 + ... + a_i) v_j; masked before exp
    Kt = g.op("Transpose", K, perm=[0, 1, 2, 3, 5, 4])  # b g 1 c n l
    sums, so_far = segment_sums(g, a, 6)
    y = g.op("MatMul", g.op("Mul", g.op("MatMul", Q, Kt), g.op("Exp", g.op("Add", sums, chunks.causal))), V)

    final = None
    if past is not None or chunks.count != 1:
        # what each chunk adds to the state by its end
        to_end = g.op("Exp", g.op("CumSum", a, i64(-2), exclusive=1, reverse=1))
        added = shaped(g.op("MatMul", Kt, g.op("Mul", V, to_end)), 0, 0, 0, 0, -1)  # b g r c (n p)
        # the state before chunk i: the one before all, and sum over j < i of what chunk j added, decayed in between
        total = g.op("Pad", g.op("ReduceSum", a, i64([4]), keepdims=0), i64([0, 0, 0, 1, 0, 0, 0, 0, 0, 0]))
        sums, _ = segment_sums(g, g.op("Max", total, g.constant(LOWEST, "F32")), 5)
        between = g.op("Exp", g.op("Add", sums, chunks.earlier))  # b g r c+1 c+1
        if past is None:
            columns = g.op("Slice", between, i64([1]), i64([1 << 60]), i64([4]))
            before = g.op("MatMul", g.op("Gather", columns, chunks.before, axis=3), added)
        else:
            added = g.op("Concat", shaped(past, 0, groups, each, 1, -1), added, axis=3)
            states = g.op("MatMul", between, added)
            before = g.op("Gather", states, chunks.before, axis=3)
            final = shaped(g.op("Gather", states, chunks.last, axis=3), 0, heads, state, head_dim)
        before = shaped(before, 0, 0, 0, 0, state, head_dim)
        y = g.op("Add", y, g.op("Mul", g.op("MatMul", Q, before), g.op("Exp", so_far)))

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
