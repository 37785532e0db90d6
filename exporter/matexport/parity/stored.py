"""The source with its weights as a quantised artefact stores them.

What this model gives differs from the source by what quantising loses, and from the artefact by the rounding of its
inputs alone: so a loss can be told from a mistake.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from matexport.checkpoint import Checkpoint
from matexport.graph.builder import Weight
from matexport.graph.encoding import restored
from matexport.planning import Plan
from matexport.tensors import FLOATS, numpy_dtype


@dataclass(frozen=True)
class StoredSource(Checkpoint):
    """A checkpoint whose tensors are read as they come back from an artefact's weights, float ones in float32.

    Attributes:
        encoded: the artefact's quantised weights.
        dtype: what its other float weights are stored as; None if each as it is.
    """

    encoded: tuple[Weight, ...] = ()
    dtype: str | None = None

    def read(self, name: str) -> np.ndarray:
        source = super().read(name)
        if self.tensors[name].dtype not in FLOATS:
            return source
        array = source.astype(numpy_dtype(self.dtype)) if self.dtype else source
        array = np.array(array, np.float32)
        for weight in self.encoded:
            view, encoding = weight.tensor.view, weight.encoding
            if view.source == name and encoding is not None and encoding.part == "codes":
                rows = restored(np.asarray(view.of(source), np.float32), encoding)
                places = (np.concatenate([np.arange(*r) for r in ranges]) for ranges in view.ranges)
                array.reshape(view.view_shape)[np.ix_(*places)] = rows.reshape(view.taken)
        return array


def stored_source(source: Checkpoint, whole: Plan, weights: Iterable[Weight], dtype: str | None) -> StoredSource:
    """What `weights` of a graph make of the source; `whole` is the plan of all of it, without a tied head's copy."""
    needed = {tensor.view.source for tensor in whole.tensors.values()}
    fields = {**vars(source), "tensors": {name: t for name, t in source.tensors.items() if name in needed}}
    encoded = tuple(weight for weight in weights if weight.encoding)
    return StoredSource(**fields, encoded=encoded, dtype=dtype)
