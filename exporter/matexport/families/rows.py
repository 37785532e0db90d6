"""What every family asks of a row of a slice table: which layers stay, and how wide each of them is."""

from __future__ import annotations

import re

from matexport.dims import Dims
from matexport.errors import TableError
from matexport.slice_table import FFN, MAMBA, SKIPPED, TITLES, Row

WHOLE = Row("whole model")
CLOSE = 0.02  # billions: how far the published tables are off


def kept_layers(row: Row, count: int) -> tuple[int, ...]:
    """The source layers of a model of `count` layers that a row keeps, in order.

    Raises:
        TableError: a skipped layer is out of range or named twice, all are skipped, or `# Layers` disagrees.
    """
    where = f"{row.where or row.name}, column {TITLES[SKIPPED]!r}"
    for layer in row.skipped:
        if layer >= count:
            raise TableError(f"layer {layer} does not exist", where=where, fix=f"the layers are 0 to {count - 1}")
        if row.skipped.count(layer) > 1:
            raise TableError(f"layer {layer} is skipped twice", where=where, fix="name it once")
    kept = tuple(layer for layer in range(count) if layer not in row.skipped)
    if not kept:
        raise TableError("skips every layer", where=where, fix="keep at least one")
    if row.layers is not None and row.layers != len(kept):
        what = f"declares {row.layers} layers, but {count} - {len(row.skipped)} skipped = {len(kept)} are kept"
        raise TableError(what, where=row.where or row.name, fix="correct '# Layers' or 'Layers Skipped'")
    return kept


def widths_of(row: Row, column: str, kept: tuple[int, ...], full: tuple[int, ...]) -> tuple[int, ...]:
    """The width of each kept layer; the source's own (`full`, over kept layers) where the row names none.

    Raises:
        TableError: the list has another length than the kept layers, or the row narrows an axis that the
            model does not have.
    """
    cells: dict[str, Dims | None] = {FFN: row.ffn, MAMBA: row.mamba}
    for other, dims in cells.items():
        if other != column and dims is not None:
            what, fix = f"this model is not nested along {TITLES[other]!r}", f"use the column {TITLES[column]!r}"
            raise TableError(what, where=row.where or row.name, fix=fix)
    dims = cells[column]
    if dims is None:
        return full
    widths = dims.resolve(len(kept))
    if widths is None:
        given = len(dims.head) + len(dims.tail)
        what = f"gives {given} widths for {len(kept)} kept layers"
        where = f"{row.where or row.name}, column {TITLES[column]!r}"
        raise TableError(what, where=where, fix="give one width for each kept layer, or [WIDTH, ...]")
    return widths


def count_notes(row: Row, effective: int) -> list[str]:
    """Notes on a declared number of effective parameters, or one in the name, that is not the exact one."""
    exact, found = effective / 1e9, []
    if row.effective is not None and abs(row.effective - exact) > CLOSE:
        found.append(f"declares {row.effective:g} B effective parameters, it has {exact:.2f} B")
    named = re.search(r"\bE(\d+\.\d+)B\b", row.name)
    if named and abs(float(named[1]) - exact) > CLOSE:
        found.append(f"is named {named[0]}, it has {exact:.2f} B effective parameters")
    return found
