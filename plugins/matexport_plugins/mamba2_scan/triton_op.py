"""Mamba2Scan on torch tensors through Triton: checks sizes, chooses tiles, launches `triton_kernels.py`."""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any

import torch
import triton
from triton.runtime.errors import OutOfResources

from matexport_plugins.mamba2_scan.triton_kernels import scan_kernel, step_kernel, sums_kernel
from matexport_plugins.mamba2_scan.triton_tiles import MAX_SEGMENTS, Tiles, candidates, step_tile, useful_segments

INTERPRETED = not isinstance(scan_kernel, triton.JITFunction)
MAX_N = 256
_tuned: dict[tuple[Any, ...], Tiles] = {}


def mamba2_scan(
    x: torch.Tensor, dt_raw: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor,
    dt_bias: torch.Tensor, state: torch.Tensor | None = None, mask: torch.Tensor | None = None,
    z: torch.Tensor | None = None, *, groups: int = 1, dt_limit: tuple[float, float] = (0.0, math.inf),
    out: torch.Tensor | None = None, out_state: torch.Tensor | None = None, tiles: Tiles | None = None,
    segments: int | None = None, workspace: torch.Tensor | None = None, final_state: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Shapes and equations as in README.md. No gradients.

    Args:
        x, B, C, z: float32, float16 or bfloat16, all alike; dt_raw, A, D, dt_bias: any of these types. Batch and step
            strides of x, dt_raw, B, C and z are free as long as they agree: parts of a wider tensor need no copy.
        state: float32. mask: bool.
        out: where y goes. out_state: where the final state goes; for one step it may be `state` itself.
        tiles, segments: how the work is cut, for more than one step; by a rule, or as `tune` found, where None.
        workspace: memory for what is between the launches, float32, instead of new tensors; as many elements as
            `triton_tiles.workspace_size` says suffice. With less of it a sequence is cut into fewer segments, unless
            `segments` says how many.
        final_state: whether it is wanted; it can be larger than x.

    Returns:
        y (batch, length, heads * P) in x's type, zero where the mask is, and the final state (batch, heads, N, P),
        float32, or None. Products of matrices take operands in x's type (float32: three TF32 products) and add in
        float32; everything else is float32.

    Raises:
        ValueError: shapes, types or devices are not as above, or the workspace is too small.
        NotImplementedError: N > 256, or bfloat16 in Triton's interpreter, which computes it wrongly without a word.
    """
    batch, length, width, heads, P, N = check(x, dt_raw, A, B, C, D, dt_bias, state, mask, z, groups=groups)
    y = torch.empty((batch, length, width), dtype=x.dtype, device=x.device) if out is None else out
    final = torch.empty((batch, heads, N, P), device=x.device) if out_state is None and final_state else out_state
    for name, value, shape, dtype in (
        ("out", y, (batch, length, width), x.dtype), ("out_state", final, (batch, heads, N, P), torch.float32)
    ):  # fmt: skip
        if value is not None and (value.shape != shape or value.dtype != dtype or not value.is_contiguous()):
            raise ValueError(f"{name}: expected contiguous {dtype} {shape}")
    if out_state is not None and state is not None and length > 1 and out_state.data_ptr() == state.data_ptr():
        raise ValueError("out_state may be state itself for a length of 1 only")
    (x, x_row), (dt_raw, dt_row), (B, B_row), (C, C_row) = (rows(v) for v in (x, dt_raw, B, C))
    z, z_row = (None, 0) if z is None else rows(z)
    state, mask = (None if v is None else v.contiguous() for v in (state, mask))
    mask = None if mask is None else mask.view(torch.uint8)
    A, D, dt_bias = A.contiguous(), D.contiguous(), dt_bias.contiguous()
    sizes = {"HEADS": heads, "GROUPS": groups, "P": P, "N": N, "NT": max(16, triton.next_power_of_2(N))}
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        if length == 1:
            PT = step_tile(batch * heads, P, processors(x.device))
            step_kernel[(triton.cdiv(P, PT), heads, batch)](
                x, dt_raw, A, B, C, D, dt_bias, state, mask, z, x_row, dt_row, B_row, C_row, z_row,
                *dt_limit, y, final, **sizes, PT=PT, num_warps=4 if sizes["NT"] * PT >= 2048 else 1,
            )  # fmt: skip
            return y, final
        if tiles is None:
            key = tuning_key(batch, length, heads, groups, P, N, x.dtype, x.device)
            tiles = _tuned.get(key) or choose(batch, length, heads, groups, P, N, x.dtype, x.device)
        Q = tiles.Q
        chunks, parts = triton.cdiv(length, Q), 3 if x.dtype == torch.float32 else 2
        scratch = Scratch(x.device, workspace)
        sums = scratch.take(parts, batch, heads, chunks * Q)
        HT = min(16, triton.next_power_of_2(heads))
        sums_kernel[(chunks, triton.cdiv(heads, HT), batch)](
            dt_raw, A, dt_bias, mask, length, dt_row, *dt_limit, sums, HEADS=heads, PARTS=parts, Q=Q, HT=HT
        )
        programs = groups * triton.cdiv(heads // groups, tiles.heads) * triton.cdiv(P, tiles.p)
        if segments is None:
            segments = useful_segments(programs * batch, length, processors(x.device))
            segments = min(segments, 1 + scratch.left // (batch * heads * (N * P + 1)))
        segment = triton.cdiv(chunks, segments) * Q
        segments = triton.cdiv(length, segment)
        options = {
            **sizes, "X_ROW": x_row, "B_ROW": B_row, "C_ROW": C_row, "Z_ROW": z_row, "PARTS": parts, "Q": Q,
            "HB": tiles.heads, "PT": tiles.p, "num_warps": tiles.warps, "num_stages": tiles.stages,
        }  # fmt: skip
        local = decay = None
        if segments > 1:
            local, decay = scratch.take(batch, segments - 1, heads, N, P), scratch.take(batch, segments - 1, heads)
            scan_kernel[(programs, segments - 1, batch)](
                x, sums, B, None, D, None, mask, None, length, chunks * Q, segment, None, None, local, decay,
                STATES_ONLY=True, **options,
            )  # fmt: skip
        scan_kernel[(programs, segments, batch)](
            x, sums, B, C, D, state, mask, z, length, chunks * Q, segment, y, final, local, decay,
            STATES_ONLY=False, **options,
        )  # fmt: skip
    return y, final


class Scratch:
    """Memory for tensors between launches: parts of one float32 tensor, or new ones where there is none."""

    def __init__(self, device: torch.device, memory: torch.Tensor | None) -> None:
        self.device, self.memory = device, memory

    @property
    def left(self) -> int:
        """How many elements can still be taken."""
        return 1 << 60 if self.memory is None else self.memory.numel()

    def take(self, *shape: int) -> torch.Tensor:
        """A tensor with any content. Raises ValueError where the memory does not suffice."""
        if self.memory is None:
            return torch.empty(shape, device=self.device)
        size = math.prod(shape)
        if size > self.left:
            raise ValueError(f"workspace: {self.left} elements are left where {size} are needed")
        taken, self.memory = self.memory[:size], self.memory[size:]
        return taken.view(shape)


def check(
    x: torch.Tensor, dt_raw: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor,
    dt_bias: torch.Tensor, state: torch.Tensor | None, mask: torch.Tensor | None, z: torch.Tensor | None, *,
    groups: int,
) -> tuple[int, int, int, int, int, int]:  # fmt: skip
    """(batch, length, width, heads, P, N), after every input was held to them. Raises as `mamba2_scan` does."""
    if x.dim() != 3 or B.dim() != 3 or A.dim() != 1 or min(x.shape) < 1:
        raise ValueError(f"x and B need three axes, A one, none empty: {tuple(x.shape)}, {tuple(B.shape)}")
    (batch, length, width), heads = x.shape, A.shape[0]
    if width % heads or heads % groups or B.shape[2] % groups:
        raise ValueError(f"width {width} and groups {groups} do not fit {heads} heads and B {tuple(B.shape)}")
    P, N = width // heads, B.shape[2] // groups
    types = (torch.float32, torch.float16, torch.bfloat16)
    expected = {
        "x": (x, x.shape, types), "dt_raw": (dt_raw, (batch, length, heads), types), "A": (A, (heads,), types),
        "B": (B, (batch, length, groups * N), (x.dtype,)), "C": (C, (batch, length, groups * N), (x.dtype,)),
        "D": (D, (heads,), types), "dt_bias": (dt_bias, (heads,), types),
        "state": (state, (batch, heads, N, P), (torch.float32,)), "mask": (mask, (batch, length), (torch.bool,)),
        "z": (z, x.shape, (x.dtype,)),
    }  # fmt: skip
    for name, (value, shape, dtypes) in expected.items():
        if value is not None and (value.shape != shape or value.dtype not in dtypes or value.device != x.device):
            found = f"{tuple(value.shape)}, {value.dtype}, on {value.device}"
            raise ValueError(
                f"{name}: {found}; expected {tuple(shape)}, {' or '.join(map(str, dtypes))}, on {x.device}"
            )
    if N > MAX_N:
        raise NotImplementedError(f"the Triton kernels hold states of N <= {MAX_N}, not {N}")
    refuse_interpreted_bfloat16(x, dt_raw, A, D, dt_bias)
    return batch, length, width, heads, P, N


def refuse_interpreted_bfloat16(*inputs: torch.Tensor) -> None:
    if INTERPRETED and any(v.dtype == torch.bfloat16 for v in inputs):
        raise NotImplementedError("Triton's interpreter computes bfloat16 wrongly: use float32 or float16, or a GPU")


def rows(v: torch.Tensor) -> tuple[torch.Tensor, int]:
    """v, or a copy, and the stride between steps with which element (b, t, c) lies at (b * length + t) * stride + c."""
    batch, length, channels = v.shape
    stride = v.stride(0) if length == 1 else v.stride(1)
    if (channels > 1 and v.stride(2) != 1) or (batch > 1 and v.stride(0) != length * stride):
        v, stride = v.contiguous(), channels
    return v, stride if batch * length > 1 else channels


@functools.cache
def processors(device: torch.device) -> int:
    """How many multiprocessors run at a time."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1


@functools.cache
def capability(device: torch.device) -> int:
    """90 for an H200."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def choose(
    batch: int, length: int, heads: int, groups: int, P: int, N: int, dtype: torch.dtype, device: torch.device
) -> Tiles:
    """By a rule: the likeliest tiles, with fewer heads to a program where the GPU would not be filled otherwise."""
    first = candidates(P, N, heads // groups, dtype == torch.float32, capability(device))[0]
    packed = first.heads
    tiles = triton.cdiv(P, first.p) * batch * groups * max(1, min(MAX_SEGMENTS, length // 256))
    while packed > 1 and tiles * triton.cdiv(heads // groups, packed) < processors(device):
        packed //= 2
    return Tiles(first.Q, packed, first.p, first.warps, first.stages)


def tuning_key(
    batch: int, length: int, heads: int, groups: int, P: int, N: int, dtype: torch.dtype, device: torch.device
) -> tuple[Any, ...]:
    return batch.bit_length(), length.bit_length(), heads, groups, P, N, dtype, device


def tune(x: torch.Tensor, dt_raw: torch.Tensor, A: torch.Tensor, B: torch.Tensor, *args: Any, **options: Any) -> Tiles:
    """Measures the candidate tiles on these inputs of `mamba2_scan` and keeps the fastest for calls of like size.

    Takes seconds, most of them for compiling; a call that was not tuned goes by a rule.
    """
    batch, length, width = x.shape
    heads, groups = A.shape[0], options.get("groups", 1)
    P, N = width // heads, B.shape[2] // groups
    seconds: dict[Tiles, float] = {}
    rule = choose(batch, length, heads, groups, P, N, x.dtype, x.device)
    for tiles in dict.fromkeys(
        [rule, *candidates(P, N, heads // groups, x.dtype == torch.float32, capability(x.device))]
    ):
        run = functools.partial(mamba2_scan, x, dt_raw, A, B, *args, **options, tiles=tiles)
        with contextlib.suppress(OutOfResources):  # a GPU with less shared memory
            seconds[tiles] = triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")
    best = min(seconds, key=lambda tiles: seconds[tiles])
    _tuned[tuning_key(batch, length, heads, groups, P, N, x.dtype, x.device)] = best
    return best
