"""The launches of CausalConv1d, for compiling ahead of time (`matexport_plugins.aot`).

With a mask there are two: the first numbers the steps that count, and with its two outputs the second finds them.
"""

from __future__ import annotations

import torch
import triton

from matexport_plugins.aot import Launch
from matexport_plugins.causal_conv1d.triton_kernels import conv_kernel, count_kernel
from matexport_plugins.causal_conv1d.triton_tiles import conv_tiles

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def launches(
    *, channels: int, k: int, dtype: torch.dtype = torch.float32, step: bool = False, state: bool = False,
    mask: bool = False,
) -> list[Launch]:  # fmt: skip
    """The launches of one call, in order, on contiguous tensors.

    Args:
        dtype: of x and y. weight, bias and the states are float32.
        step: length 1, rather than any length.
        state, mask: whether these inputs are there.
    """
    BT, BC = conv_tiles(1 if step else 16)
    row = f"*{TYPES[dtype]}"
    steps, numbers = {"counts_ptr": "*i32", "places_ptr": "*i32"}, {"length": "length"}
    arguments = {"x_ptr": row, "weight_ptr": "*fp32", "bias_ptr": "*fp32"} | ({"state_ptr": "*fp32"} if state else {})
    arguments |= {"mask_ptr": "*i1", **steps} if mask else {}
    arguments |= {"length": "i32", "y_ptr": row, "final_ptr": "*fp32"}
    absent = {name for name in ("state_ptr", "mask_ptr", *steps) if name not in arguments}
    sizes = {"x_row": channels, "C": channels, "K": k, "BT": BT, "BC": BC, "KT": max(2, triton.next_power_of_2(k - 1))}
    grid = (str(triton.cdiv(channels, BC)), f"((length + {BT - 1}) // {BT})", "batch")
    outputs = {"y_ptr": ("batch", "length", str(channels)), "final_ptr": ("batch", str(channels), str(k - 1))}
    conv = Launch(conv_kernel, arguments, {**dict.fromkeys(absent), **sizes}, numbers, grid, outputs)
    if not mask:
        return [conv]
    count = Launch(
        count_kernel, {"mask_ptr": "*i1", "length": "i32", **steps}, {"BT": 1 if step else 1024}, numbers,
        ("batch", "1", "1"), dict.fromkeys(steps, ("batch", "length")),
    )  # fmt: skip
    return [count, conv]
