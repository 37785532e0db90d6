"""A user's inputs of a model."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from matexport.errors import InputError


def checked_inputs(
    inputs: Mapping[str, np.ndarray], samples: Mapping[str, np.ndarray], where: str
) -> dict[str, np.ndarray]:
    """A user's inputs, if they have the names, types and shapes (but for the first axis) of our own.

    Raises:
        InputError: they have not.
    """
    for name, sample in samples.items():
        if name not in inputs:
            fix = f"the inputs are {', '.join(samples)}"
            raise InputError(f"input {name!r} is missing", where=where, fix=fix)
        array = inputs[name]
        if array.dtype.kind not in "fiub":
            raise InputError(f"input {name!r} holds no numbers", where=where, fix="give a batch of real inputs")
        free = sample.dtype.kind == "i"  # token ids: any length
        if array.ndim != sample.ndim or not array.size or not (free or array.shape[1:] == sample.shape[1:]):
            what = f"input {name!r} has shape {array.shape}, (any, {', '.join(map(str, sample.shape[1:]))}) expected"
            raise InputError(what, where=where, fix="give a batch of the model's own inputs")
    return {name: np.ascontiguousarray(inputs[name], sample.dtype) for name, sample in samples.items()}
