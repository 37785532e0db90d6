"""The specification of Mamba2Scan: one step at a time, in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def mamba2_scan(
    x: Any, dt_raw: Any, A: Any, B: Any, C: Any, D: Any, dt_bias: Any, state: Any = None, mask: Any = None,
    z: Any = None, *, groups: int = 1, dt_limit: tuple[float, float] = (0.0, math.inf),
) -> tuple[Array, Array]:  # fmt: skip
    """Shapes and equations as in README.md; any real input type, float64 results.

    Returns:
        y (batch, length, heads * P), zero where the mask is, and the final state (batch, heads, N, P).
    """
    x, dt_raw, A, B, C, D, dt_bias = (np.asarray(v, np.float64) for v in (x, dt_raw, A, B, C, D, dt_bias))
    batch, length, _ = x.shape
    heads = A.shape[0]
    x = x.reshape(batch, length, heads, -1)
    B, C = (np.repeat(v.reshape(batch, length, groups, -1), heads // groups, axis=2) for v in (B, C))
    dt = np.clip(np.logaddexp(0.0, dt_raw + dt_bias), *dt_limit)
    real = np.ones((batch, length), bool) if mask is None else np.asarray(mask, bool)
    S = np.zeros((batch, heads, B.shape[-1], x.shape[-1])) if state is None else np.array(state, np.float64)
    y = np.empty_like(x)
    for t in range(length):
        step = (
            np.exp(dt[:, t] * A)[..., None, None] * S + B[:, t, :, :, None] * (dt[:, t, :, None] * x[:, t])[:, :, None]
        )
        S = np.where(real[:, t, None, None, None], step, S)
        y[:, t] = np.einsum("bhn,bhnp->bhp", C[:, t], S) + D[:, None] * x[:, t]
    y = y.reshape(batch, length, -1)
    if z is not None:
        z = np.asarray(z, np.float64)
        y = y * z / (1 + np.exp(-z))
    return np.where(real[:, :, None], y, 0.0), S
