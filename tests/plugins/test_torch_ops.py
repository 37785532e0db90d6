"""The torch ops as torch sees them: their registration, tracing with dynamic axes, and what they refuse."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from native_ops import ATTRIBUTES, CONV, INPUTS, SCAN, Op, error, part

OPS = {SCAN: torch.ops.matexport.mamba2_scan, CONV: torch.ops.matexport.causal_conv1d}
both_ops = pytest.mark.parametrize("op", [SCAN, CONV], ids=lambda op: op.name)


def tensors(op: Op, length: int = 100, batch: int = 2, *, without: tuple[str, ...] = ()) -> dict[str, Tensor]:
    inputs = part(INPUTS[op], 0, length, INPUTS[op]["state"])
    inputs = {k: v[:batch] if v.ndim > 1 and k != "weight" else v for k, v in inputs.items()}
    return {k: torch.from_numpy(np.array(v)) for k, v in inputs.items() if k not in without}


class Layer(torch.nn.Module):
    """The op between two others, as in a model."""

    def __init__(self, op: Op):
        super().__init__()
        self.op = op

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        y, state = OPS[self.op](**{**inputs, "x": inputs["x"] + 1}, **ATTRIBUTES[self.op])
        return y * 2, state


@both_ops
@pytest.mark.parametrize("length", [1, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_registration(op: Op, length: int, dtype: torch.dtype) -> None:
    for without in ((), ("state", "mask", "z")):
        inputs = {k: v.to(dtype) if k in "xBCz" else v for k, v in tensors(op, length, without=without).items()}
        torch.library.opcheck(OPS[op].default, (), {**inputs, **ATTRIBUTES[op]})


@both_ops
def test_export_with_dynamic_batch_and_length(op: Op) -> None:
    inputs, module = tensors(op, 40), Layer(op)
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    along = {"x", "dt_raw", "B", "C", "mask", "z"}
    dynamic = {k: axes if k in along else {0: torch.export.Dim.DYNAMIC} if k == "state" else None for k in inputs}
    program = torch.export.export(module, (inputs,), dynamic_shapes=(dynamic,))
    assert sum(str(node.target).startswith("matexport.") for node in program.graph.nodes) == 1
    for length, batch in ((1, 2), (33, 1), (100, 2)):
        given = tensors(op, length, batch)
        for got, want in zip(program.module()(given), module(given), strict=True):
            assert torch.equal(got, want)


@both_ops
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_with_dynamic_shapes(op: Op, backend: str) -> None:
    module = Layer(op)
    compiled = torch.compile(module, backend=backend, dynamic=True, fullgraph=True)
    for length in (40, 70, 1):
        inputs = tensors(op, length)
        for got, want in zip(compiled(inputs), module(inputs), strict=True):
            assert torch.equal(got, want)


@both_ops
def test_float64_is_computed_in_float64(op: Op) -> None:
    inputs = {k: v if v.dtype == torch.bool else v.double() for k, v in tensors(op).items()}
    want = op.reference(**INPUTS[op], **ATTRIBUTES[op])
    for got, expected in zip(OPS[op](**inputs, **ATTRIBUTES[op]), want, strict=True):
        assert got.dtype == torch.float64
        assert error(got.numpy(), expected) < 1e-13


@pytest.mark.parametrize(
    ("op", "name", "shape", "message"),
    [
        (SCAN, "dt_raw", (2, 100, 3), r"dt_raw is \(2, 100, 3\), and \(2, 100, 4\) would fit"),
        (SCAN, "B", (2, 100, 31), "4 heads must divide x's 96 channels; 2 groups, the heads and B's 31"),
        (SCAN, "x", (2, 9600), "x, A, B need 3, 1, 3 axes"),
        (SCAN, "x", (2, 0, 96), "at least 1"),
        (SCAN, "state", (2, 4, 24, 16), r"state is .*, and \(2, 4, 16, 24\)"),
        (CONV, "weight", (24, 1, 5), r"state is \(2, 24, 3\), and \(2, 24, 4\)"),
        (CONV, "x", (2, 0, 24), "at least one step"),
        (CONV, "weight", (24, 4), "need 3 axes"),
    ],
    ids=lambda v: getattr(v, "name", str(v)),
)
def test_shapes_that_do_not_fit_are_refused(op: Op, name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OPS[op](**{**tensors(op), name: torch.zeros(shape)}, **ATTRIBUTES[op])


@pytest.mark.parametrize("limit", [[1.0, 0.0], [0.0], [0.0, 1.0, 2.0]], ids=str)
def test_a_dt_limit_that_is_no_range_is_refused(limit: list[float]) -> None:
    with pytest.raises(ValueError, match="dt_limit must be two numbers"):
        OPS[SCAN](**tensors(SCAN), groups=2, dt_limit=limit)


def test_torch_is_imported_only_when_asked() -> None:
    code = (
        "import sys, matexport_plugins, matexport_plugins.mamba2_scan, matexport_plugins.causal_conv1d\n"
        "assert 'torch' not in sys.modules\n"
        "import matexport_plugins.mamba2_scan.torch_op\n"
        "import torch\n"
        "print(torch.ops.matexport.mamba2_scan)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "matexport.mamba2_scan" in done.stdout
