"""Mamba2Scan for `matexport_plugins.tensorrt_plugins`: inputs, types, shapes, and the call of its kernels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from matexport_plugins.mamba2_scan.triton_tiles import workspace_size

if TYPE_CHECKING:
    import torch

LIKE_X = ("x", "dt_raw", "B", "C", "z", "y")
REQUIRED = ("x", "dt_raw", "A", "B", "C", "D", "dt_bias")


@dataclass(frozen=True)
class Mamba2Scan:
    """One node. See README.md for its attributes; `final_state`: whether it has that output."""

    groups: int = 1
    dt_limit: tuple[float, float] = (0.0, math.inf)
    final_state: bool = True
    name = "Mamba2Scan"
    required = len(REQUIRED)

    @classmethod
    def defaults(cls) -> dict[str, np.ndarray]:
        return cls().fields()

    @classmethod
    def from_fields(cls, fields: Mapping[str, np.ndarray]) -> Mamba2Scan:
        known = {**cls.defaults(), **fields}
        groups, limit, final = (known[name].ravel() for name in ("groups", "dt_limit", "final_state"))
        if groups.size != 1 or groups[0] < 1 or limit.size != 2 or not limit[0] <= limit[1]:
            raise ValueError(f"Mamba2Scan: groups {groups.tolist()} and dt_limit {limit.tolist()} make no sense")
        return cls(int(groups[0]), (float(limit[0]), float(limit[1])), bool(final.all()))

    @property
    def outputs(self) -> int:
        return 2 if self.final_state else 1

    def fields(self) -> dict[str, np.ndarray]:
        numbers = {"groups": self.groups, "final_state": int(self.final_state)}
        limit = {"dt_limit": np.array(self.dt_limit, np.float32)}
        return {k: np.array([v], np.int32) for k, v in numbers.items()} | limit

    def names(self, types: Sequence[str], ranks: Sequence[int]) -> list[str]:
        optional = ("mask" if t == "bool" else "z" if r == 3 else "state" for t, r in zip(types, ranks, strict=True))
        return [*REQUIRED, *list(optional)[self.required :]]

    def takes(self, name: str, kind: str, x: str) -> bool:
        if name in LIKE_X:
            return kind == x and kind in ("float32", "float16", "bfloat16")
        return kind == ("bool" if name == "mask" else "float32")

    def shapes(self, inputs: Sequence[Any], make: Any) -> list[list[Any]]:
        x, heads, B = inputs[0], inputs[2][0], inputs[3]
        state = [x[0], heads, make.divide(B[2], self.groups), make.divide(x[2], heads)]
        return [[*x], state][: self.outputs]

    def workspace(self, shapes: Mapping[str, Sequence[int]], x: str) -> int:
        (batch, length, width), [heads] = shapes["x"], shapes["A"]
        P, N = width // heads, shapes["B"][2] // self.groups
        return workspace_size(batch, length, heads, self.groups, P, N, x == "float32")

    def run(self, tensors: Mapping[str, torch.Tensor], outputs: Sequence[torch.Tensor], workspace: Any) -> None:
        from matexport_plugins.mamba2_scan.triton_op import mamba2_scan

        given: dict[str, Any] = {**tensors, "groups": self.groups, "dt_limit": self.dt_limit, "workspace": workspace}
        state = outputs[1] if self.final_state else None
        mamba2_scan(**given, out=outputs[0], out_state=state, final_state=self.final_state)
