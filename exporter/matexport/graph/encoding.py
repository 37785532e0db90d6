"""Matrices in fewer bits, as arrays.

For ONNX Runtime: `int8` has a scale for each row. The block methods have one, s, for every `BLOCK` weights of a row:
the value of largest magnitude becomes the lowest code, and a weight is s * (code - 2^(bits - 1)), as in `MatMulNBits`.

For TensorRT, and whatever reads `DequantizeLinear`, a weight is s * code:
`int8-weight` has a scale for each row; `int4-weight` one for every 64 weights of a row, and the value of largest
magnitude becomes -8; `fp8` has e4m3 codes and a scale for each row; `nvfp4` has e2m1 codes, a scale in e4m3 for every
16 weights of a row, and a scale of these scales for the whole matrix, so that they use the range of e4m3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np

BLOCK = 32
BLOCKS = {"int4-weight": 64, "nvfp4": 16}  # weights of a row that share a scale
TYPED = ("int8-weight", "int4-weight", "fp8", "nvfp4")  # for DequantizeLinear: products are in the graph's type
CALIBRATED = ("fp8",)  # what products take is rounded too, by scales that were measured
METHODS = ("int8", "int8-block", "int4-block", *TYPED)
PARTS = ("codes", "scales")
FP8, FP4 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float4_e2m1fn)
FP8_MAX, FP4_MAX = 448.0, 6.0
SCALES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


def parts_of(method: str) -> tuple[str, ...]:
    """The arrays that a matrix is stored as."""
    return (*PARTS, "scale") if method == "nvfp4" else PARTS


def takes(method: str, shape: tuple[int, ...]) -> bool:
    """Whether a matrix (n, k) can be stored so: blocks of a row for TensorRT are whole."""
    return shape[1] % BLOCKS.get(method, 1) == 0


@dataclass(frozen=True)
class Encoding:
    """One of the arrays that a matrix (n, k) is stored as.

    Attributes:
        method: one of `METHODS`.
        part: one of `parts_of` it.
        scale: the type of scales of `TYPED` methods.
    """

    method: str
    part: str
    scale: str = "F32"

    @property
    def bits(self) -> int:
        return 4 if self.method in ("int4-block", "int4-weight", "nvfp4") else 8

    @property
    def dtype(self) -> str:
        if self.part == "codes":
            typed = {"int8": "I8", "int8-weight": "I8", "int4-weight": "I4", "fp8": "F8", "nvfp4": "F4"}
            return typed.get(self.method, "U8")
        return {"scales": "F8", "scale": "F32"}[self.part] if self.method == "nvfp4" else self.scale

    @property
    def numpy(self) -> np.dtype:
        """The type of the array that is stored; two codes of 4 bits are a byte."""
        found: dict[str, np.dtype] = {"I8": np.dtype(np.int8), "F8": FP8, **SCALES}
        return found.get(self.dtype, np.dtype(np.uint8))

    def shape(self, n: int, k: int) -> tuple[int, ...]:
        """What is stored of a matrix (n, k), as ONNX says it."""
        if self.part == "scale":
            return ()
        if self.method in ("int8", "int8-weight", "fp8"):
            return (n,) if self.part == "scales" else (k, n) if self.method == "int8" else (n, k)
        if self.method in TYPED:
            return (n, k // BLOCKS[self.method]) if self.part == "scales" else (n, k)
        blocks = -(-k // BLOCK)
        return (n, blocks) if self.part == "scales" else (n, blocks, BLOCK * self.bits // 8)

    def nbytes(self, n: int, k: int) -> int:
        packed = 2 if self.dtype in ("I4", "F4") else 1
        return math.prod(self.shape(n, k)) * self.numpy.itemsize // packed

    def encode(self, rows: np.ndarray, largest: float = 0.0) -> np.ndarray:
        """float32 rows (r, k) as they are stored; codes of `int8` are still to be transposed.

        Args:
            largest: of the magnitudes in the whole matrix, for `nvfp4`.
        """
        if self.method in TYPED:
            return self._typed(rows, largest)
        scales: np.ndarray
        found: np.ndarray
        if self.method == "int8":
            scales = np.maximum(rows.max(1), -rows.min(1)) / np.float32(127)
            found = scales if self.part == "scales" else np.rint(rows * _inverse(scales)[:, None]).astype(np.int8)
            return found
        r, k = rows.shape
        if k % BLOCK:
            rows = np.pad(rows, ((0, 0), (0, -k % BLOCK)))
        across = np.ascontiguousarray(rows.reshape(-1, BLOCK).T)  # blocks side by side: each pass is one long loop
        high, low = across.max(0), across.min(0)
        zero = 1 << (self.bits - 1)
        scales = np.where(high > -low, high, low) / np.float32(-zero)
        if self.part == "scales":
            return scales.reshape(r, -1)
        across *= _inverse(scales)
        across += np.float32(zero + 0.5)  # the cast below rounds down
        np.clip(across, 0, 2 * zero - 1, out=across)
        found = across.astype(np.uint8)
        if self.bits == 4:
            found = found[0::2] | (found[1::2] << 4)
        return np.ascontiguousarray(found.T).reshape(r, -1, found.shape[0])

    def _typed(self, rows: np.ndarray, largest: float) -> np.ndarray:
        """Codes are found for the scales as they are stored."""
        found: np.ndarray
        scale = np.float32(largest / (FP8_MAX * FP4_MAX) or 1.0)
        if self.part == "scale":
            return np.array([scale])
        width: int = rows.shape[1]
        blocks = rows.reshape(len(rows), -1, BLOCKS.get(self.method, width))
        magnitude = np.abs(blocks).max(2)
        if self.method == "nvfp4":
            scales = np.minimum(magnitude / np.float32(FP4_MAX) / scale, np.float32(FP8_MAX)).astype(FP8)
        elif self.method == "int4-weight":
            high, low = blocks.max(2), blocks.min(2)
            scales = (np.where(high > -low, high, low) / np.float32(-8)).astype(SCALES[self.scale])
        else:
            most = np.float32(127 if self.method == "int8-weight" else FP8_MAX)
            scales = (magnitude / most).astype(SCALES[self.scale])
        if self.part == "scales":
            found = scales if self.method in BLOCKS else scales[:, 0]
            return found
        wide = scales.astype(np.float32) * (scale if self.method == "nvfp4" else np.float32(1))
        values = (blocks * _inverse(wide)[..., None]).reshape(rows.shape)
        if self.method == "fp8":
            found = np.clip(values, -FP8_MAX, FP8_MAX).astype(FP8)
        elif self.method == "int8-weight":
            found = np.clip(np.rint(values), -127, 127).astype(np.int8)
        else:
            if self.method == "int4-weight":
                codes = np.clip(np.rint(values), -8, 7).astype(np.int8).view(np.uint8)
            else:
                codes = np.clip(values, -FP4_MAX, FP4_MAX).astype(FP4).view(np.uint8)
            found = (codes[:, 0::2] & 15) | (codes[:, 1::2] << 4)
        return found


def restored(rows: np.ndarray, encoding: Encoding) -> np.ndarray:
    """float32 rows (r, k), all of a matrix, as they come back: what products with the stored matrix stand for."""
    method, largest = encoding.method, float(np.abs(rows).max(initial=0))
    parts = {part: Encoding(method, part, encoding.scale).encode(rows, largest) for part in parts_of(method)}
    codes, scales = parts["codes"], parts["scales"].astype(np.float32)
    if method == "int8":
        return np.asarray(codes * scales[:, None])
    if encoding.bits == 4:
        codes = np.stack([codes & 15, codes >> 4], -1)
    if method in TYPED:
        if method == "int4-weight":
            codes = (codes ^ 8).astype(np.int8) - 8
        values = (codes.view(FP4) if method == "nvfp4" else codes).astype(np.float32)
        width: int = rows.shape[1]
        values = values.reshape(len(rows), -1, BLOCKS.get(method, width)) * scales.reshape(len(rows), -1, 1)
        return np.asarray(values * parts.get("scale", np.float32(1))).reshape(rows.shape)
    codes = codes.reshape(len(rows), -1, BLOCK)
    values = (codes.astype(np.float32) - (1 << (encoding.bits - 1))) * scales[..., None]
    return np.asarray(values.reshape(len(rows), -1)[:, : rows.shape[1]])


def _inverse(scales: np.ndarray) -> np.ndarray:
    """1 / scales, and 0 where that is none."""
    found: np.ndarray = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    return found
