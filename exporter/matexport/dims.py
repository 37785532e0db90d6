"""Cells of a slice table: widths over the kept layers, written as numbers, lists, products and `...`.

    cell   = sum                                   8192   2_048 * 8   [4096, ...]   [64] * 2 + [32]
    sum    = term { "+" term }                     concatenates lists
    term   = factor { "*" factor }                 multiplies integers, repeats a list
    factor = integer | "[" [item {"," item}] "]"
    item   = product of integers | "..."           "..." repeats the item before it

The parser is bounded in every direction and nothing is ever evaluated.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from matexport.errors import TableError, printable

MAX_CELL, MAX_INT, MAX_LIST = 1 << 20, 2**31, 100_000


@dataclass(frozen=True)
class Dims:
    """Widths over the kept layers: `head`, then `fill` as often as needed, then `tail`.

    A single number in the table is a fill alone: all layers alike.
    """

    head: tuple[int, ...] = ()
    fill: int | None = None
    tail: tuple[int, ...] = ()

    def resolve(self, count: int) -> tuple[int, ...] | None:
        """The widths of `count` layers, or None if the list cannot have that length."""
        given = len(self.head) + len(self.tail)
        if given > count or (self.fill is None and given != count):
            return None
        return self.head + (self.fill or 0,) * (count - given) + self.tail

    @property
    def uniform(self) -> int | None:
        """The one width of all layers, or None if they differ."""
        values = {*self.head, *self.tail, *(() if self.fill is None else (self.fill,))}
        return values.pop() if len(values) == 1 else None

    def __str__(self) -> str:
        if self.fill is None:
            return _runs(self.head)
        if not self.head and not self.tail:
            return str(self.fill)
        parts = [_runs(self.head), f"[{self.fill}, ...]", _runs(self.tail)]
        return " + ".join(p for p in parts if p != "[]")


def _runs(values: Sequence[int]) -> str:
    """[8, 8, 8, 4] as `[8] * 3 + [4]`, or plainly where that is shorter."""
    plain = "[" + ", ".join(map(str, values)) + "]"
    runs: list[tuple[int, int]] = []
    for value in values:
        if runs and runs[-1][0] == value:
            runs[-1] = (value, runs[-1][1] + 1)
        else:
            runs.append((value, 1))
    compact = " + ".join(f"[{value}] * {times}" if times > 1 else f"[{value}]" for value, times in runs)
    return compact if runs and len(compact) < len(plain) else plain


_TOKEN = re.compile(r"\s*(?:(\d[\d_]*)|(\.\.\.|…|[\[\]*+,]))", re.ASCII)


def parse_dims(cell: str, where: str) -> Dims | None:
    """Parses one cell; None if it is empty. See the grammar at the top of this file.

    Raises:
        TableError: at `where`, with the fix.
    """
    if not cell.strip():
        return None
    if len(cell) > MAX_CELL:
        raise TableError("cell is larger than 1 MiB", where=where, fix="write [8192] * 20 instead of twenty numbers")
    return _Cell(cell, where).parse()


class _Cell:
    """A recursive-descent parser over the tokens of one cell; the depth of recursion is fixed."""

    def __init__(self, text: str, where: str):
        self.where, self.tokens, position = where, list[str](), 0
        text = text.rstrip()
        while position < len(text):
            match = _TOKEN.match(text, position)
            if not match:
                rest = text[position:].strip()
                raise self.error(f"cannot read {printable(rest[:30])!r}")
            self.tokens.append("..." if match[2] == "…" else match[1] or match[2])
            position = match.end()
        self.position, self.work = 0, 0

    def error(
        self, what: str, fix: str = "write a number, [4096, 8192], [8192] * 20 + [16384] * 5 or [8192, ...]"
    ) -> TableError:
        return TableError(what, where=self.where, fix=fix)

    def peek(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self, wanted: str = "") -> str:
        token = self.peek()
        if not token or (wanted and token != wanted):
            raise self.error(f"expected {wanted or 'a number or a list'!r}, found {token or 'the end'!r}")
        self.position += 1
        return token

    def parse(self) -> Dims:
        value = self.sum()
        if self.peek():
            raise self.error(f"unexpected {self.peek()!r}")
        if isinstance(value, int):
            return Dims(fill=value)
        if value.count(None) > 1:
            raise self.error(
                "more than one '...': the lengths are not determined",
                fix="write how often each width occurs, as in [8192] * 10 + [16384] * 15 + [8192, ...]",
            )
        if None not in value:
            return Dims(head=tuple(v for v in value if v is not None))
        at = value.index(None)
        head = [v for v in value[:at] if v is not None]
        return Dims(tuple(head[:-1]), head[-1], tuple(v for v in value[at + 1 :] if v is not None))

    # A list holds its items, with None for "...".
    def sum(self) -> int | list[int | None]:
        value = self.term()
        while self.peek() == "+":
            self.take()
            more = self.term()
            if isinstance(value, int) or isinstance(more, int):
                raise self.error("'+' joins lists only")
            value = self.bounded(value + more)
        return value

    def term(self) -> int | list[int | None]:
        value = self.factor()
        while self.peek() == "*":
            self.take()
            more = self.factor()
            if isinstance(value, int) and isinstance(more, int):
                value = self.small(value * more)
            elif isinstance(value, int) or isinstance(more, int):
                items, times = (more, value) if isinstance(value, int) else (value, more)
                assert isinstance(items, list)
                assert isinstance(times, int)
                if len(items) * times > MAX_LIST:
                    raise self.error(f"list is longer than {MAX_LIST}")
                value = self.bounded(items * times)
            else:
                raise self.error("a list cannot be multiplied by a list")
        return value

    def factor(self) -> int | list[int | None]:
        if self.peek() != "[":
            return self.integer()
        self.take()
        items: list[int | None] = []
        while self.peek() != "]":
            if self.peek() == "...":
                self.take()
                if not items or items[-1] is None:
                    raise self.error("'...' repeats the number before it, and there is none")
                items.append(None)
            else:
                value = self.integer()
                while self.peek() == "*":
                    self.take()
                    value = self.small(value * self.integer())
                items.append(value)
            if len(items) > MAX_LIST:
                raise self.error(f"list is longer than {MAX_LIST}")
            if self.peek() != "]":
                self.take(",")
        self.take("]")
        return items

    def integer(self) -> int:
        token = self.take()
        if not token[0].isdigit():
            raise self.error(f"expected a number or a list, found {token!r}")
        digits = token.replace("_", "")
        if len(digits) > 10:
            raise self.error(f"number {token[:12]}... is larger than 2^31")
        return self.small(int(digits))

    def small(self, value: int) -> int:
        if value > MAX_INT:
            raise self.error(f"{value} is larger than 2^31")
        return value

    def bounded(self, items: list[int | None]) -> list[int | None]:
        """A list that was built, if it is not too long and not too much was built before it."""
        self.work += len(items)
        if len(items) > MAX_LIST or self.work > 10 * MAX_LIST:
            raise self.error(f"list is longer than {MAX_LIST}")
        return items
