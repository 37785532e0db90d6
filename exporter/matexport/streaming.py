"""The bytes of a view, in blocks of bounded size: memory does not grow with the tensor."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from matexport.checkpoint import Checkpoint, Reader
from matexport.planning import View
from matexport.tensors import numpy_dtype

BLOCK = 1 << 20  # what is read is checked, hashed and written while it is in the processor's cache
REMOTE_BLOCK = 8 << 20  # one request each
WINDOW = 8 << 20  # what is asked for at once

Run = tuple[int, int]


class Pool:
    """`count` buffers of `block` bytes, each used again once the others have been.

    One is taken for each array that is yielded: an array is valid until `count` more have been.
    """

    def __init__(self, count: int, block: int = BLOCK):
        self.block = block
        self._buffers = itertools.cycle([np.empty(block, np.uint8) for _ in range(count)])

    def take(self, dtype: np.dtype) -> np.ndarray:
        """The next buffer, as elements of a type."""
        return next(self._buffers)[: self.block // dtype.itemsize * dtype.itemsize].view(dtype)


def stream(
    checkpoint: Checkpoint, view: View, *, start: int = 0, block: int = BLOCK, pool: Pool | None = None
) -> Iterator[np.ndarray]:
    """Yields the elements of a view in C order, as flat arrays of at most `block` bytes each.

    Args:
        start: number of leading elements to leave out.
        pool: by default of one buffer of `block` bytes, so that an array is valid until the next is asked for.

    Raises:
        CheckpointError: the source ends early or cannot be read.
    """
    tensor = checkpoint.tensors[view.source]
    dtype = numpy_dtype(tensor.dtype)
    runs, rows, length = _layout(view)
    width = sum(stop - begin for begin, stop in runs)
    if start >= width * len(rows):
        return
    if pool is None:
        pool = Pool(1, max(min(block, width * len(rows) * dtype.itemsize), dtype.itemsize))
    first, inside = divmod(start, width)
    with contextlib.closing(checkpoint.open(tensor.file)) as file:
        if inside:  # what is left of the row in which it starts
            yield from _read_runs(file, tensor.start, _after(runs, inside), rows[first : first + 1], pool, dtype)
            first += 1
        if first == len(rows):
            return
        long = all((stop - begin) * dtype.itemsize >= file.direct for begin, stop in runs)
        if long or len(rows) == 1 or max(length, width) * dtype.itemsize > pool.block:
            yield from _read_runs(file, tensor.start, runs, rows[first:], pool, dtype)
        else:
            yield from _gather_rows(file, tensor.start, runs, rows[first:], length, pool, dtype)


def read(checkpoint: Checkpoint, view: View) -> np.ndarray:
    """The whole view in memory, in its shape."""
    flat = np.empty(math.prod(view.shape), numpy_dtype(checkpoint.tensors[view.source].dtype))
    position = 0
    for piece in stream(checkpoint, view):
        flat[position : position + len(piece)] = piece
        position += len(piece)
    return flat.reshape(view.shape)


def stream_transposed(checkpoint: Checkpoint, view: View, *, block: int = 32 * BLOCK) -> Iterator[np.ndarray]:
    """Yields the transpose of a two-dimensional view, in C order, as flat arrays of about `block` bytes each."""
    rows, columns = view.shape
    view = replace(view, shape=view.taken)
    if view.shape[-1] != columns:
        raise ValueError(f"{view.source}: the last axis is a flattened one")
    itemsize = numpy_dtype(checkpoint.tensors[view.source].dtype).itemsize
    step = max(1, block // (rows * itemsize))
    for start in range(0, columns, step):
        strip = read(checkpoint, view.restrict(-1, (start, min(columns, start + step))))
        yield np.ascontiguousarray(strip.reshape(rows, -1).T).reshape(-1)


def _layout(view: View) -> tuple[list[Run], np.ndarray, int]:
    """A view as runs of elements inside rows: the runs of one row, the first element of each row, the row's length."""
    axis = len(view.view_shape) - 1
    inner = 1
    while axis >= 0 and view.ranges[axis] == ((0, view.view_shape[axis]),):
        inner *= view.view_shape[axis]
        axis -= 1
    if axis < 0:  # everything, or a scalar
        return [(0, inner)], np.zeros(1, np.int64), inner
    runs = [(start * inner, stop * inner) for start, stop in view.ranges[axis]]
    length = view.view_shape[axis] * inner
    rows, stride = np.zeros(1, np.int64), length
    for i in range(axis - 1, -1, -1):
        index = np.concatenate([np.arange(start, stop) for start, stop in view.ranges[i]] or [np.arange(0)])
        rows = (index[:, None] * stride + rows[None, :]).reshape(-1)
        stride *= view.view_shape[i]
    return runs, rows, length


def _after(runs: list[Run], count: int) -> list[Run]:
    """The runs without their first `count` elements."""
    found = []
    for begin, end in runs:
        taken = min(count, end - begin)
        count -= taken
        if begin + taken < end:
            found.append((begin + taken, end))
    return found


def _read_runs(
    file: Reader, start: int, runs: list[Run], rows: np.ndarray, pool: Pool, dtype: np.dtype
) -> Iterator[np.ndarray]:
    """Reads each run straight to its place."""
    item, filled = dtype.itemsize, 0
    ahead, asked = _spans(start, runs, rows, item), 0  # asked for, and not read yet
    for offset, length in _spans(start, runs, rows, item):
        if asked <= 0:
            spans = list(_first(ahead, WINDOW))
            file.will_need(spans)
            asked = sum(size for _, size in spans)
        asked -= length
        while length:
            if not filled:  # not sooner: a buffer that is taken and not yielded would come round too early
                buffer = pool.take(dtype)
                raw = memoryview(buffer.view(np.uint8).data)
            count = min(length, len(raw) - filled)
            file.read_into(raw[filled : filled + count], offset)
            filled, offset, length = filled + count, offset + count, length - count
            if filled == len(raw):
                yield buffer
                filled = 0
    if filled:
        yield buffer[: filled // item]


def _spans(start: int, runs: list[Run], rows: np.ndarray, item: int) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of every run, long ones in parts."""
    for row in rows.tolist():
        for begin, end in runs:
            offset, stop = start + (row + begin) * item, start + (row + end) * item
            while offset < stop:
                length = min(WINDOW, stop - offset)
                yield offset, length
                offset += length


def _first(spans: Iterator[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    """The next spans, of `size` bytes together or a little more."""
    while size > 0 and (span := next(spans, None)):
        size -= span[1]
        yield span


def _gather_rows(
    file: Reader, start: int, runs: list[Run], rows: np.ndarray, length: int, pool: Pool, dtype: np.dtype
) -> Iterator[np.ndarray]:
    """Reads neighbouring rows from their first run to their last one and copies the runs out of them."""
    first, last = min(begin for begin, _ in runs), max(end for _, end in runs)
    width = sum(end - begin for begin, end in runs)
    item, step = dtype.itemsize, max(1, pool.block // (max(length, width) * dtype.itemsize))
    span = np.empty((step, length * item), np.uint8)
    jumps = np.flatnonzero(np.diff(rows) != length) + 1  # where the next row is not the neighbour
    for group in np.split(rows, jumps):
        for index in range(0, len(group), step):
            count = min(step, len(group) - index)
            size = ((count - 1) * length + last - first) * item
            target = memoryview(span.reshape(-1)[first * item : first * item + size].data)
            ahead = int(group[min(index + count, len(group) - 1)]) + first
            file.will_need([(start + ahead * item, size)])
            file.read_into(target, start + (int(group[index]) + first) * item)
            out = pool.take(dtype)[: count * width]
            block = out.view(np.uint8).reshape(count, width * item)
            position = 0
            for begin, end in runs:
                stop = position + (end - begin) * item
                block[:, position:stop] = span[:count, begin * item : end * item]
                position = stop
            yield out
