"""CausalConv1d on torch tensors through Triton: checks sizes, launches `triton_kernels.py`."""

from __future__ import annotations

import contextlib

import torch
import triton

from matexport_plugins.causal_conv1d.triton_kernels import conv_kernel, count_kernel
from matexport_plugins.causal_conv1d.triton_tiles import conv_tiles, workspace_size

INTERPRETED = not isinstance(conv_kernel, triton.JITFunction)


def causal_conv1d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, state: torch.Tensor | None = None,
    mask: torch.Tensor | None = None, *, out: torch.Tensor | None = None, out_state: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Shapes and equations as in README.md; k from 1 to 256. No gradients.

    Args:
        x, weight, bias, state: float32, float16 or bfloat16. Batch and step strides of x are free as long as they
            agree. No bias counts as zeros.
        mask: bool.
        out, out_state: where y and the final state go; contiguous, of the types below, and apart from the inputs.
        workspace: memory for what is between the launches, float32, instead of new tensors; of
            `triton_tiles.workspace_size` elements.

    Returns:
        y (batch, length, channels) in x's type, zero where the mask is, and the final state (batch, channels, k - 1) in
        the state's type, or float32. Sums are float32.

    Raises:
        ValueError: shapes, types or devices are not as above, or the workspace is too small.
        NotImplementedError: bfloat16 in Triton's interpreter, which computes it wrongly without a word.
    """
    if x.dim() != 3 or min(x.shape) < 1 or weight.dim() != 3 or not 1 <= weight.shape[2] <= 256:
        raise ValueError(f"x {tuple(x.shape)} or weight {tuple(weight.shape)}: expected three axes, k from 1 to 256")
    (batch, length, channels), k = x.shape, weight.shape[2]
    types = (torch.float32, torch.float16, torch.bfloat16)
    expected = {
        "x": (x, x.shape, types), "weight": (weight, (channels, 1, k), types), "bias": (bias, (channels,), types),
        "state": (state, (batch, channels, k - 1), types), "mask": (mask, (batch, length), (torch.bool,)),
    }  # fmt: skip
    for name, (value, shape, dtypes) in expected.items():
        if value is not None and (value.shape != shape or value.dtype not in dtypes or value.device != x.device):
            found = f"{tuple(value.shape)}, {value.dtype}, on {value.device}"
            raise ValueError(
                f"{name}: {found}; expected {tuple(shape)}, {' or '.join(map(str, dtypes))}, on {x.device}"
            )
    if INTERPRETED and torch.bfloat16 in [v.dtype for v in (x, weight, bias, state) if v is not None]:
        raise NotImplementedError("Triton's interpreter computes bfloat16 wrongly: use float32 or float16, or a GPU")
    x_row = x.stride(0) if length == 1 else x.stride(1)
    if (channels > 1 and x.stride(2) != 1) or (batch > 1 and x.stride(0) != length * x_row):
        x, x_row = x.contiguous(), channels
    weight = weight.contiguous()
    bias, state, mask = (None if v is None else v.contiguous() for v in (bias, state, mask))
    dtype = torch.float32 if state is None else state.dtype
    y = torch.empty((batch, length, channels), dtype=x.dtype, device=x.device) if out is None else out
    final = torch.empty((batch, channels, k - 1), dtype=dtype, device=x.device) if out_state is None else out_state
    if y.shape != x.shape or y.dtype != x.dtype or not y.is_contiguous():
        raise ValueError(f"out: expected contiguous {x.dtype} {tuple(x.shape)}")
    if final.shape != (batch, channels, k - 1) or final.dtype != dtype or not final.is_contiguous():
        raise ValueError(f"out_state: expected contiguous {dtype} {(batch, channels, k - 1)}")
    counts = places = None
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        if mask is not None:
            mask = mask.view(torch.uint8)
            if workspace is None:
                workspace = torch.empty(workspace_size(batch, length), device=x.device)
            if workspace.numel() < workspace_size(batch, length):
                raise ValueError(f"workspace: expected {workspace_size(batch, length)} elements of float32")
            counts, places = workspace.view(torch.int32)[: 2 * batch * length].view(2, batch, length)
            count_kernel[(batch,)](mask, length, counts, places, BT=min(1024, triton.next_power_of_2(length)))
        BT, BC = conv_tiles(length)
        grid = (triton.cdiv(channels, BC), triton.cdiv(length, BT), batch)
        conv_kernel[grid](
            x, weight, bias, state, mask, counts, places, length, x_row, y, final,
            C=channels, K=k, BT=BT, BC=BC, KT=max(2, triton.next_power_of_2(k - 1)), num_warps=4,
        )  # fmt: skip
    return y, final
