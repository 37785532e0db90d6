"""Matrices in fewer bits, as arrays.

`int8` has a scale for each row. The block methods have one, s, for every `BLOCK` weights of a row: the value of largest
magnitude becomes the lowest code, and a weight is s * (code - 2^(bits - 1)), as in ONNX Runtime's `MatMulNBits`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

METHODS = ("int8", "int8-block", "int4-block")
PARTS = ("codes", "scales")
BLOCK = 32


@dataclass(frozen=True)
class Encoding:
    """One of the two arrays that a matrix (n, k) is stored as.

    Attributes:
        method: one of `METHODS`.
        part: "codes" or "scales".
    """

    method: str
    part: str

    @property
    def bits(self) -> int:
        return 4 if self.method == "int4-block" else 8

    @property
    def dtype(self) -> str:
        return "F32" if self.part == "scales" else "I8" if self.method == "int8" else "U8"

    def shape(self, n: int, k: int) -> tuple[int, ...]:
        """What is stored of a matrix (n, k)."""
        if self.method == "int8":
            return (n,) if self.part == "scales" else (k, n)
        blocks = -(-k // BLOCK)
        return (n, blocks) if self.part == "scales" else (n, blocks, BLOCK * self.bits // 8)

    def encode(self, rows: np.ndarray) -> np.ndarray:
        """float32 rows (r, k) as they are stored; codes of `int8` are still to be transposed."""
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


def restored(rows: np.ndarray, method: str) -> np.ndarray:
    """float32 rows (r, k) as they come back: the weights that products with the stored matrix stand for."""
    codes, scales = (Encoding(method, part).encode(rows) for part in PARTS)
    if method == "int8":
        return np.asarray(codes * scales[:, None])
    bits = Encoding(method, "codes").bits
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:2], BLOCK)
    values = (codes.astype(np.float32) - (1 << (bits - 1))) * scales[..., None]
    return np.asarray(values.reshape(len(rows), -1)[:, : rows.shape[1]])


def _inverse(scales: np.ndarray) -> np.ndarray:
    """1 / scales, and 0 where that is none."""
    found: np.ndarray = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    return found
