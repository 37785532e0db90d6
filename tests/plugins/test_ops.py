"""Every backend of every op against its float64 reference, on memory poisoned by NaN."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest

from native_ops import (
    ALONG_LENGTH,
    ATTRIBUTES,
    BACKENDS,
    CONV,
    INPUTS,
    SCAN,
    Backend,
    Op,
    conv_inputs,
    error,
    part,
    scan_inputs,
)

TOLERANCE = 1e-5  # of the largest value
TINY = {"batch": 2, "length": 45, "heads": 2, "P": 4, "N": 8, "groups": 1}

LENGTHS = [{**TINY, "batch": 3, "heads": 4, "P": 24, "N": 16, "groups": 2, "length": n}
           for n in (1, 2, 31, 32, 33, 63, 64, 100, 500, 513, 1100)]  # fmt: skip
HEAD_DIMS = [{**TINY, "P": P, "N": N} for P in (1, 2, 4, 12, 16, 24, 32, 33, 40, 48, 64, 80, 96, 112, 128, 200)
             for N in (8, 128)]  # fmt: skip
STATES = [{**TINY, "length": n, "P": P, "N": N} for N in (1, 5, 8, 16, 100, 256) for P in (2, 16, 24) for n in (1, 40)]
STEPS = [
    {**TINY, "length": 1, "P": P, "N": 16, "heads": 6, "groups": 2} for P in (1, 2, 4, 16, 24, 33, 48, 64, 80, 200)
]
BIG_STEP = [{**TINY, "length": 1, "heads": 16, "P": 24, "N": 128}]  # so much state that threads share it
OPTIONS = [{**TINY, "length": n, "optional": o} for n in (1, 70) for o in ("", "state", "mask", "z", "state z")]
MASKS = [{**TINY, "batch": 3, "length": n, "mask": m} for n in (1, 6, 70, 600)
         for m in ("left", "right", "both", "holes", "all")]  # fmt: skip
DECAYS = [{**TINY, "length": 300, "decay": d, "optional": "state"} for d in (1e-4, 1e-2, 10.0, 100.0)]
HEADS = [{**TINY, "heads": 1, "groups": 1}, {**TINY, "heads": 25, "batch": 1}, {**TINY, "heads": 8, "groups": 8}]
LIMITS = [{**TINY, "length": n, "dt_limit": limit} for n in (1, 45) for limit in ((0.01, 0.2), (0.0, 1.0))]
SCAN_CASES = [*LENGTHS, *HEAD_DIMS, *STATES, *STEPS, *BIG_STEP, *OPTIONS, *MASKS, *DECAYS, *HEADS, *LIMITS]

CONV_CASES: list[dict[str, Any]] = [
    *({"batch": 3, "length": n, "channels": 40, "k": 4} for n in (1, 2, 3, 4, 5, 31, 32, 33, 100, 500)),
    *({"batch": 2, "length": n, "channels": c, "k": 4} for n in (1, 9) for c in (1, 3, 4, 7, 16, 17, 100)),
    *({"batch": 2, "length": n, "channels": 20, "k": k} for n in (1, 2, 50) for k in (1, 2, 3, 5, 40)),
    *({"batch": 2, "length": n, "channels": 9, "k": 4, "optional": o} for n in (1, 37) for o in ("", "state", "mask")),
    *({"batch": 3, "length": n, "channels": 9, "k": 4, "mask": m} for n in (1, 2, 6, 70)
      for m in ("left", "right", "both", "holes", "all")),
]  # fmt: skip
CASES = [(SCAN, case) for case in SCAN_CASES] + [(CONV, case) for case in CONV_CASES]


def name_of(value: Any) -> str:
    if isinstance(value, Op):
        return value.name
    if isinstance(value, dict):
        return "-".join(f"{k}={v}".replace(" ", "+") for k, v in value.items())
    return str(value)


def inputs_of(op: Op, case: dict[str, Any]) -> dict[str, np.ndarray]:
    shape = {k: v for k, v in case.items() if k != "dt_limit"}
    seed = zlib.crc32(name_of(case).encode())
    return scan_inputs(seed, **shape) if op is SCAN else conv_inputs(seed, **shape)


def attributes_of(case: dict[str, Any]) -> dict[str, Any]:
    return {k: case[k] for k in ("groups", "dt_limit") if k in case}


RUNS = [
    pytest.param(index, name, id=f"{op.name}-{name_of(case)}-{name}")
    for index, (op, case) in enumerate(CASES)
    for name, backend in BACKENDS.items()
    if backend.takes(case)
]


REFERENCES: dict[Any, tuple[np.ndarray, np.ndarray]] = {}


def reference(index: int, backend: Backend) -> tuple[np.ndarray, np.ndarray]:
    """Computed once for all backends that see the same inputs."""
    (op, case), key = CASES[index], (index, backend.rounds, backend.whole)
    if key not in REFERENCES:
        REFERENCES[key] = op.reference(**backend.inputs(inputs_of(op, case)), **attributes_of(case))
    return REFERENCES[key]


@pytest.mark.parametrize(("index", "name"), RUNS)
def test_backend_against_the_reference(index: int, name: str) -> None:
    (op, case), backend = CASES[index], BACKENDS[name]
    inputs, (want, want_state) = backend.inputs(inputs_of(op, case)), reference(index, backend)
    y, state = backend.make(op, attributes_of(case), 1 + index % 3)(**inputs)
    if "mask" in inputs:
        padding = ~inputs["mask"]
        assert not (backend.whole and y[padding].any())
        y[padding] = 0
        unmoved = padding.all(1)
        assert np.array_equal(state[unmoved], inputs["state"][unmoved] if "state" in inputs else 0 * state[unmoved])
    assert error(y, want) < backend.tolerance  # false for NaN as well
    assert error(state, want_state) < backend.state_tolerance


both_ops = pytest.mark.parametrize("op", [SCAN, CONV], ids=lambda op: op.name)
every_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)


@both_ops
@every_backend
@pytest.mark.parametrize("pieces", [(50, 50), (1, 37, 62), (97, 1, 1, 1), (2, 2, 96)], ids=str)
def test_states_carry_on(op: Op, backend: Backend, pieces: tuple[int, ...]) -> None:
    run, inputs = backend.make(op, ATTRIBUTES[op], 1), backend.inputs(INPUTS[op])
    want, want_state = op.reference(**inputs, **ATTRIBUTES[op])
    ys, state, start = [], inputs["state"], 0
    for length in pieces:
        y, state = run(**part(inputs, start, start + length, state))
        ys.append(y)
        start += length
    assert error(np.concatenate(ys, 1) * inputs["mask"][..., None], want) < backend.tolerance
    assert error(state, want_state) < backend.state_tolerance


@both_ops
@pytest.mark.parametrize("name", [name for name, backend in BACKENDS.items() if backend.whole])
def test_what_masked_steps_hold_does_not_matter(op: Op, name: str) -> None:
    run, inputs = BACKENDS[name].make(op, ATTRIBUTES[op], 1), INPUTS[op]
    spoilt = {k: np.where(inputs["mask"][..., None], v, np.nan) if k in ALONG_LENGTH - {"mask"} else v
              for k, v in inputs.items()}  # fmt: skip
    for clean, dirty in zip(run(**inputs), run(**spoilt), strict=True):
        assert np.array_equal(clean, dirty)


@both_ops
@every_backend
def test_padding_at_either_side_is_exact(op: Op, backend: Backend) -> None:
    """A sequence of 40 steps alone, and with 7 or 60 masked steps before or behind it."""
    run = backend.make(op, ATTRIBUTES[op], 1)
    inputs = backend.inputs(part(INPUTS[op], 0, 40, INPUTS[op]["state"]) | {"mask": np.ones((2, 40), bool)})
    y, state = run(**inputs)
    for before, behind in ((7, 0), (60, 0), (0, 7), (0, 60), (3, 20)):
        width = {k: [(0, 0), (before, behind)] + [(0, 0)] * (v.ndim - 2) for k, v in inputs.items() if v.ndim > 1}
        padded = {k: np.pad(v, width[k]) if k in ALONG_LENGTH else v for k, v in inputs.items()}
        padded_y, padded_state = run(**padded)
        assert error(padded_y[:, before : before + 40], y) < backend.tolerance / 2
        assert error(padded_state, state) < backend.state_tolerance / 2


@pytest.mark.parametrize("name", [name for name, backend in BACKENDS.items() if backend.tolerance == TOLERANCE])
@pytest.mark.parametrize("chunk", ["dt 25, A -16: log decay -400 a step", "dt 0.02, A -0.005: hardly any decay"])
def test_no_digit_is_lost_in_decays(name: str, chunk: str) -> None:
    """Constant steps, so that rounding errors of the decay add up instead of averaging out."""
    strong, length = "-400" in chunk, 400 if "-400" in chunk else 4000
    inputs = scan_inputs(5, batch=1, length=length, heads=2, P=4, N=8, groups=1, optional="state")
    inputs["dt_raw"] = np.full_like(inputs["dt_raw"], 25 if strong else -3.9)
    inputs["dt_bias"] *= 0
    inputs["A"] = np.full_like(inputs["A"], -16 if strong else -0.005)
    inputs["x"], inputs["B"] = (np.abs(inputs[k]) for k in "xB")
    if strong:  # now and then a step without decay, as after a cumulative sum of -400 each
        inputs["dt_raw"][:, ::3] = -12
    y, state = BACKENDS[name].make(SCAN, {}, 1)(**inputs)
    want, want_state = SCAN.reference(**inputs)
    assert error(y, want) < TOLERANCE
    assert error(state, want_state) < TOLERANCE


def test_the_reference_is_the_matrix_of_the_paper() -> None:
    """Without recurrence: y = (L o C B^T) (dt x) + D x, L_ts the product of the decays after s up to t (section 3)."""
    inputs = {k: np.asarray(v, np.float64) for k, v in scan_inputs(3, **{**TINY, "batch": 1}, optional="state").items()}
    y, final = SCAN.reference(**inputs)
    dt = np.log1p(np.exp(inputs["dt_raw"][0] + inputs["dt_bias"]))  # (length, heads)
    log_decay = np.cumsum(dt * inputs["A"], 0)
    x, state, B, C = inputs["x"].reshape(45, 2, 4), inputs["state"][0], inputs["B"][0], inputs["C"][0]
    for h in range(2):
        L = np.tril(np.exp(np.minimum(log_decay[:, None, h] - log_decay[None, :, h], 0)))
        want = (L * (C @ B.T)) @ (dt[:, h, None] * x[:, h]) + inputs["D"][h] * x[:, h]
        want += np.exp(log_decay[:, h, None]) * (C @ state[h])
        assert error(y.reshape(45, 2, 4)[:, h], want) < 1e-12
        want = np.exp(log_decay[-1, h]) * state[h] + (B * L[-1][:, None]).T @ (dt[:, h, None] * x[:, h])
        assert error(final[0, h], want) < 1e-12
