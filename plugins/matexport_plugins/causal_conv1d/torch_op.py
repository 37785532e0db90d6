"""`torch.ops.matexport.causal_conv1d`: the convolution in PyTorch, as shifted products. Importing registers it.

Shapes: b batch, l length, m channels, k taps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SCHEMA = "(Tensor x, Tensor weight, Tensor bias, Tensor? state=None, Tensor? mask=None) -> (Tensor, Tensor)"


@torch.library.custom_op("matexport::causal_conv1d", mutates_args=(), schema=SCHEMA)
def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, state: Tensor | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Shapes and equations as in README.md. Inputs of any floating type, on any device.

    Returns:
        y of x's type, zero where the mask is, and the final state in float32 (float64 where x is).

    Raises:
        ValueError: shapes that do not fit.
    """
    _check(x, weight, bias, state, mask)
    inside = torch.promote_types(x.dtype, torch.float32)
    (b, l, m), k = x.shape, weight.shape[-1]
    before = x.new_zeros((b, k - 1, m), dtype=inside) if state is None else state.to(inside).transpose(1, 2)
    steps = torch.cat([before, x.to(inside)], 1)  # (b, k - 1 + l, m)
    if mask is not None:  # masked steps first, then the state and the real steps side by side
        order = F.pad(mask, (k - 1, 0), value=True).int().argsort(dim=1, stable=True)
        steps = steps.gather(1, order[..., None].expand_as(steps))
    taps = weight.to(inside)[:, 0].T  # (k, m)
    y = bias.to(inside) + taps[0] * steps[:, :l]
    for i in range(1, k):
        y.addcmul_(taps[i], steps[:, i : i + l])
    if mask is not None:
        place = (order.argsort(1)[:, k - 1 :] - (k - 1)).clamp(min=0)
        y = torch.where(mask[..., None], y.gather(1, place[..., None].expand_as(y)), 0.0)
    return F.silu(y).to(x.dtype), steps[:, l:].transpose(1, 2).clone(memory_format=torch.contiguous_format)


@causal_conv1d.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, state: Tensor | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    inside = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty((x.shape[0], x.shape[2], weight.shape[-1] - 1), dtype=inside)


def _check(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor | None, mask: Tensor | None) -> None:
    """Takes the sizes from x and weight; every other input has to fit them."""
    if (x.dim(), weight.dim()) != (3, 3):
        raise ValueError(f"causal_conv1d: x and weight need 3 axes, not {x.dim()} and {weight.dim()}")
    (b, l, m), k = x.shape, weight.shape[-1]
    if l < 1 or k < 1:
        raise ValueError("causal_conv1d: x needs at least one step, and weight one tap")
    wanted = {
        "weight": (weight, (m, 1, k)), "bias": (bias, (m,)), "state": (state, (b, m, k - 1)), "mask": (mask, (b, l)),
    }  # fmt: skip
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"causal_conv1d: {name} is {tuple(tensor.shape)}, and {shape} would fit x and weight")
