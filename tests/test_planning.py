from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import matexport as mx
from matexport.errors import InputError
from matexport.planning import Plan, View, blocks, compose
from strategies import views
from support import DIGITS

shapes = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple)


@given(st.data(), shapes)
def test_views_compose(data: st.DataObject, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape)).reshape(shape)
    inner = data.draw(views(shape))
    outer = data.draw(views(inner.taken, "sliced"))
    both = compose(outer, inner)
    assert both.source == "t"
    assert np.array_equal(both.of(array), outer.of(inner.of(array)))


def test_views_compose_through_flattened_axes() -> None:
    table = np.arange(5 * 4 * 3).reshape(5, 12)  # 4 layers of 3, flattened
    inner = View("t", (5, 4, 3), (((0, 5),), ((0, 1), (2, 4)), ((0, 3),)), (5, 9))
    outer = View("sliced", (5, 3, 3), (((0, 5),), ((1, 3),), ((0, 3),)), (5, 6))
    both = compose(outer, inner)
    assert both.view_shape == (5, 4, 3)
    assert both.ranges[1] == ((2, 4),)
    assert np.array_equal(both.of(table), table[:, 6:])
    assert compose(View("s", (5, 9), (((0, 5),), ((0, 9),)), (5, 9)), inner) == inner
    with pytest.raises(InputError, match="slice the original checkpoint"):
        compose(View("s", (5, 9), (((0, 5),), ((0, 4),)), (5, 4)), inner)


@given(st.data(), shapes.filter(lambda s: len(s) == 2))
def test_restricting_a_view(data: st.DataObject, shape: tuple[int, int]) -> None:
    array = np.arange(np.prod(shape)).reshape(shape)
    view = data.draw(views(shape))
    axis = data.draw(st.sampled_from([0, 1]))
    start = data.draw(st.integers(0, view.shape[axis] - 1))
    stop = data.draw(st.integers(start + 1, view.shape[axis]))
    part = view.of(array)[start:stop] if axis == 0 else view.of(array)[:, start:stop]
    assert np.array_equal(view.restrict(axis, (start, stop)).of(array), part)


@pytest.mark.parametrize("axis", [((0, 5),), ((2, 2),), ((3, 2),), ((-1, 2),)])
def test_ranges_outside_the_tensor_are_refused(axis: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match="outside"):
        View("t", (4,), (axis,), (2,))


def test_blocks_are_merged() -> None:
    assert blocks([0, 1, 2, 5, 4], 3, offset=10) == ((10, 19), (25, 28), (22, 25))


def test_plans_survive_json() -> None:
    plan = mx.plan(DIGITS, "half without layer 2").plan
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("tensors"),
        lambda d: d["tensors"]["cls_token"].update(ranges=[[[0, 99]], [[0, 1]], [[0, 64]]]),
        lambda d: d["tensors"]["cls_token"].update(dtype="X"),
        lambda d: d["layers"].append(3),
    ],
)
def test_damaged_plans_are_refused(damage: object) -> None:
    data = mx.plan(DIGITS, "half").plan.to_json()
    damage(data)  # type: ignore[operator]
    with pytest.raises((KeyError, ValueError, TypeError)):
        Plan.from_json(data)


def test_counts_are_exact() -> None:
    """Against the formula of the paper's block, by hand: d 64, N 16, four layers, P 2."""
    for name, heads in (("full", 64), ("half", 32), ("quarter", 16), ("eighth", 8)):
        w, d, n = 2 * heads, 64, 16
        layer = (2 * w + 2 * n + heads) * d + 5 * (w + 2 * n) + 3 * heads + w + d * w + 2 * d
        outside = 3 * 2 * 2 * d + d + d + 17 * d + 2 * d + 10 * d + 10
        plan = mx.plan(DIGITS, name).plan
        assert plan.parameters == 4 * layer + outside
        assert plan.nbytes == 4 * plan.parameters
