from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matexport.errors import InputError, UsageError
from matexport.pareto import Candidate, best_fit, choose_metric, dominated_by
from matexport.planning import Plan, PlannedTensor, View
from matexport.slice_table import Row


def candidate(name: str, size: int, score: str) -> Candidate:
    tensor = PlannedTensor("F32", View("t", (size,), (((0, size),),), (size,)))
    return Candidate(
        Row(name, metrics={"Accuracy": score} if score else {}), Plan("x", name, (), (), {"t": tensor}, {}, size)
    )


ROWS = [
    candidate("big", 100, "90%"),
    candidate("mid", 50, "91%"),
    candidate("twin", 50, "91%"),
    candidate("low", 20, "80%"),
]


def test_dominated_rows() -> None:
    metric = choose_metric([c.row for c in ROWS], None)
    assert dominated_by(ROWS, metric) == {"big": "mid", "mid": None, "twin": None, "low": None}
    worse = choose_metric([c.row for c in ROWS], "accuracy:min")
    assert dominated_by(ROWS, worse) == {"big": "low", "mid": "low", "twin": "low", "low": None}
    assert set(dominated_by(ROWS, None).values()) == {None}
    unknown = [*ROWS, candidate("unmeasured", 1000, "")]
    assert dominated_by(unknown, metric)["unmeasured"] is None


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=8))
def test_against_the_definition(points: list[tuple[int, int]]) -> None:
    rows = [candidate(str(i), size, str(score)) for i, (size, score) in enumerate(points)]
    found = dominated_by(rows, choose_metric([c.row for c in rows], None))
    for i, (size, score) in enumerate(points):
        beaten = any(s <= size and q >= score and (s < size or q > score) for s, q in points)
        assert (found[str(i)] is not None) == beaten


def test_the_best_that_fits() -> None:
    metric = choose_metric([c.row for c in ROWS], None)
    assert best_fit(ROWS, metric, max_bytes=200, max_parameters=None).row.name == "mid"
    assert best_fit(ROWS, metric, max_bytes=None, max_parameters=49).row.name == "low"
    assert best_fit(ROWS, metric, max_bytes=1000, max_parameters=1000).row.name == "mid"
    assert best_fit(ROWS, None, max_bytes=399, max_parameters=None).row.name in ("mid", "twin")
    with pytest.raises(InputError, match="smallest is 'low' with 80 bytes, 20 effective"):
        best_fit(ROWS, metric, max_bytes=79, max_parameters=None)


def test_unknown_metric() -> None:
    with pytest.raises(UsageError, match="'Accuracy'"):
        choose_metric([c.row for c in ROWS], "Loss:min")
