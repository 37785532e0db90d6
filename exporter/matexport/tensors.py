"""Tensors in files: where they lie, and their types."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from matexport.errors import UsageError

# safetensors name -> (bytes an element, numpy name; bfloat16 is ml_dtypes')
DTYPES: dict[str, tuple[int, str]] = {
    "BOOL": (1, "bool"), "U8": (1, "uint8"), "I8": (1, "int8"), "U16": (2, "uint16"), "I16": (2, "int16"),
    "U32": (4, "uint32"), "I32": (4, "int32"), "U64": (8, "uint64"), "I64": (8, "int64"), "F16": (2, "float16"),
    "BF16": (2, "bfloat16"), "F32": (4, "float32"), "F64": (8, "float64"),
}  # fmt: skip

FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}  # -> name in a config.json


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies: `nbytes` bytes from `start` of `file`, C order, little-endian."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][0]


def numpy_dtype(dtype: str) -> np.dtype:
    """The numpy type of a safetensors dtype name."""
    if dtype == "BF16":
        import ml_dtypes

        bfloat16: np.dtype = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype(DTYPES[dtype][1])


def dtype_named(name: str | None) -> str | None:
    """The safetensors name of a dtype: float16, fp16, f16 and F16 are one. Raises UsageError."""
    if name is None:
        return None
    for dtype, full in FLOATS.items():
        if name.casefold() in (full, dtype.casefold(), dtype.casefold().replace("f", "fp")) and dtype != "F64":
            return dtype
    raise UsageError(f"unknown dtype {name!r}", fix="one of float32, float16, bfloat16")
