"""Runs the Triton kernels on a CUDA GPU, or else in Triton's interpreter; needs numpy, torch and triton.

The interpreter is chosen by a variable when Triton is imported, which transformers does too, without it. So Triton is
imported once more here, all of it but its compiled part; what others hold stays as it is.
"""

from __future__ import annotations

import os
import sys
from typing import Any
from unittest import mock

import numpy as np
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    for name in [name for name in sys.modules if name.split(".")[0] == "triton" and not name.startswith("triton._C")]:
        del sys.modules[name]
with mock.patch.dict(os.environ, {} if DEVICE == "cuda" else {"TRITON_INTERPRET": "1"}):
    import triton.experimental.gluon  # noqa: F401  (Triton's launch imports it, and it looks at the variable as well)

    from matexport_plugins.causal_conv1d import triton_op as conv_op
    from matexport_plugins.mamba2_scan import triton_op as scan_op

from matexport_plugins.causal_conv1d.reference import causal_conv1d as conv_reference  # noqa: E402
from matexport_plugins.mamba2_scan.reference import mamba2_scan as scan_reference  # noqa: E402
from op_cases import CONV_CASES, SCAN_CASES, conv_inputs, error, name_of, scan_inputs  # noqa: E402

CASES = [("scan", case) for case in SCAN_CASES] + [("conv", case) for case in CONV_CASES]
IDS = [f"{op}-{name_of(case)}" for op, case in CASES]
ROUNDED = ("x", "dt_raw", "B", "C", "z")
TOLERANCES = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2.5e-2}  # of the largest value


def tensors(inputs: dict[str, np.ndarray], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """On the device; what goes along the sequence in `dtype`, and NaN in every step that the mask hides."""
    made = {k: torch.from_numpy(v).to(DEVICE) for k, v in inputs.items()}
    made |= {k: v.to(dtype) for k, v in made.items() if k in ROUNDED}
    if "mask" in made:
        for name in ROUNDED:
            if name in made:
                made[name][~made["mask"]] = torch.nan
    return made


def float64(inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """For the reference: zeros in place of NaN, which the recurrence would spread."""
    exact = {k: v if v.dtype == torch.bool else v.double().nan_to_num() for k, v in inputs.items()}
    return {k: v.cpu().numpy() for k, v in exact.items()}


def errors(op: str, case: dict[str, Any], dtype: torch.dtype, **how: Any) -> tuple[float, float]:
    """Of y and of the final state, against the float64 reference of the rounded inputs. Unwritten memory is NaN."""
    inputs = tensors(scan_inputs(**case) if op == "scan" else conv_inputs(**case), dtype)
    attributes = {k: case[k] for k in ("groups", "dt_limit") if k in case}
    run, reference = (scan_op.mamba2_scan, scan_reference) if op == "scan" else (conv_op.causal_conv1d, conv_reference)
    torch.use_deterministic_algorithms(True)  # torch.empty is then full of NaN
    try:
        y, state = run(**inputs, **attributes, **how)
    finally:
        torch.use_deterministic_algorithms(False)
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    want, want_state = reference(**float64(inputs), **attributes)
    if "mask" in inputs:
        assert not y[~inputs["mask"]].any()
        unmoved = ~inputs["mask"].any(1)
        before = inputs.get("state", torch.zeros_like(state))
        assert torch.equal(state[unmoved], before[unmoved])
    return error(y.double().cpu().numpy(), want), error(state.double().cpu().numpy(), want_state)
