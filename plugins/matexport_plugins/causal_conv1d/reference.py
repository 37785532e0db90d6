"""The specification of CausalConv1d: one step at a time, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def causal_conv1d(x: Any, weight: Any, bias: Any, state: Any = None, mask: Any = None) -> tuple[Array, Array]:
    """Shapes and equations as in README.md; any real input type, float64 results.

    Returns:
        y (batch, length, channels), zero where the mask is, and the final state (batch, channels, k - 1).
    """
    x, weight, bias = (np.asarray(v, np.float64) for v in (x, weight, bias))
    batch, length, channels = x.shape
    k = weight.shape[-1]
    S = np.zeros((batch, channels, k - 1)) if state is None else np.array(state, np.float64)
    y = np.zeros_like(x)
    for t in range(length):
        window = np.concatenate([S, x[:, t, :, None]], axis=-1)
        out = (window * weight[:, 0]).sum(-1) + bias
        real = np.ones((batch, 1), bool) if mask is None else np.asarray(mask, bool)[:, t, None]
        y[:, t] = np.where(real, out / (1 + np.exp(-out)), 0.0)
        S = np.where(real[:, :, None], window[..., 1:], S)
    return y, S
