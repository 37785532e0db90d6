"""Where the weights of ONNX graphs lie in a file, and their bytes."""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from matexport.checkpoint import Checkpoint
from matexport.errors import CheckpointError, UsageError
from matexport.graph.builder import Graph, Weight
from matexport.graph.encoding import Encoding
from matexport.planning import Ranges, View
from matexport.streaming import Pool, read, stream, stream_transposed
from matexport.writer import AHEAD

ALIGN, ALIGN_LARGE, LARGE = 64, 4096, 1 << 16  # large weights start on a page, so that they can be mapped
ROWS = 1 << 18  # elements that are quantised at once


@dataclass(frozen=True)
class Layout:
    """One file for the weights of some graphs.

    Attributes:
        stored: what the file holds and at which offset, in order.
        offsets: for each graph, where each weight starts, by name.
        size: bytes of the file.
    """

    stored: tuple[tuple[Weight, int], ...]
    offsets: tuple[dict[str, int], ...]
    size: int


def lay_out(graphs: Sequence[Graph]) -> Layout:
    """Places every weight once: what is a range of another one's bytes is that range."""
    alike = defaultdict(list)  # same source, same orientation
    for graph in graphs:
        for weight in graph.weights.values():
            view = weight.tensor.view
            alike[view.source, view.view_shape, weight.dtype, weight.transposed, weight.encoding].append(weight)
    inside: dict[int, tuple[Weight, int]] = {}  # id of a weight -> the stored one that holds it, bytes from its start
    for group in alike.values():
        kept: list[Weight] = []
        for weight in sorted(group, key=lambda weight: -weight.nbytes):
            found = ((large, offset_in(weight, large)) for large in kept)
            large, offset = next(((w, n) for w, n in found if n is not None), (weight, 0))
            inside[id(weight)] = large, offset
            if large is weight:
                kept.append(weight)
    stored: dict[int, tuple[Weight, int]] = {}
    offsets, end = [], 0
    for graph in graphs:
        own = {}
        for name, weight in graph.weights.items():
            large, offset = inside[id(weight)]
            if id(large) not in stored:
                align = ALIGN_LARGE if large.nbytes >= LARGE else ALIGN
                begin = -(-end // align) * align
                stored[id(large)] = large, begin
                end = begin + large.nbytes
            own[name] = stored[id(large)][1] + offset
        offsets.append(own)
    return Layout(tuple(stored.values()), tuple(offsets), end)


def split(layout: Layout, limit: int | None) -> list[Layout]:
    """The layout of one graph in several files, none larger than `limit` bytes. Raises UsageError if one weight is."""
    if limit is None or layout.size <= limit:
        return [layout]
    parts: list[list[tuple[Weight, int]]] = []
    for weight, offset in layout.stored:
        if weight.nbytes > limit:
            what = f"one weight has {weight.nbytes:,} bytes, and this target takes files of {limit:,}"
            fix = "store it in fewer bytes: --dtype float16, or --quantize int4-block"
            raise UsageError(what, where=str(weight.value.name), fix=fix)
        if not parts or offset + weight.nbytes - parts[-1][0][1] > limit:
            parts.append([])
        parts[-1].append((weight, offset))
    found = []
    for part in parts:
        first, (last, start) = part[0][1], part[-1]
        end = start + last.nbytes
        offsets = {name: offset - first for name, offset in layout.offsets[0].items() if first <= offset < end}
        found.append(Layout(tuple((weight, offset - first) for weight, offset in part), (offsets,), end - first))
    return found


def offset_in(small: Weight, large: Weight) -> int | None:
    """Where the bytes of one weight begin in those of another of the same source; None if they do not lie there."""
    a, b = small.tensor.view, large.tensor.view
    if not a.ranges or a.ranges == b.ranges:
        return 0
    outer = len(a.ranges) - 1 if _columns_first(small) else 0
    if a.ranges[:outer] != b.ranges[:outer] or a.ranges[outer + 1 :] != b.ranges[outer + 1 :]:
        return None
    wanted, there = _indices(a.ranges[outer]), _indices(b.ranges[outer])
    for start in np.flatnonzero(there == wanted[0]).tolist():
        if np.array_equal(there[start : start + len(wanted)], wanted):
            return int(start * (small.nbytes // len(wanted)))
    return None


def _indices(ranges: Ranges) -> np.ndarray:
    return np.concatenate([np.arange(start, stop) for start, stop in ranges])


def _columns_first(weight: Weight) -> bool:
    encoding = weight.encoding
    return weight.transposed or (encoding is not None and (encoding.method, encoding.part) == ("int8", "codes"))


def weight_blocks(checkpoint: Checkpoint, layout: Layout) -> Iterator[Any]:
    """The bytes of the file."""
    position, pool = 0, Pool(AHEAD + 1)
    for weight, offset in layout.stored:
        if offset > position:
            yield bytes(offset - position)
        for block in stored_blocks(checkpoint, weight, pool):
            yield block.view(np.uint8)
        position = offset + weight.nbytes


def stored_blocks(checkpoint: Checkpoint, weight: Weight, pool: Pool | None = None) -> Iterator[np.ndarray]:
    """One weight as it is stored, in flat arrays of bounded size.

    Raises:
        CheckpointError: a value that float16 cannot hold.
    """
    view, dtype = weight.tensor.view, weight.numpy
    if weight.encoding is not None:
        yield from _encoded(checkpoint, view, weight.encoding)
        return
    for block in stream_transposed(checkpoint, view) if weight.transposed else stream(checkpoint, view, pool=pool):
        with np.errstate(over="ignore"):
            cast = block.astype(dtype, copy=False)
        if weight.dtype == "F16" and not np.isfinite(cast).all():
            fix = "store it as bfloat16 or float32 (--dtype)"
            where = str(checkpoint.tensors[view.source].file)
            raise CheckpointError(f"tensor {view.source!r} holds a value beyond float16", where=where, fix=fix)
        yield cast


def _encoded(checkpoint: Checkpoint, view: View, encoding: Encoding) -> Iterator[np.ndarray]:
    """A matrix in fewer bits, some rows at a time, on all processors; `int8` codes are stored by columns."""
    largest = 0.0
    if encoding.method == "nvfp4":  # its scales are relative to the whole matrix
        largest = max(float(np.abs(rows).max()) for rows in _rows(checkpoint, view))
        if encoding.part == "scale":
            yield encoding.encode(np.zeros((1, 1), np.float32), largest)
            return
    rows = _in_threads(partial(encoding.encode, largest=largest), _rows(checkpoint, view))
    if (encoding.method, encoding.part) == ("int8", "codes"):
        codes = np.concatenate(list(rows))  # a quarter of the matrix
        yield np.ascontiguousarray(codes.T).reshape(-1)
    else:
        yield from (block.reshape(-1) for block in rows)


def _in_threads(work: Callable[[np.ndarray], np.ndarray], items: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """What `work` gives for each item, in order, a few items ahead."""
    count = os.cpu_count() or 1
    ahead: deque[Future[np.ndarray]] = deque()
    with ThreadPoolExecutor(count) as pool:
        for item in items:
            ahead.append(pool.submit(work, item))
            if len(ahead) > 2 * count:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _rows(checkpoint: Checkpoint, view: View) -> Iterator[np.ndarray]:
    count, width = view.shape
    view = replace(view, shape=view.taken)
    step = max(1, ROWS // width)
    for start in range(0, count, step):
        rows = read(checkpoint, view.restrict(0, (start, min(count, start + step))))
        yield rows.reshape(-1, width).astype(np.float32, copy=False)
