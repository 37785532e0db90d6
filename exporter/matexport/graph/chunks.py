"""A linear recurrence with decay by chunks of matrix products, in ai.onnx operators, from a state to a state.

    S_t = exp(a_t) S_t-1 + k_t v_t^T,    y_t = S_t^T q_t

Shapes: b batch, T length, c chunks, l steps of a chunk, h heads, g groups that share q and k, r = h / g, n state,
p head dim. Source: SSD paper (arXiv 2405.21060), section 6 and listing 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from matexport.graph.builder import Graph

LENGTH, MOST = 64, 512  # steps of a chunk, while there are not more chunks than that: each is compared with each
LOWEST = -1e4  # of a step's log decay: its exponential is 0, and so is a product with 0, which minus infinity's is not

Size = int | ir.Value  # a Value has shape (1)
Result = tuple[ir.Value, ir.Value | None]


@dataclass(frozen=True)
class Triangle:
    """What is summed and what is kept of squares of steps (i, j): float32, 0 or 1, (1, 1, ..., n, n)."""

    after: ir.Value  # j < i
    until: ir.Value  # j <= i


@dataclass(frozen=True)
class Chunks:
    """How a length is cut, and what depends on that alone: made once for all layers.

    Attributes:
        length, count, steps: T, c and l.
        filled: c l, at least T.
        inside, across: of the steps of a chunk, (1, 1, 1, l, l); of the state before all and the chunks,
            (1, 1, c + 1, c + 1).
        last: c, the index of the state after all.
        before: 0 to c - 1.
    """

    length: Size
    count: Size
    steps: Size
    filled: Size
    inside: Triangle
    across: Triangle
    last: ir.Value
    before: ir.Value
    _shapes: dict[tuple[int, ...], ir.Value] = field(default_factory=dict)

    def shaped(self, g: Graph, v: ir.Value, *sizes: Size) -> ir.Value:
        """A reshaped value; the shape itself is made once."""
        key = tuple(size if isinstance(size, int) else id(size) for size in sizes)
        if key not in self._shapes:
            self._shapes[key] = dims(g, *sizes)
        return g.op("Reshape", v, self._shapes[key])


def cut(g: Graph, length: int) -> Chunks:
    """A length that is known."""
    count = min(-(-length // LENGTH), MOST)
    steps = min(length, -(-length // (4 * count)) * 4)
    count = -(-length // steps)
    inside, across = (
        Triangle(*(g.constant(np.tril(np.ones((*[1] * (rank - 2), n, n)), k), "F32") for k in (-1, 0)))
        for rank, n in ((5, steps), (4, count + 1))
    )
    last, before = g.constant(count), g.constant(np.arange(count))
    return Chunks(length, count, steps, count * steps, inside, across, last, before)


def cut_any(g: Graph, length: ir.Value) -> Chunks:
    """A length (1) that is known when the model runs. Chunks are of equal length, in rows of 16 bytes."""
    i64 = g.constant

    def ceil(a: ir.Value, b: ir.Value) -> ir.Value:
        return g.op("Div", g.op("Sub", g.op("Add", a, b), i64([1])), b)

    count = g.op("Min", ceil(length, i64([LENGTH])), i64([MOST]))
    steps = g.op("Min", length, g.op("Mul", ceil(length, g.op("Mul", count, i64([4]))), i64([4])))
    count = ceil(length, steps)
    inside, across = _triangle(g, steps, 5), _triangle(g, g.op("Add", count, i64([1])), 4)
    before, last = g.index(arange(g, count)), g.index(g.op("Squeeze", count))
    return Chunks(length, count, steps, g.op("Mul", count, steps), inside, across, last, before)


def _triangle(g: Graph, size: ir.Value, rank: int) -> Triangle:
    index = arange(g, size)
    columns, rows = (
        g.op("Unsqueeze", index, g.constant([i for i in range(rank) if i != axis])) for axis in (rank - 1, rank - 2)
    )
    after, until = (
        g.op("Cast", g.op(compare, columns, rows), to=int(ir.DataType.FLOAT)) for compare in ("Less", "LessOrEqual")
    )
    return Triangle(after, until)


@dataclass(frozen=True)
class Filling:
    """A sequence cut into chunks before all layers; what fills up the last one is masked.

    Attributes:
        source: (c, l), from where each step is taken.
        mask: (b, c, l), false for what was added too.
        rows: (b, c, l), each step's row of (b * c * l, m): TensorRT builds a Gather faster than a Reshape.
        back: (b * T), the rows of the steps that were there before.
    """

    chunks: Chunks
    source: ir.Value
    mask: ir.Value
    rows: ir.Value
    back: ir.Value


def fill(g: Graph, batch: ir.Value, length: ir.Value, mask: ir.Value) -> Filling:
    """Of a batch (1) and a length (1) with its mask (b, T), which are known when the model runs."""
    i64, cut = g.constant, cut_any(g, length)

    def scaled(count: Size, by: Size, *axes: int) -> ir.Value:  # 0, by, 2 by, ..., and axes of 1 after it
        return g.op("Unsqueeze", g.op("Mul", arange(g, count), _value(g, by)), i64(axes))

    step = g.op("Add", scaled(cut.count, cut.steps, 1), arange(g, cut.steps))  # (c, l)
    source = g.index(g.op("Min", step, g.op("Sub", length, i64([1]))))
    filled = g.op("And", g.op("Gather", mask, source, axis=1), g.op("Less", step, length))
    rows = g.op("Add", scaled(batch, cut.filled, 1, 2), step)
    back = g.op("Reshape", g.op("Add", scaled(batch, cut.filled, 1), arange(g, length)), i64([-1]))
    return Filling(cut, source, filled, g.index(rows), g.index(back))


def segment_decays(g: Graph, a: ir.Value, triangle: Triangle) -> ir.Value:
    """exp(a_j+1 + ... + a_i), and 1 for j >= i: of a (..., n, 1) -> (..., n, n).

    Each sum is taken by itself: a difference of two cumulative sums would cancel, with an error that grows with them
    and not with what is left.
    """
    return g.op("Exp", g.op("CumSum", g.op("Mul", a, triangle.after), g.constant(-2)))


def linear_attention(
    g: Graph, chunks: Chunks, query: ir.Value, key: ir.Value, value: ir.Value, decay: ir.Value, past: ir.Value | None,
    *, heads: Size, groups: Size, state: Size, head_dim: Size,
) -> Result:  # fmt: skip
    """`chunked_attention` of steps that are not in chunks yet: (b, T, ...) in place of (b, c, l, ...).

    Its value may be (b, T, h * p) too.
    """
    length, filled = chunks.length, chunks.filled
    known = isinstance(filled, int) and isinstance(length, int)
    tail = filled - length if known else g.op("Sub", _value(g, filled), _value(g, length))
    pads, full = dims(g, 0, 0, 0, 0, tail, 0), isinstance(tail, int) and tail == 0

    def chunked(v: ir.Value, *sizes: Size) -> ir.Value:
        # steps with a = 0 and k v^T = 0 at the end change nothing
        return chunks.shaped(g, v if full else g.op("Pad", v, pads), 0, chunks.count, chunks.steps, *sizes)

    if not full:
        value = g.op("Reshape", value, g.constant([0, 0, -1]))
    y, final = chunked_attention(
        g, chunks, chunked(query, -1), chunked(key, -1), chunked(value, heads, head_dim), chunked(decay, heads), past,
        heads=heads, groups=groups, state=state, head_dim=head_dim,
    )  # fmt: skip
    y = chunks.shaped(g, y, 0, filled, heads, head_dim)
    return y if full else g.op("Slice", y, g.constant([0]), dims(g, length), g.constant([1])), final


def chunked_attention(
    g: Graph, chunks: Chunks, query: ir.Value, key: ir.Value, value: ir.Value, decay: ir.Value, past: ir.Value | None,
    *, heads: Size, groups: Size, state: Size, head_dim: Size,
) -> Result:  # fmt: skip
    """The recurrence: query and key are (b, c, l, g * n), value (b, c, l, h, p).

    Args:
        decay: a (b, c, l, h), at most 0.
        past: the state before, (b, h, n, p); None for zeros.
    Returns:
        y (b, c, l, h, p), and the state after (b, h, n, p), or None if there was none before.
    """
    if isinstance(heads, int) and isinstance(groups, int):
        each: Size = heads // groups
    else:
        each = g.op("Div", heads, groups)  # type: ignore[arg-type]
    batch = 0 if groups == 1 else -1  # as it is, or times g: an axis less, and TensorRT builds faster

    def by_head(v: ir.Value, each: Size, size: Size) -> ir.Value:  # (b, c, l, g r, size) -> b*g r c l size
        v = g.op("Transpose", v, perm=[0, 3, 1, 2, 4])
        return chunks.shaped(g, v, batch, each, chunks.count, chunks.steps, size) if batch else v

    Q, K = (by_head(chunks.shaped(g, v, 0, 0, 0, groups, state), 1, state) for v in (query, key))
    decay = g.op("Max", decay, g.constant(LOWEST, "F32"))
    V, a = by_head(value, each, head_dim), by_head(g.op("Unsqueeze", decay, g.constant([4])), each, 1)

    # inside each chunk: sum over j <= i of (q_i . k_j) exp(a_j+1 + ... + a_i) v_j
    Kt = g.op("Transpose", K, perm=[0, 1, 2, 4, 3])  # b*g 1 c n l
    scores = g.op("Mul", g.op("MatMul", Q, Kt), chunks.inside.until)
    y = g.op("MatMul", g.op("Mul", scores, segment_decays(g, a, chunks.inside)), V)

    final = None
    if past is not None or chunks.count != 1:
        # what each chunk adds to the state by its end
        to_end = g.op("Exp", g.op("CumSum", a, g.constant(-2), exclusive=1, reverse=1))
        added = chunks.shaped(g, g.op("MatMul", Kt, g.op("Mul", V, to_end)), 0, 0, 0, -1)  # b*g r c (n p)
        # the state before chunk i: the one before all, and sum over j < i of what chunk j added, decayed in between
        whole = g.op("Pad", g.op("ReduceSum", a, g.constant([3]), keepdims=0), g.constant([0, 0, 1, 0, 0, 0, 0, 0]))
        between = g.op("Mul", segment_decays(g, whole, chunks.across), chunks.across.until)  # b*g r c+1 c+1
        if past is None:
            columns = g.op("Slice", between, g.constant([1]), g.constant([1 << 60]), g.constant([3]))
            before = g.op("MatMul", g.op("Gather", columns, chunks.before, axis=2), added)
        else:
            past = chunks.shaped(g, past, batch, each, 1, _product(g, state, head_dim))
            states = g.op("MatMul", between, g.op("Concat", past, added, axis=2))
            before = g.op("Gather", states, chunks.before, axis=2)
            final = chunks.shaped(g, g.op("Gather", states, chunks.last, axis=2), batch, heads, state, head_dim)
        before = chunks.shaped(g, before, 0, 0, 0, state, head_dim)
        so_far = g.op("Exp", g.op("CumSum", a, g.constant(-2)))
        y = g.op("Add", y, g.op("Mul", g.op("MatMul", Q, before), so_far))
    if batch:
        y = chunks.shaped(g, y, batch, heads, chunks.count, chunks.steps, head_dim)
    return g.op("Transpose", y, perm=[0, 2, 3, 1, 4]), final


def dims(g: Graph, *sizes: Size) -> ir.Value:
    """A shape."""
    if all(isinstance(size, int) for size in sizes):
        return g.constant(sizes)
    return g.op("Concat", *(_value(g, size) for size in sizes), axis=0)


def arange(g: Graph, size: Size) -> ir.Value:
    """0 to size - 1."""
    return g.op("Range", g.constant(0), g.op("Squeeze", _value(g, size)), g.constant(1))


def _product(g: Graph, a: Size, b: Size) -> Size:
    return a * b if isinstance(a, int) and isinstance(b, int) else g.op("Mul", _value(g, a), _value(g, b))


def _value(g: Graph, size: Size) -> ir.Value:
    return g.constant([size]) if isinstance(size, int) else size
