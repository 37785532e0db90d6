"""CausalConv1d for `matexport_plugins.tensorrt_plugins`: inputs, types, shapes, and the call of its kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from matexport_plugins.causal_conv1d.triton_tiles import workspace_size

if TYPE_CHECKING:
    import torch

REQUIRED = ("x", "weight", "bias")


@dataclass(frozen=True)
class CausalConv1d:
    """One node; it has no attributes."""

    name = "CausalConv1d"
    required = len(REQUIRED)
    outputs = 2

    @classmethod
    def defaults(cls) -> dict[str, np.ndarray]:
        return {}

    @classmethod
    def from_fields(cls, fields: Mapping[str, np.ndarray]) -> CausalConv1d:
        return cls()

    def fields(self) -> dict[str, np.ndarray]:
        return {}

    def names(self, types: Sequence[str], ranks: Sequence[int]) -> list[str]:
        return [*REQUIRED, *("mask" if kind == "bool" else "state" for kind in types[self.required :])]

    def takes(self, name: str, kind: str, x: str) -> bool:
        if name in ("x", "y"):
            return kind == x and kind in ("float32", "float16", "bfloat16")
        return kind == ("bool" if name == "mask" else "float32")

    def shapes(self, inputs: Sequence[Any], make: Any) -> list[list[Any]]:
        x, k = inputs[0], inputs[1][2]
        return [[*x], [x[0], x[2], make.subtract(k, 1)]]

    def workspace(self, shapes: Mapping[str, Sequence[int]], x: str) -> int:
        return workspace_size(*shapes["x"][:2]) if "mask" in shapes else 0

    def run(self, tensors: Mapping[str, torch.Tensor], outputs: Sequence[torch.Tensor], workspace: Any) -> None:
        from matexport_plugins.causal_conv1d.triton_op import causal_conv1d

        causal_conv1d(**tensors, out=outputs[0], out_state=outputs[1], workspace=workspace)
