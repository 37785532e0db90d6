"""The launches of Mamba2Scan, for compiling ahead of time (`matexport_plugins.aot`).

A prefill is two launches with `sums`, a float32 tensor (parts, batch, heads, chunks * Q), between them; TensorRT's
quickly-deployable plugins launch one kernel each and have no workspace, so there it is two plugins. A step is one.
"""

from __future__ import annotations

import math

import torch
import triton

from matexport_plugins.aot import Launch
from matexport_plugins.mamba2_scan.triton_kernels import scan_kernel, step_kernel, sums_kernel
from matexport_plugins.mamba2_scan.triton_op import MAX_N
from matexport_plugins.mamba2_scan.triton_tiles import Tiles, candidates, head_tile

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def launches(
    *, heads: int, P: int, N: int, groups: int = 1, dtype: torch.dtype = torch.float32, step: bool = False,
    state: bool = False, mask: bool = False, z: bool = False, final_state: bool = True,
    dt_limit: tuple[float, float] = (0.0, math.inf), capability: int = 90, tiles: Tiles | None = None,
) -> list[Launch]:  # fmt: skip
    """The launches of one call, in order, on contiguous tensors.

    Args:
        dtype: of x, dt_raw, B, C, z and y. A, D, dt_bias and the states are float32.
        step: length 1, rather than any length.
        state, mask, z, final_state: whether these inputs and this output are there.
        capability: of the GPU that the tiles are chosen for, where `tiles` does not say.

    Raises:
        NotImplementedError: N > 256.
    """
    if N > MAX_N:
        raise NotImplementedError(f"the Triton kernels hold states of N <= {MAX_N}, not {N}")
    row = f"*{TYPES[dtype]}"
    types = {
        "x_ptr": row, "dt_ptr": row, "A_ptr": "*fp32", "B_ptr": row, "C_ptr": row, "D_ptr": "*fp32",
        "bias_ptr": "*fp32", "state_ptr": "*fp32", "mask_ptr": "*i1", "z_ptr": row, "y_ptr": row, "final_ptr": "*fp32",
        "sums_ptr": "*fp32",
    }  # fmt: skip
    optional = {"state_ptr": state, "mask_ptr": mask, "z_ptr": z, "final_ptr": final_state}
    absent = {name for name, there in optional.items() if not there}
    NT = max(16, triton.next_power_of_2(N))
    sizes = {"HEADS": heads, "GROUPS": groups, "P": P, "N": N, "NT": NT}
    limits = {"dt_min": float(dt_limit[0]), "dt_max": float(dt_limit[1])}

    width = heads * P
    outputs: dict[str, tuple[str, ...]] = {"y_ptr": ("batch", "length", str(width))}
    if final_state:
        outputs["final_ptr"] = ("batch", str(heads), str(N), str(P))

    def arguments(names: str) -> dict[str, str]:
        return {name: types.get(name, "i32") for name in names.split() if name not in absent}

    if step:
        PT = head_tile(P, N)
        strides = {"x_row": width, "dt_row": heads, "B_row": groups * N, "C_row": groups * N, "z_row": width}
        passed = arguments("x_ptr dt_ptr A_ptr B_ptr C_ptr D_ptr bias_ptr state_ptr mask_ptr z_ptr y_ptr final_ptr")
        constants = {**dict.fromkeys(absent), **strides, **limits, **sizes, "PT": PT}
        grid = (str(triton.cdiv(P, PT)), str(heads), "batch")
        return [Launch(step_kernel, passed, constants, {}, grid, outputs, warps=4 if NT * PT >= 2048 else 1)]
    tiles = tiles or candidates(P, N, heads // groups, dtype == torch.float32, capability)[0]
    Q, parts = tiles.Q, 3 if dtype == torch.float32 else 2
    HT = min(16, triton.next_power_of_2(heads))
    chunks = f"((length + {Q - 1}) // {Q})"
    sums = Launch(
        sums_kernel,
        arguments("dt_ptr A_ptr bias_ptr mask_ptr length sums_ptr"),
        {**dict.fromkeys(absent & {"mask_ptr"}), "dt_row": heads, **limits, "HEADS": heads, "PARTS": parts,
         "Q": Q, "HT": HT},
        {"length": "length"},
        (chunks, str(triton.cdiv(heads, HT)), "batch"),
        {"sums_ptr": (str(parts), "batch", str(heads), f"{chunks} * {Q}")},
    )  # fmt: skip
    strides = {"X_ROW": width, "B_ROW": groups * N, "C_ROW": groups * N, "Z_ROW": width}
    packs = groups * triton.cdiv(heads // groups, tiles.heads) * triton.cdiv(P, tiles.p)
    scan = Launch(
        scan_kernel,
        arguments("x_ptr sums_ptr B_ptr C_ptr D_ptr state_ptr mask_ptr z_ptr length padded segment y_ptr final_ptr"),
        {**dict.fromkeys({*absent, "local_ptr", "decay_ptr"}), **strides, **sizes, "STATES_ONLY": False, "PARTS": parts,
         "Q": Q, "HB": tiles.heads, "PT": tiles.p},
        {"length": "length", "padded": f"{chunks} * {Q}", "segment": f"{chunks} * {Q}"},
        (str(packs), "1", "batch"),
        outputs,
        warps=tiles.warps, stages=tiles.stages,
    )  # fmt: skip
    return [sums, scan]
