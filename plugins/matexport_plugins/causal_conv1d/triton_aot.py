"""The launch of CausalConv1d, for compiling ahead of time (`matexport_plugins.aot`). Without a mask: that takes two."""

from __future__ import annotations

import torch
import triton

from matexport_plugins.aot import Launch
from matexport_plugins.causal_conv1d.triton_kernels import conv_kernel
from matexport_plugins.causal_conv1d.triton_op import conv_tiles

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def launches(
    *, channels: int, k: int, dtype: torch.dtype = torch.float32, step: bool = False, state: bool = False
) -> list[Launch]:
    """The launch of one call, on contiguous tensors.

    Args:
        dtype: of x and y. weight, bias and the states are float32.
        step: length 1, rather than any length.
        state: whether there is that input.
    """
    BT, BC = conv_tiles(1 if step else 16)
    row = f"*{TYPES[dtype]}"
    arguments = {"x_ptr": row, "weight_ptr": "*fp32", "bias_ptr": "*fp32"} | ({"state_ptr": "*fp32"} if state else {})
    arguments |= {"length": "i32", "y_ptr": row, "final_ptr": "*fp32"}
    absent = {"mask_ptr", "counts_ptr", "places_ptr"} | (set() if state else {"state_ptr"})
    sizes = {"x_row": channels, "C": channels, "K": k, "BT": BT, "BC": BC, "KT": max(2, triton.next_power_of_2(k - 1))}
    grid = (str(triton.cdiv(channels, BC)), f"((length + {BT - 1}) // {BT})", "batch")
    return [Launch(conv_kernel, arguments, {**dict.fromkeys(absent), **sizes}, {"length": "length"}, grid)]
