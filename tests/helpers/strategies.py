"""Rows and views that several tests draw from."""

from __future__ import annotations

from hypothesis import strategies as st

from matexport.dims import Dims
from matexport.planning import View, merge
from matexport.slice_table import Row


@st.composite
def ranges(draw: st.DrawFn, length: int) -> tuple[tuple[int, int], ...]:
    """One to three non-empty ranges, in any order, overlapping or not."""
    found = []
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, length - 1))
        found.append((start, draw(st.integers(start + 1, length))))
    return merge(found)


@st.composite
def views(draw: st.DrawFn, shape: tuple[int, ...], source: str = "t") -> View:
    taken_ranges = tuple(draw(ranges(n)) for n in shape)
    taken = tuple(sum(stop - start for start, stop in axis) for axis in taken_ranges)
    return View(source, shape, taken_ranges, taken)


def row_of(dims: list[int | None]) -> Row:
    """A row that leaves out the layers with None."""
    skipped = tuple(i for i, dim in enumerate(dims) if dim is None)
    return Row("row", skipped, mamba=Dims(head=tuple(dim for dim in dims if dim is not None)))
