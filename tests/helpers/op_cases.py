"""Random inputs of the ops and the sizes that break kernels; needs numpy only, so that tests/gpu can use it."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
TINY = {"batch": 2, "length": 45, "heads": 2, "P": 4, "N": 16, "groups": 1}

LENGTHS = [{**TINY, "heads": 4, "P": 24, "groups": 2, "length": n} for n in (1, 2, 15, 16, 17, 63, 64, 65, 130)]
HEAD_DIMS = [{**TINY, "P": P, "length": n} for P in (1, 2, 4, 8, 12, 16, 24, 40, 48, 64, 80, 128) for n in (1, 70)]
STATES = [{**TINY, "N": N, "P": P, "length": n} for N in (1, 5, 16, 64, 128, 256) for P in (16, 24) for n in (1, 70)]
OPTIONS = [{**TINY, "length": n, "optional": o} for n in (1, 70) for o in ("", "state", "mask", "z")]
MASKS = [{**TINY, "batch": 3, "length": n, "mask": m} for n in (1, 6, 70) for m in ("left", "right", "holes", "all")]
DECAYS = [{**TINY, "length": 140, "decay": d, "optional": "state"} for d in (1e-4, 1e-2, 10.0, 100.0)]
HEADS = [
    {**TINY, "heads": 1},
    {**TINY, "heads": 3, "P": 24},
    {**TINY, "heads": 6, "P": 24, "groups": 2},
    {**TINY, "heads": 25, "batch": 1},
    {**TINY, "heads": 8, "groups": 8},
]
LIMITS = [{**TINY, "length": n, "dt_limit": limit} for n in (1, 45) for limit in ((0.01, 0.2), (0.0, 1.0))]
SCAN_CASES = [*LENGTHS, *HEAD_DIMS, *STATES, *OPTIONS, *MASKS, *DECAYS, *HEADS, *LIMITS]

CONV_CASES: list[dict[str, Any]] = [
    *({"batch": 2, "length": n, "channels": c, "k": 4} for n in (1, 2, 3, 4, 16, 17, 40) for c in (1, 7, 300)),
    *({"batch": 2, "length": n, "channels": 20, "k": k} for n in (1, 2, 50) for k in (1, 2, 5, 40)),
    *({"batch": 2, "length": n, "channels": 9, "k": 4, "optional": o} for n in (1, 37) for o in ("", "state", "mask")),
    *({"batch": 3, "length": n, "channels": 9, "k": 4, "mask": m} for n in (1, 6, 70)
      for m in ("left", "right", "holes", "all")),
]  # fmt: skip


def name_of(case: dict[str, Any]) -> str:
    return "-".join(f"{k}={v}".replace(" ", "+") for k, v in case.items())


def mask_of(kind: str, batch: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """`left`, `right`, `both` sides padded (each entry of the batch by another number), `holes`, or `all` masked."""
    mask = np.ones((batch, length), bool)
    for row in mask:
        left, right = sorted(rng.integers(0, length + 1, 2))
        if kind in ("left", "both"):
            row[:left] = False
        if kind in ("right", "both"):
            row[right:] = False
    if kind == "holes":
        mask = rng.random((batch, length)) < 0.6
    return np.zeros_like(mask) if kind == "all" else mask


def scan_inputs(
    *, batch: int, length: int, heads: int, P: int, N: int, groups: int, optional: str = "state mask z",
    mask: str = "holes", decay: float = 1.0, **case: Any,
) -> Arrays:  # fmt: skip
    """Inputs of Mamba2Scan, all random; what a mask hides is NaN."""
    rng = np.random.default_rng(zlib.crc32(repr((batch, length, heads, P, N, groups, optional, mask, decay)).encode()))

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    inputs = {
        "x": normal(batch, length, heads * P),
        "dt_raw": normal(batch, length, heads, scale=2.0) - np.float32(1),
        "A": (-decay * np.exp(rng.uniform(0, 2.8, heads))).astype(np.float32),
        "B": normal(batch, length, groups * N),
        "C": normal(batch, length, groups * N, scale=N**-0.5),
        "D": normal(heads),
        "dt_bias": normal(heads) - np.float32(1),
        "state": normal(batch, heads, N, P),
        "mask": mask_of(mask, batch, length, rng),
        "z": normal(batch, length, heads * P, scale=3.0),
    }
    return {k: v for k, v in inputs.items() if k not in ("state", "mask", "z") or k in optional.split()}


def conv_inputs(
    *, batch: int, length: int, channels: int, k: int, optional: str = "state mask", mask: str = "holes"
) -> Arrays:
    """Inputs of CausalConv1d, all random."""
    rng = np.random.default_rng(zlib.crc32(repr((batch, length, channels, k, optional, mask)).encode()))
    inputs = {
        "x": rng.standard_normal((batch, length, channels)).astype(np.float32),
        "weight": rng.standard_normal((channels, 1, k)).astype(np.float32),
        "bias": rng.standard_normal(channels).astype(np.float32),
        "state": rng.standard_normal((batch, channels, k - 1)).astype(np.float32),
        "mask": mask_of(mask, batch, length, rng),
    }
    return {k: v for k, v in inputs.items() if k not in ("state", "mask") or k in optional.split()}


def error(got: np.ndarray, want: np.ndarray) -> float:
    """The largest difference relative to the largest value; NaN wherever something is not finite."""
    assert got.shape == want.shape
    if got.size == 0:
        return 0.0
    return float(np.abs(got - want).max() / max(float(np.abs(want).max()), 1e-30))
