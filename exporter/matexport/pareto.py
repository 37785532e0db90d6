"""Choosing among slices: which rows another row beats, and which is the best that fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matexport.errors import InputError, UsageError
from matexport.planning import Plan
from matexport.slice_table import Row, number


@dataclass(frozen=True)
class Metric:
    """The column that is quality, and which way is better."""

    column: str
    higher_is_better: bool = True

    def score(self, row: Row) -> float | None:
        """The row's quality, higher is better; None where the cell is empty or no number."""
        value = number(row.metrics.get(self.column, ""))
        return value if value is None or self.higher_is_better else -value


@dataclass(frozen=True)
class Candidate:
    """A row and its plan."""

    row: Row
    plan: Plan

    def to_json(self, dominated_by: str | None) -> dict[str, Any]:
        metrics = {
            title: value if (value := number(text)) is not None else text for title, text in self.row.metrics.items()
        }
        return {
            "name": self.row.name,
            "layers": len(self.plan.layers),
            "skipped": list(self.row.skipped),
            "parameters": self.plan.parameters,
            "model_parameters": self.plan.model_parameters,
            "effective_parameters": self.plan.effective_parameters,
            "bytes": self.plan.nbytes,
            "metrics": metrics,
            "dominated_by": dominated_by,
        }


def choose_metric(rows: Sequence[Row], wanted: str | None) -> Metric | None:
    """The metric `NAME`, `NAME:max` or `NAME:min`; without one, the first numeric column, higher is better.

    Raises:
        UsageError: no row has a number in the column.
    """
    numeric = list(
        dict.fromkeys(title for row in rows for title, text in row.metrics.items() if number(text) is not None)
    )
    if wanted is None:
        return Metric(numeric[0]) if numeric else None
    name, separator, way = wanted.rpartition(":")
    if not separator or way not in ("min", "max"):
        name, way = wanted, "max"
    for title in numeric:
        if title.casefold() == name.strip().casefold():
            return Metric(title, way == "max")
    raise UsageError(
        f"no row has a number in a column {name!r}", fix=f"one of {', '.join(map(repr, numeric)) or 'none'}"
    )


def dominated_by(candidates: Sequence[Candidate], metric: Metric | None) -> dict[str, str | None]:
    """For each row, the row that is no larger and scores no worse, one of them strictly; None if there is none.

    Size is the number of effective parameters. Of several such rows the best one is named.
    """
    if metric is None:
        return {candidate.row.name: None for candidate in candidates}
    points = [(c.row.name, c.plan.effective_parameters, metric.score(c.row)) for c in candidates]
    found: dict[str, str | None] = {}
    for name, size, score in points:
        better = [
            (-other_score, other_size, other)
            for other, other_size, other_score in points
            if score is not None
            and other_score is not None
            and other_size <= size
            and other_score >= score
            and (other_size, other_score) != (size, score)
        ]
        found[name] = min(better)[2] if better else None
    return found


def best_fit(
    candidates: Sequence[Candidate], metric: Metric | None, *, max_bytes: float | None, max_parameters: float | None
) -> Candidate:
    """The row of the highest score within the limits; the smaller of equals, the largest where there is no metric.

    Raises:
        InputError: none fits; names the smallest.
    """

    def quality(candidate: Candidate) -> tuple[float, int]:
        score = metric.score(candidate.row) if metric else None
        size = candidate.plan.nbytes
        return (float("-inf") if score is None else score, -size if score is not None else size)

    fitting = [
        c
        for c in candidates
        if (max_bytes is None or c.plan.nbytes <= max_bytes)
        and (max_parameters is None or c.plan.effective_parameters <= max_parameters)
    ]
    if not fitting:
        smallest = min(candidates, key=lambda c: c.plan.nbytes)
        size = f"{smallest.plan.nbytes:,} bytes, {smallest.plan.effective_parameters:,} effective parameters"
        raise InputError("no row fits", fix=f"the smallest is {smallest.row.name!r} with {size}")
    return max(fitting, key=quality)
