"""Every backend of every op against its float64 reference, on memory poisoned by NaN."""

from __future__ import annotations

import functools
import zlib
from typing import Any

import numpy as np
import pytest

from native_ops import CONV, SCAN, Op, Runner, conv_inputs, error, instruction_sets, scan_inputs

TOLERANCE = 1e-5  # of the largest output
BACKENDS = [f"ort-{isa}" for isa in instruction_sets()]
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


@functools.cache
def reference(index: int) -> tuple[np.ndarray, np.ndarray]:
    op, case = CASES[index]
    return op.reference(**inputs_of(op, case), **attributes_of(case))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda i: f"{CASES[i][0].name}-{name_of(CASES[i][1])}")
def test_backend_against_the_reference(index: int, backend: str) -> None:
    op, case = CASES[index]
    inputs, (want, want_state) = inputs_of(op, case), reference(index)
    run = Runner(op, backend.removeprefix("ort-"), threads=1 + index % 3, attributes=attributes_of(case))
    y, state = run(**inputs)
    assert error(y, want) < TOLERANCE  # false for NaN as well
    assert error(state, want_state) < TOLERANCE
    if "mask" in inputs:
        assert not y[~inputs["mask"]].any()
        unmoved = ~inputs["mask"].any(1)
        assert np.array_equal(state[unmoved], inputs["state"][unmoved] if "state" in inputs else 0 * state[unmoved])
