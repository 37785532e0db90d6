"""Triton kernels of CausalConv1d. See README.md for the equations; `triton_op.py` launches them on torch tensors.

Steps that count are numbered from 1: without a mask, step t has number t + 1. A window ends at a number and reaches
back over the numbers before it; what is 0 or less lies in the state. A mask is turned into numbers, and back, once:
`counts` (batch, length) is the number of the last step that counts up to t, `places` (batch, length) the step of a
number.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def count_kernel(mask_ptr, length, counts_ptr, places_ptr, BT: tl.constexpr):
    """Numbers of the steps that count, and the steps of the numbers. Grid: (batch)."""
    at = tl.program_id(0).to(tl.int64) * length
    before = tl.zeros([], tl.int32)
    for t0 in range(0, length, BT):
        t = t0 + tl.arange(0, BT)
        real = (tl.load(mask_ptr + at + t, mask=t < length, other=0) != 0).to(tl.int32)
        counts = before + tl.cumsum(real, 0)
        tl.store(counts_ptr + at + t, counts, mask=t < length)
        tl.store(places_ptr + at + counts - 1, t, mask=real != 0)
        before += tl.sum(real, 0)


@triton.jit
def value_of(number, x_ptr, state_ptr, places_ptr, b, length, x_row, channel, inside, K: tl.constexpr, C: tl.constexpr):
    """x of the steps with these numbers, or what the state holds: (numbers, channels), float32."""
    seen = number >= 1
    t = number - 1
    if places_ptr is not None:
        t = tl.load(places_ptr + b * length + t, mask=seen, other=0)
    at = (b * length + t)[:, None] * x_row + channel[None, :]
    value = tl.load(x_ptr + at, mask=seen[:, None] & inside[None, :], other=0.0).to(tl.float32)
    if state_ptr is not None:
        old = (b * C + channel[None, :]) * (K - 1) + (number + (K - 2))[:, None]
        held = (number <= 0) & (number > 1 - K)
        value += tl.load(state_ptr + old, mask=held[:, None] & inside[None, :], other=0.0).to(tl.float32)
    return value


@triton.jit
def conv_kernel(
    x_ptr, weight_ptr, bias_ptr, state_ptr, mask_ptr, counts_ptr, places_ptr, length, x_row, y_ptr, final_ptr,
    C: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, KT: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of BC channels, tiles of BT steps, batch). The last tile of steps writes the final state as well."""
    b = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = channel < C
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    number, valid = t + 1, t < length
    if counts_ptr is not None:
        number = tl.load(counts_ptr + b * length + t, mask=valid, other=0)
        valid = valid & (tl.load(mask_ptr + b * length + t, mask=valid, other=0) != 0)
    sums = tl.zeros([BT, BC], tl.float32)
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    for k in range(K):
        tap = tl.load(weight_ptr + channel * K + k, mask=inside, other=0.0).to(tl.float32)
        last = tl.where(valid, number - (K - 1) + k, -K)  # where a step does not count, nothing is read
        sums += tap[None, :] * value_of(last, x_ptr, state_ptr, places_ptr, b, length, x_row, channel, inside, K, C)
    y = tl.where(valid[:, None], sums / (1.0 + tl.exp(-sums)), 0.0)
    at_y = (b * length + t)[:, None] * C + channel[None, :]
    tl.store(y_ptr + at_y, y.to(y_ptr.dtype.element_ty), mask=(t < length)[:, None] & inside[None, :])
    if tl.program_id(1) == tl.num_programs(1) - 1:
        total = length
        if counts_ptr is not None:
            total = tl.load(counts_ptr + b * length + length - 1)
        column = tl.arange(0, KT)
        kept = tl.where(column < K - 1, total - (K - 2) + column, -K)
        new = value_of(kept, x_ptr, state_ptr, places_ptr, b, length, x_row, channel, inside, K, C)
        at = (b * C + channel[None, :]) * (K - 1) + column[:, None]
        tl.store(final_ptr + at, new.to(final_ptr.dtype.element_ty), mask=(column < K - 1)[:, None] & inside[None, :])
