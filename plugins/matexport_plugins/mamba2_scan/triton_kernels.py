"""Triton kernels of Mamba2Scan. See README.md for the equations; `triton_op.py` launches them on torch tensors.

Parameters are inputs, numbers, outputs, the order in which TensorRT's ahead-of-time plugins pass them.

A program takes a few heads of one group (and a tile of their head dim) through a piece of the sequence, chunk by chunk,
with their states in registers. In a chunk of Q steps (Mamba-2, arXiv 2405.21060, section 6), for each head,

    y_t = (decay from the chunk's start to t) C_t S + sum over s <= t of W[t][s] x_s,
          W[t][s] = C_t . B_s (decay from s to t) dt_s, plus D on the diagonal;
    S   = (decay of the chunk) S + sum over s of B_s (decay from s to the end) dt_s x_s^T.

B and C are read, and C . B is computed, once for all heads of the program. Decays are exp2 of sums of dt A log2(e) over
steps, never of a positive number; dt_s enters as log2(dt_s), so that a masked step, dt = 0, is exp2(-inf) = 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# 2**-200 is 0 in float32, so a step that decays more than this decays as much. It bounds the sums over a chunk.
FLOOR = tl.constexpr(-200.0)


@triton.jit
def softplus(v):
    """log(1 + exp(v)), to float32's relative precision also where it is small."""
    e = tl.exp(-tl.abs(v))
    u = 1.0 + e
    # log(u) e / (u - 1) is log1p(e): what rounding u loses cancels (Higham, Accuracy and Stability, problem 1.5)
    return tl.maximum(v, 0.0) + tl.where(u == 1.0, e, tl.log(u) * e / tl.where(u == 1.0, 1.0, u - 1.0))


@triton.jit
def step_sizes(v, dt_min, dt_max):
    return tl.minimum(tl.maximum(softplus(v), dt_min), dt_max)


@triton.jit
def sums_kernel(
    dt_ptr, A_ptr, bias_ptr, mask_ptr, length, dt_row, dt_min, dt_max, sums_ptr,
    HEADS: tl.constexpr, PARTS: tl.constexpr, Q: tl.constexpr, HT: tl.constexpr,
):  # fmt: skip
    """What the decays of a chunk are differences of. Grid: (chunks, tiles of HT heads, batch).

    Writes `sums` (PARTS, batch, heads, chunks * Q): the sum of dt A log2(e) from the chunk's start up to and with a
    step, and the same less log2(dt) of that step: infinity for a step that does not count. With three parts, the sums
    of integers come first and those of fractions follow: integers add exactly, so that no difference cancels where
    decay is strong.
    """
    b = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * Q + tl.arange(0, Q)
    h = tl.program_id(1) * HT + tl.arange(0, HT)
    valid = t < length
    if mask_ptr is not None:
        valid = valid & (tl.load(mask_ptr + b * length + t, mask=valid, other=0) != 0)
    inside = valid[None, :] & (h < HEADS)[:, None]
    raw = tl.load(dt_ptr + (b * length + t)[None, :] * dt_row + h[:, None], mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + h, mask=h < HEADS, other=0.0).to(tl.float32)
    A = tl.load(A_ptr + h, mask=h < HEADS, other=0.0).to(tl.float32) * LOG2_E
    dt = tl.where(inside, step_sizes(raw + bias[:, None], dt_min, dt_max), 0.0)
    steps = tl.maximum(dt * A[:, None], FLOOR)
    padded = tl.num_programs(0) * Q
    at = sums_ptr + (b * HEADS + h[:, None]) * padded + t[None, :]
    part = tl.num_programs(2).to(tl.int64) * HEADS * padded
    here = (h < HEADS)[:, None] & (t < padded)[None, :]
    if PARTS == 3:
        whole = tl.floor(steps + 0.5)
        steps -= whole
        tl.store(at, tl.cumsum(whole, 1), mask=here)
        at += part
    total = tl.cumsum(steps, 1)
    tl.store(at, total, mask=here)
    tl.store(at + part, total - tl.log2(dt), mask=here)


@triton.jit
def scan_kernel(
    x_ptr, sums_ptr, B_ptr, C_ptr, D_ptr, state_ptr, mask_ptr, z_ptr, length, padded, segment,
    y_ptr, final_ptr, local_ptr, decay_ptr,
    X_ROW: tl.constexpr, B_ROW: tl.constexpr, C_ROW: tl.constexpr, Z_ROW: tl.constexpr,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, STATES_ONLY: tl.constexpr,
    PARTS: tl.constexpr, Q: tl.constexpr, HB: tl.constexpr, PT: tl.constexpr, NT: tl.constexpr,
):  # fmt: skip
    """Grid: (groups x packs of HB heads x tiles of PT of the head dim, segments, batch).

    With several segments, each of `segment` steps, a first launch with STATES_ONLY takes all but the last from a state
    of zeros and writes what they end with to `local` (batch, segments - 1, heads, N, P), and the log2 of their decay
    to `decay` (batch, segments - 1, heads). The second launch begins with what those say.

    Optional inputs are None where absent. `*_ROW` are strides from one step to the next, in elements.
    """
    SHARE: tl.constexpr = HEADS // GROUPS
    P_TILES: tl.constexpr = (P + PT - 1) // PT
    PACKS: tl.constexpr = (SHARE + HB - 1) // HB
    EXACT: tl.constexpr = PARTS == 3
    PRECISION: tl.constexpr = "tf32x3" if EXACT else "tf32"  # only float32 asks
    pid, part, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    p = pid % P_TILES * PT + tl.arange(0, PT)
    group = pid // P_TILES // PACKS
    first = pid // P_TILES % PACKS * HB  # head within the group
    n, r = tl.arange(0, NT), tl.arange(0, Q)
    tile = n[:, None] * P + p[None, :]  # of a state
    # a comparison that always holds is left out: it would cost a register in every address
    in_n = True if NT == N else (n < N)[None, :]
    in_p = True if P % PT == 0 else (p < P)[None, :]
    in_tile = (n < N)[:, None] & (p < P)[None, :]
    parts = tl.num_programs(1) + (1 if STATES_ONLY else 0)
    sums = tl.num_programs(2).to(tl.int64) * HEADS * padded  # elements of one part

    states, skips, passed = (), (), ()
    for i in tl.static_range(HB):
        h = group * SHARE + tl.minimum(first + i, SHARE - 1)  # beyond the last head: that head again, stored twice
        S = tl.zeros([NT, PT], tl.float32)
        if not STATES_ONLY:
            if state_ptr is not None:
                S += tl.load(state_ptr + (b * HEADS + h) * (N * P) + tile, mask=in_tile, other=0.0)
            if local_ptr is not None:
                for j in range(0, part):
                    at = (b * (parts - 1) + j) * HEADS + h
                    before = tl.load(local_ptr + at * (N * P) + tile, mask=in_tile, other=0.0)
                    S = S * tl.exp2(tl.load(decay_ptr + at)) + before
        states = states + (S,)
        skips = skips + (tl.load(D_ptr + h).to(tl.float32),)
        passed = passed + (0.0,)

    start = part * segment
    end = tl.minimum(start + segment, length)
    for t0 in range(start, end, Q):
        row = b * length + t0
        valid = r < end - t0
        if mask_ptr is not None:
            valid = valid & (tl.load(mask_ptr + row + r, mask=valid, other=0) != 0)
        at_b = B_ptr + row * B_ROW + group * N + r[:, None] * B_ROW + n[None, :]
        B = tl.load(at_b, mask=valid[:, None] & in_n, other=0.0)
        if not STATES_ONLY:
            at_c = C_ptr + row * C_ROW + group * N + r[:, None] * C_ROW + n[None, :]
            C = tl.load(at_c, mask=valid[:, None] & in_n, other=0.0)
            products = tl.dot(C, tl.trans(B), input_precision=PRECISION)
        after, decayed = (), ()
        for i in tl.static_range(HB):
            h = group * SHARE + tl.minimum(first + i, SHARE - 1)
            inside = valid[:, None] & in_p
            x = tl.load(x_ptr + row * X_ROW + h * P + r[:, None] * X_ROW + p[None, :], mask=inside, other=0.0)
            at_s = sums_ptr + (b * HEADS + h) * padded + t0
            start_to, last = tl.load(at_s + r), tl.load(at_s + Q - 1)
            from_step = tl.load(at_s + (PARTS - 1) * sums + r)
            if EXACT:
                lo, last_lo = tl.load(at_s + sums + r), tl.load(at_s + sums + Q - 1)
                to_end = (last - start_to) + (last_lo - from_step)
                total = last + last_lo
            else:
                to_end = last - from_step
                total = last
            S = states[i]
            if not STATES_ONLY:
                if EXACT:
                    since = (start_to[:, None] - start_to[None, :]) + (lo[:, None] - from_step[None, :])
                    from_start = start_to + lo
                else:
                    since = start_to[:, None] - from_step[None, :]
                    from_start = start_to
                W = products * tl.exp2(tl.where(r[:, None] >= r[None, :], since, float("-inf")))
                W = tl.where(r[:, None] == r[None, :], W + skips[i], W)
                y = tl.dot(C, S.to(C.dtype), input_precision=PRECISION) * tl.exp2(from_start)[:, None]
                y = tl.dot(W.to(x.dtype), x, acc=y, input_precision=PRECISION)
                if z_ptr is not None:
                    at_z = z_ptr + row * Z_ROW + h * P + r[:, None] * Z_ROW + p[None, :]
                    z = tl.load(at_z, mask=inside, other=0.0).to(tl.float32)
                    y = y * z / (1.0 + tl.exp(-z))
                at_y = y_ptr + row * (HEADS * P) + h * P + r[:, None] * (HEADS * P) + p[None, :]
                tl.store(at_y, y.to(y_ptr.dtype.element_ty), mask=(r < end - t0)[:, None] & in_p)
            scaled = (x.to(tl.float32) * tl.exp2(to_end)[:, None]).to(x.dtype)
            after = after + (tl.dot(tl.trans(B), scaled, acc=S * tl.exp2(total), input_precision=PRECISION),)
            decayed = decayed + (passed[i] + total,)
        states, passed = after, decayed

    for i in tl.static_range(HB):
        h = group * SHARE + tl.minimum(first + i, SHARE - 1)
        if STATES_ONLY:
            at = (b * (parts - 1) + part) * HEADS + h
            tl.store(local_ptr + at * (N * P) + tile, states[i], mask=in_tile)
            tl.store(decay_ptr + at, passed[i])
        elif final_ptr is not None:
            if part == parts - 1:
                tl.store(final_ptr + (b * HEADS + h) * (N * P) + tile, states[i], mask=in_tile)


@triton.jit
def step_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, state_ptr, mask_ptr, z_ptr,
    x_row, dt_row, B_row, C_row, z_row, dt_min, dt_max, y_ptr, final_ptr,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PT: tl.constexpr, NT: tl.constexpr,
):  # fmt: skip
    """One step, in one pass over the state. Grid: (tiles of PT of the head dim, heads, batch).

    Every program reads its part of the state before it writes it: `final` may be `state`.
    """
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    group = h // (HEADS // GROUPS)
    n, p = tl.arange(0, NT), tl.program_id(0) * PT + tl.arange(0, PT)
    at = (b * HEADS + h) * (N * P) + n[:, None] * P + p[None, :]
    inside = (n < N)[:, None] & (p < P)[None, :]
    if state_ptr is not None:
        S = tl.load(state_ptr + at, mask=inside, other=0.0)
    else:
        S = tl.zeros([NT, PT], tl.float32)
    real = True
    if mask_ptr is not None:
        real = tl.load(mask_ptr + b) != 0
    raw = tl.load(dt_ptr + b * dt_row + h).to(tl.float32)
    dt = step_sizes(raw + tl.load(bias_ptr + h).to(tl.float32), dt_min, dt_max)
    x = tl.load(x_ptr + b * x_row + h * P + p, mask=p < P, other=0.0).to(tl.float32)
    B = tl.load(B_ptr + b * B_row + group * N + n, mask=n < N, other=0.0).to(tl.float32)
    C = tl.load(C_ptr + b * C_row + group * N + n, mask=n < N, other=0.0).to(tl.float32)
    step = S * tl.exp2(dt * tl.load(A_ptr + h).to(tl.float32) * LOG2_E) + B[:, None] * (dt * x)[None, :]
    if final_ptr is not None:
        tl.store(final_ptr + at, tl.where(real, step, S), mask=inside)
    y = tl.sum(step * C[:, None], 0) + tl.load(D_ptr + h).to(tl.float32) * x
    if z_ptr is not None:
        z = tl.load(z_ptr + b * z_row + h * P + p, mask=p < P, other=0.0).to(tl.float32)
        y = y * z / (1.0 + tl.exp(-z))
    y = tl.where(real, y, 0.0)
    tl.store(y_ptr + (b * HEADS + h) * P + p, y.to(y_ptr.dtype.element_ty), mask=p < P)
