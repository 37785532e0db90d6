"""Proof that stored tensors are views of a source: every byte compared, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from matexport.checkpoint import Checkpoint
from matexport.graph.builder import Weight
from matexport.manifest import file_problems
from matexport.onnx.weights import stored_blocks
from matexport.parity.comparison import Comparison
from matexport.planning import PlannedTensor
from matexport.streaming import stream
from matexport.tensors import numpy_dtype


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: what it says it is, and where its bytes are; how they were made if not as in a checkpoint."""

    tensor: PlannedTensor
    file: Path
    start: int
    weight: Weight | None = None


def prove_tensor(name: str, stored: Stored, planned: PlannedTensor | None, source: Checkpoint) -> Comparison:
    """Whether a stored tensor is, bit for bit, the part of the source that the plan says it is."""
    if planned is None:
        return Comparison(name, "provenance", False, 0.0, detail="is not part of this slice")
    if (stored.tensor.dtype, stored.tensor.shape) != (planned.dtype, planned.shape):
        what = f"{stored.tensor.dtype} {stored.tensor.shape}, {planned.dtype} {planned.shape} expected"
        return Comparison(name, "provenance", False, 0.0, detail=what)
    if stored.tensor.view != planned.view:
        return Comparison(name, "provenance", False, 0.0, detail="the manifest records another view")
    blocks = stored_blocks(source, stored.weight) if stored.weight else stream(source, planned.view)
    max_abs, scale, equal = 0.0, 0.0, True
    for got, want in _pairs(stored, blocks):
        want = want.astype(got.dtype, copy=False)
        if len(got) != len(want):
            return Comparison(name, "provenance", False, 0.0, detail="the file ends early")
        if got.tobytes() != want.tobytes():
            equal = False
            with np.errstate(all="ignore"):
                difference = np.abs(got.astype(np.float64) - want.astype(np.float64))
                max_abs = max(max_abs, float(np.nan_to_num(difference, nan=0.0, posinf=np.finfo(np.float64).max).max()))
                scale = max(scale, float(np.nan_to_num(np.abs(want.astype(np.float64))).max()))
    if equal:
        return Comparison(name, "provenance", True, 0.0, 0.0, 0.0)
    return Comparison(
        name, "provenance", False, 0.0, max_abs, max_abs / scale if scale else None, detail="bytes differ"
    )


def _pairs(stored: Stored, blocks: Iterator[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    dtype = stored.weight.numpy if stored.weight else numpy_dtype(stored.tensor.dtype)
    with stored.file.open("rb") as f:
        f.seek(stored.start)
        for want in blocks:
            data = f.read(len(want) * dtype.itemsize)
            yield np.frombuffer(data[: len(data) // dtype.itemsize * dtype.itemsize], dtype), want


def prove_files(artefact: Path, manifest: dict[str, Any]) -> list[Comparison]:
    """Whether the files of an artefact are those that were written, by their SHA-256, and no others."""
    problems = file_problems(artefact, manifest)
    return [Comparison(name, "digest", not problem, 0.0, detail=problem) for name, problem in problems.items()]
