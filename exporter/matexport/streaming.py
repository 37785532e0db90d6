"""The bytes of a view, in blocks of bounded size: memory does not grow with the tensor."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from matexport.checkpoint import Checkpoint, Reader
from matexport.planning import View
from matexport.tensors import numpy_dtype

BLOCK = 8 << 20


def stream(checkpoint: Checkpoint, view: View, *, block: int = BLOCK) -> Iterator[np.ndarray]:
    """Yields the elements of a view in C order, as flat arrays of at most `block` bytes each.

    An array is only valid until the next one is asked for: the buffer is used again.

    Raises:
        CheckpointError: the source ends early or cannot be read.
    """
    tensor = checkpoint.tensors[view.source]
    dtype = numpy_dtype(tensor.dtype)
    with contextlib.closing(checkpoint.open(tensor.file)) as file:
        runs, rows, row_elements = _layout(view)
        if all((stop - start) * dtype.itemsize >= file.direct for start, stop in runs) or len(rows) == 1:
            blocks = _read_runs(file, tensor.start, dtype, runs, rows, max(1, block // dtype.itemsize))
        else:
            blocks = _gather_rows(file, tensor.start, dtype, runs, rows, row_elements, block)
        yield from blocks


def read(checkpoint: Checkpoint, view: View) -> np.ndarray:
    """The whole view in memory, in its shape."""
    flat = np.empty(math.prod(view.shape), numpy_dtype(checkpoint.tensors[view.source].dtype))
    position = 0
    for piece in stream(checkpoint, view):
        flat[position : position + len(piece)] = piece
        position += len(piece)
    return flat.reshape(view.shape)


def stream_transposed(checkpoint: Checkpoint, view: View, *, block: int = 4 * BLOCK) -> Iterator[np.ndarray]:
    """Yields the transpose of a two-dimensional view, in C order, as flat arrays of about `block` bytes each."""
    rows, columns = view.shape
    view = replace(view, shape=view.taken)
    if view.shape[-1] != columns:
        raise ValueError(f"{view.source}: the last axis is a flattened one")
    itemsize = numpy_dtype(checkpoint.tensors[view.source].dtype).itemsize
    step = max(1, block // (rows * itemsize))
    for start in range(0, columns, step):
        strip = read(checkpoint, view.restrict(-1, start, min(columns, start + step)))
        yield np.ascontiguousarray(strip.reshape(rows, -1).T).reshape(-1)


def _layout(view: View) -> tuple[list[tuple[int, int]], np.ndarray, int]:
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


def _read_runs(
    file: Reader, start: int, dtype: np.dtype, runs: list[tuple[int, int]], rows: np.ndarray, size: int
) -> Iterator[np.ndarray]:
    """Reads exactly the runs, many of them into one buffer of `size` elements."""
    total = len(rows) * sum(end - begin for begin, end in runs)
    buffer = np.empty(min(size, total), dtype)
    raw = memoryview(buffer.view(np.uint8).data)
    item, filled = dtype.itemsize, 0
    for row in rows.tolist():
        for begin, end in runs:
            position = begin
            while position < end:
                count = min(end - position, len(buffer) - filled)
                file.read_into(raw[filled * item : (filled + count) * item], start + (row + position) * item)
                filled, position = filled + count, position + count
                if filled == len(buffer):
                    yield buffer
                    filled = 0
    if filled:
        yield buffer[:filled]


def _gather_rows(
    file: Reader, start: int, dtype: np.dtype, runs: list[tuple[int, int]], rows: np.ndarray, length: int, block: int
) -> Iterator[np.ndarray]:
    """Reads neighbouring rows from their first run to their last one and copies the runs out of them."""
    first, last = min(begin for begin, _ in runs), max(end for _, end in runs)
    width = sum(end - begin for begin, end in runs)
    step = max(1, block // (length * dtype.itemsize))
    buffer, out = np.empty(step * length, dtype), np.empty((step, width), dtype)
    index = 0
    while index < len(rows):
        count = 1
        while count < step and index + count < len(rows) and rows[index + count] == rows[index] + count * length:
            count += 1
        span = buffer[: (count - 1) * length + last - first]
        file.read_into(memoryview(span.view(np.uint8).data), start + (int(rows[index]) + first) * dtype.itemsize)
        position = 0
        for begin, end in runs:
            strided = np.lib.stride_tricks.as_strided(
                span[begin - first :], (count, end - begin), (length * dtype.itemsize, dtype.itemsize)
            )
            out[:count, position : position + end - begin] = strided
            position += end - begin
        yield out[:count].reshape(-1)
        index += count
