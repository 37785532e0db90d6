"""`torch.ops.matexport.mamba2_scan`: the scan in PyTorch, by chunks of matrix products. Importing registers it.

Method: SSD paper (arXiv 2405.21060), section 6, one chunk after the other, so that no chunk's matrices are kept.
Shapes: b batch, l length, h heads, g groups, r = h / g, n state, p head dim, q steps in a chunk (indices i, j).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
SCHEMA = """(Tensor x, Tensor dt_raw, Tensor A, Tensor B, Tensor C, Tensor D, Tensor dt_bias, Tensor? state=None,
Tensor? mask=None, Tensor? z=None, *, int groups=1, float[]? dt_limit=None) -> (Tensor, Tensor)"""


@torch.library.custom_op("matexport::mamba2_scan", mutates_args=(), schema=SCHEMA)
def mamba2_scan(
    x: Tensor, dt_raw: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, state: Tensor | None = None,
    mask: Tensor | None = None, z: Tensor | None = None, *, groups: int = 1, dt_limit: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Shapes and equations as in README.md. Inputs of any floating type, on any device.

    Returns:
        y of x's type, zero where the mask is, and the final state in float32 (float64 where x is).

    Raises:
        ValueError: shapes that do not fit, or a dt_limit that is no range.
    """
    _check(x, dt_raw, A, B, C, D, dt_bias, state, mask, z, groups, dt_limit)
    inside = torch.promote_types(x.dtype, torch.float32)
    (b, l, _), h = x.shape, len(A)
    n, p, r = B.shape[2] // groups, x.shape[2] // h, h // groups
    A, D = A.to(inside), D.to(inside)
    dt = F.softplus(dt_raw.to(inside) + dt_bias.to(inside))
    if dt_limit is not None:
        dt = dt.clamp(*dt_limit)
    x4 = x.to(inside).view(b, l, h, p)
    B4, C4 = (v.to(inside).view(b, l, groups, n) for v in (B, C))
    if mask is not None:  # what masked steps hold may be NaN
        dt = torch.where(mask[..., None], dt, 0.0)
        x4, B4 = (torch.where(mask[..., None, None], v, 0.0) for v in (x4, B4))
    S = x4.new_zeros(b, h, n, p) if state is None else state.to(inside)
    step = _one_step if l == 1 else _chunks
    y, S = step(x4, dt, A, B4.transpose(1, 2), C4.transpose(1, 2), S, groups, r)
    y = (y + D[:, None] * x4).view(b, l, h * p)
    if z is not None:
        y = y * F.silu(z.to(inside))
    if mask is not None:
        y = torch.where(mask[..., None], y, 0.0)
    return y.to(x.dtype), S


def _one_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, S: Tensor, g: int, r: int
) -> tuple[Tensor, Tensor]:
    """x (b, 1, h, p), dt (b, 1, h), B, C (b, g, 1, n), S (b, h, n, p) -> y and the new state."""
    b, _, h, p = x.shape
    scaled = (dt[..., None] * x).view(b, g, r, 1, p)
    added = B.transpose(2, 3).unsqueeze(2) * scaled  # b g r n p
    S = torch.exp(dt[:, 0] * A)[..., None, None] * S + added.view(S.shape)
    y = torch.matmul(C.unsqueeze(2), S.view(b, g, r, -1, p))
    return y.view(b, 1, h, p), S


def _chunks(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, S: Tensor, g: int, r: int) -> tuple[Tensor, Tensor]:
    """x (b, l, h, p), dt (b, l, h), B, C (b, g, l, n), S (b, h, n, p) -> y and the new state."""
    b, l, h, p = x.shape
    y = torch.empty_like(x)
    S = S.view(b, g, r, -1, p).transpose(2, 3).reshape(b, g, -1, r * p)  # all heads of a group in one product
    for start in range(0, l, CHUNK):
        steps = slice(start, min(start + CHUNK, l))
        q = steps.stop - start
        Bq, Cq, dtq = B[:, :, steps], C[:, :, steps], dt[:, steps].transpose(1, 2)  # b g q n, b h q
        X = (dtq[..., None] * x[:, steps].transpose(1, 2)).view(b, g, r, q, p)
        # in float64: differences of float32 sums cancel where decay is strong
        sums = (dtq.double() * A[:, None]).cumsum(2).view(b, g, r, q)
        causal = torch.ones(q, q, dtype=torch.bool, device=x.device).tril()
        decay = torch.where(causal, (sums[..., None] - sums[..., None, :]).to(x.dtype), -math.inf).exp()  # b g r i j
        scores = torch.matmul(Cq, Bq.transpose(2, 3)).unsqueeze(2) * decay
        since_start = sums.to(x.dtype).exp()[..., None]  # b g r q 1
        carried = torch.matmul(Cq, S).view(b, g, q, r, p).transpose(2, 3)
        part = torch.matmul(scores, X) + since_start * carried
        y[:, steps] = part.view(b, h, q, p).transpose(1, 2)
        to_end = (X * decay[:, :, :, -1, :, None]).transpose(2, 3).reshape(b, g, q, r * p)
        whole = since_start[:, :, :, -1].expand(b, g, r, p).reshape(b, g, 1, r * p)
        S = whole * S + torch.matmul(Bq.transpose(2, 3), to_end)
    return y, S.view(b, g, -1, r, p).transpose(2, 3).reshape(b, h, -1, p)


@mamba2_scan.register_fake
def _(
    x: Tensor, dt_raw: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, state: Tensor | None = None,
    mask: Tensor | None = None, z: Tensor | None = None, *, groups: int = 1, dt_limit: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (b, _, width), h = x.shape, A.shape[0]
    inside = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty((b, h, B.shape[2] // groups, width // h), dtype=inside)


def _check(
    x: Tensor, dt_raw: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, state: Tensor | None,
    mask: Tensor | None, z: Tensor | None, groups: int, dt_limit: Sequence[float] | None,
) -> None:  # fmt: skip
    """Takes the sizes from x, A and B; every other input has to fit them."""
    if (x.dim(), A.dim(), B.dim()) != (3, 1, 3):
        raise ValueError(f"mamba2_scan: x, A, B need 3, 1, 3 axes, not {x.dim()}, {A.dim()}, {B.dim()}")
    (b, l, width), h, gn = x.shape, len(A), B.shape[2]
    if l < 1:
        raise ValueError("mamba2_scan: x has no steps; its length must be at least 1")
    if groups < 1 or h < 1 or h % groups or width % h or gn % groups:
        raise ValueError(
            f"mamba2_scan: {h} heads must divide x's {width} channels; {groups} groups, the heads and B's {gn} channels"
        )
    if dt_limit is not None and not (len(dt_limit) == 2 and dt_limit[0] <= dt_limit[1]):
        raise ValueError("mamba2_scan: dt_limit must be two numbers, the smaller one first")
    wanted = {
        "dt_raw": (dt_raw, (b, l, h)), "B": (B, (b, l, gn)), "C": (C, (b, l, gn)), "D": (D, (h,)),
        "dt_bias": (dt_bias, (h,)), "state": (state, (b, h, gn // groups, width // h)), "mask": (mask, (b, l)),
        "z": (z, (b, l, width)),
    }  # fmt: skip
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"mamba2_scan: {name} is {tuple(tensor.shape)}, and {shape} would fit x, A and B")
