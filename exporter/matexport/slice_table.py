"""Slice tables: CSV in, rows out.

The format is that of the MatFormer slicing configurations (columns `name`, `# Layers`,
`FFN Hidden Dims`, `Layers Skipped`, ...), extended by `Mamba Dims`; any other column is a metric.
"""

from __future__ import annotations

import csv
import difflib
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from matexport.dims import MAX_CELL, Dims, parse_dims
from matexport.errors import TableError

MAX_FILE, MAX_ROWS, MAX_COLUMNS, MAX_ITEMS = 16 << 20, 10_000, 1000, 5_000_000

NAME, LAYERS, EFFECTIVE = "name", "# layers", "# effective params (b)"
FFN, SKIPPED, MAMBA = "ffn hidden dims", "layers skipped", "mamba dims"
TITLES = {
    NAME: "name",
    LAYERS: "# Layers",
    EFFECTIVE: "# Effective Params (B)",
    FFN: "FFN Hidden Dims",
    SKIPPED: "Layers Skipped",
    MAMBA: "Mamba Dims",
}


@dataclass(frozen=True)
class Row:
    """One slice: what a table says of it, unchecked against any model.

    Attributes:
        name: unique in its table.
        skipped: source layers left out, as written.
        ffn, mamba: widths over the kept layers; None where the table says nothing.
        layers: declared number of kept layers.
        effective: declared effective parameters, in billions.
        metrics: every other column, as text.
        where: file and line, for messages.
    """

    name: str
    skipped: tuple[int, ...] = ()
    ffn: Dims | None = None
    mamba: Dims | None = None
    layers: int | None = None
    effective: float | None = None
    metrics: dict[str, str] = field(default_factory=dict)
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class Table:
    """The rows of one file, in order."""

    rows: tuple[Row, ...]
    path: str = field(default="", compare=False)

    def find(self, wanted: str) -> Row:
        """The row called `wanted`: its exact name, `#3` for the third row, or a unique part of a name."""
        exact = [row for row in self.rows if row.name == wanted]
        if exact:
            return exact[0]
        if re.fullmatch(r"#\d{1,6}", wanted):
            number = int(wanted[1:])
            if 1 <= number <= len(self.rows):
                return self.rows[number - 1]
            raise TableError(f"no row {wanted}", where=self.path, fix=f"rows are #1 to #{len(self.rows)}")
        names = [row.name for row in self.rows]
        partial = [row for row in self.rows if wanted.casefold() in row.name.casefold()]
        if len(partial) == 1:
            return partial[0]
        if partial:
            candidates = ", ".join(repr(row.name) for row in partial[:8])
            raise TableError(f"{wanted!r} is part of {len(partial)} names", where=self.path, fix=f"one of {candidates}")
        near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.3) or names[:8]
        raise TableError(
            f"no row is named {wanted!r}", where=self.path, fix=f"did you mean {', '.join(map(repr, near))}?"
        )


# ------------------------------------------------------------------------------------------- reading
def read_table(path: str | Path) -> Table:
    """Reads a CSV file of at most 16 MiB and 10,000 rows.

    Raises:
        TableError: the file, row and column that cannot be read, and the fix.
    """
    path = Path(path)
    try:
        with path.open("rb") as f:
            data = f.read(MAX_FILE + 1)
    except OSError as e:
        raise TableError(f"cannot be read: {e.strerror}", where=str(path), fix="give the path of a CSV file") from None
    if len(data) > MAX_FILE:
        raise TableError("is larger than 16 MiB", where=str(path), fix="split the table")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise TableError(f"byte {e.start} is not UTF-8", where=str(path), fix="save the table as UTF-8") from None
    return parse_table(text, str(path))


def parse_table(text: str, path: str = "table") -> Table:
    """Parses the text of a CSV file; `path` is used in messages only. Raises TableError."""
    text = text.removeprefix("\ufeff")
    if "\0" in text:
        raise TableError("contains a NUL character", where=path, fix="save the table as plain text")
    limit = csv.field_size_limit(MAX_CELL)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        lines: list[tuple[int, list[str]]] = []
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                break
            except csv.Error as e:
                raise TableError(
                    f"is not CSV: {e}", where=f"{path}, line {line}", fix="quote cells with commas"
                ) from None
            if any(cell.strip() for cell in cells):
                lines.append((line, cells))
            if len(lines) > MAX_ROWS + 1:
                raise TableError(f"has more than {MAX_ROWS} rows", where=path, fix="split the table")
    finally:
        csv.field_size_limit(limit)
    if not lines:
        raise TableError("is empty", where=path, fix="the first line must name the columns")
    header = _header(lines[0][1], path)
    rows, items = [], 0
    for line, cells in lines[1:]:
        rows.append(_row(header, cells, path, line))
        items += len(rows[-1].skipped)
        items += sum(len(dims.head) + len(dims.tail) for dims in (rows[-1].ffn, rows[-1].mamba) if dims)
        if items > MAX_ITEMS:
            raise TableError(f"holds more than {MAX_ITEMS:,} numbers", where=rows[-1].where, fix="split the table")
    if not rows:
        raise TableError("has no rows", where=path, fix="add a line with a name and widths")
    seen: dict[str, Row] = {}
    for row in rows:
        if row.name in seen:
            first = seen[row.name].where.rsplit(", ", 1)[-1]
            raise TableError(f"name {row.name!r} was used before, in {first}", where=row.where, fix="rename one row")
        seen[row.name] = row
    return Table(tuple(rows), path)


def _header(cells: Sequence[str], path: str) -> list[tuple[str, str]]:
    """(key, title) of each column; the key is the title without case, an empty title is a trailing comma."""
    if len(cells) > MAX_COLUMNS:
        raise TableError(f"has more than {MAX_COLUMNS} columns", where=path, fix="remove some")
    columns = [(title.strip().casefold(), title.strip()) for title in cells]
    keys = [key for key, _ in columns if key]
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            raise TableError(f"column {key!r} occurs twice", where=path, fix="remove one of them")
        seen.add(key)
        near = difflib.get_close_matches(key, TITLES, n=1, cutoff=0.8) if len(key) < 40 and NAME in keys else []
        if near and key not in TITLES:
            fix = f"rename it to {TITLES[near[0]]!r}, or to something less alike if it is a metric"
            raise TableError(f"column {key!r} is not known", where=path, fix=fix)
    if NAME not in keys:
        near = difflib.get_close_matches(NAME, keys, n=1)
        fix = (
            f"rename column {near[0]!r} to 'name'"
            if near
            else "the first line must name the columns, one of them 'name'"
        )
        raise TableError("has no column 'name'", where=path, fix=fix)
    return columns


def _row(header: list[tuple[str, str]], cells: list[str], path: str, line: int) -> Row:
    where = f"{path}, line {line}"
    if any(cell.strip() for cell in cells[len(header) :]):
        raise TableError(
            f"has {len(cells)} cells for {len(header)} columns", where=where, fix="quote cells with commas"
        )
    values: dict[str, str] = {}
    metrics: dict[str, str] = {}
    for (key, title), cell in zip(header, cells, strict=False):
        if key in TITLES:
            values[key] = cell.strip()
        elif key and cell.strip():
            metrics[title] = _uncovered(cell.strip())
    name = _uncovered(values.get(NAME, ""))
    if not name:
        raise TableError("has no name", where=where, fix="give every row a name of its own")

    def at(key: str) -> str:
        return f"{where} ({name!r}), column {TITLES[key]!r}"

    skipped = parse_dims(values.get(SKIPPED, ""), at(SKIPPED))
    if skipped is not None and skipped.fill is not None:
        raise TableError("is not a list of layers", where=at(SKIPPED), fix="write [20, 21] or leave the cell empty")
    layers = parse_dims(values.get(LAYERS, ""), at(LAYERS))
    if layers is not None and (layers.fill is None or layers.head or layers.tail):
        raise TableError("is not a number of layers", where=at(LAYERS), fix="write 30 or leave the cell empty")
    effective = values.get(EFFECTIVE, "")
    if effective and (number(effective) is None or effective.endswith("%")):
        raise TableError(f"{effective[:40]!r} is not a number", where=at(EFFECTIVE), fix="write 1.91 or leave it empty")
    return Row(
        name=name,
        skipped=skipped.head if skipped else (),
        ffn=parse_dims(values.get(FFN, ""), at(FFN)),
        mamba=parse_dims(values.get(MAMBA, ""), at(MAMBA)),
        layers=layers.fill if layers else None,
        effective=number(effective),
        metrics=metrics,
        where=f"{where} ({name!r})",
    )


def number(text: str) -> float | None:
    """A metric cell as a number (`62.30%` is 62.3), or None if it is not one."""
    if not re.fullmatch(r"[+-]?(\d{1,30}(\.\d{0,30})?|\.\d{1,30})([eE][+-]?\d{1,2})?\s*%?", text):
        return None
    return float(text.rstrip("% \t"))


# ------------------------------------------------------------------------------------------- writing
def format_table(rows: Sequence[Row]) -> str:
    """The CSV text of rows; `parse_table(format_table(rows)).rows == rows`."""
    metrics = list(dict.fromkeys(title for row in rows for title in row.metrics))
    known: list[tuple[str, Callable[[Row], str]]] = [
        (LAYERS, lambda r: "" if r.layers is None else str(r.layers)),
        (EFFECTIVE, lambda r: "" if r.effective is None else repr(r.effective)),
        (FFN, lambda r: "" if r.ffn is None else str(r.ffn)),
        (MAMBA, lambda r: "" if r.mamba is None else str(r.mamba)),
        (SKIPPED, lambda r: "" if not r.skipped else str(list(r.skipped))),
    ]
    used = [(key, text) for key, text in known if any(text(row) for row in rows)]
    lines: list[str] = []
    # the csv module quotes what its line end contains: this way \r and \n inside cells are both quoted
    writer = csv.writer(SimpleNamespace(write=lines.append), lineterminator="\r\n")
    writer.writerow([TITLES[NAME], *(TITLES[key] for key, _ in used), *metrics])
    for row in rows:
        cells = [_covered(row.metrics.get(title, "")) for title in metrics]
        writer.writerow([_covered(row.name), *(text(row) for _, text in used), *cells])
    return "".join(line.removesuffix("\r\n") + "\n" for line in lines)


_FORMULA = "=+-@\t\r'"  # what a spreadsheet would run, and the quote that stops it


def _covered(text: str) -> str:
    return "'" + text if text[:1] and text[0] in _FORMULA and number(text) is None else text


def _uncovered(text: str) -> str:
    return text[1:] if text[:1] == "'" and text[1:2] and text[1] in _FORMULA else text
