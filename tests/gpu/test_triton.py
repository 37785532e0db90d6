"""The Triton kernels on an NVIDIA GPU: all types and sizes against the float64 reference, and compiled ahead of time.

Needs torch, triton, numpy and pytest: `PYTHONPATH=exporter:plugins python3 -m pytest tests/gpu`.
"""

from __future__ import annotations

import math
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="tests/gpu need PyTorch")
if not torch.cuda.is_available():
    pytest.skip("tests/gpu need an NVIDIA GPU and a CUDA build of PyTorch", allow_module_level=True)
pytest.importorskip("triton", reason="tests/gpu need Triton")

from cuda_driver import Module  # noqa: E402
from matexport_plugins import aot  # noqa: E402
from matexport_plugins.causal_conv1d import triton_aot as conv_aot  # noqa: E402
from matexport_plugins.mamba2_scan import triton_aot as scan_aot  # noqa: E402
from matexport_plugins.mamba2_scan import triton_tiles  # noqa: E402
from op_cases import conv_inputs, scan_inputs  # noqa: E402
from triton_ops import CASES, IDS, TOLERANCES, conv_op, errors, scan_op, tensors  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WIDE = {"batch": 2, "length": 197, "heads": 64, "N": 128, "groups": 1, "optional": "state mask"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "case"), CASES, ids=IDS)
def test_against_the_reference(op: str, case: dict[str, Any], dtype: Any) -> None:
    assert max(errors(op, case, dtype)) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("P", [16, 24, 48, 64])
def test_all_tiles_at_the_sizes_of_matmamba(P: int, dtype: Any) -> None:
    for tiles in triton_tiles.candidates(P, 128, 64, dtype == torch.float32, scan_op.capability(torch.device("cuda"))):
        for segments in (1, 2):
            found = errors("scan", {**WIDE, "P": P, "length": 300}, dtype, tiles=tiles, segments=segments)
            assert max(found) < TOLERANCES[dtype], (tiles, segments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("P", [16, 24, 48, 64, 80])
def test_a_step_at_the_sizes_of_matmamba(P: int, dtype: Any) -> None:
    assert max(errors("scan", {**WIDE, "P": P, "length": 1, "batch": 5}, dtype)) < TOLERANCES[dtype]


def test_a_captured_graph_computes_the_same() -> None:
    inputs = tensors(scan_inputs(**WIDE, P=32), torch.bfloat16)
    want = [v.clone() for v in scan_op.mamba2_scan(**inputs)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = scan_op.mamba2_scan(**inputs)
    for v in got:
        v.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("code", ["ptx", "cubin"])
@pytest.mark.parametrize("step", [False, True])
def test_what_was_compiled_ahead_of_time_computes_the_same(step: bool, code: str) -> None:
    """Launched through the driver with the arguments that are said to be there, and no Triton."""
    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor not in aot.PTX_ISA:
        pytest.skip(f"no ahead-of-time target for compute capability {major}.{minor}")
    case = {**WIDE, "P": 24, "length": 1 if step else 197, "optional": "state"}
    inputs = tensors(scan_inputs(**case), torch.bfloat16)
    want = scan_op.mamba2_scan(**inputs)
    values = {f"{k}_ptr": v for k, v in inputs.items()}
    values |= {"dt_ptr": values.pop("dt_raw_ptr"), "bias_ptr": values.pop("dt_bias_ptr")}
    values |= {"y_ptr": torch.full_like(want[0], torch.nan), "final_ptr": torch.full_like(want[1], torch.nan)}
    launches = scan_aot.launches(heads=64, P=24, N=128, dtype=torch.bfloat16, step=step, state=True)
    values["sums_ptr"] = torch.full((3 * 2 * 64 * 256,), torch.nan, device="cuda")
    for launch in launches:
        compiled = aot.compile_kernel(launch, 10 * major + minor)
        Module(compiled, code).launch(values, batch=case["batch"], length=case["length"])
    torch.cuda.synchronize()
    for got, expected in ((values["y_ptr"], want[0]), (values["final_ptr"], want[1])):
        assert (got.float() - expected.float()).abs().max() <= 1e-2 * expected.float().abs().max()


def test_the_compiled_convolution_computes_the_same() -> None:
    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor not in aot.PTX_ISA:
        pytest.skip(f"no ahead-of-time target for compute capability {major}.{minor}")
    inputs = tensors(conv_inputs(batch=2, length=50, channels=300, k=4, optional="state"), torch.float32)
    want = conv_op.causal_conv1d(**inputs)
    [launch] = conv_aot.launches(channels=300, k=4, state=True)
    values = {f"{k}_ptr": v for k, v in inputs.items()}
    values |= {"y_ptr": torch.full_like(want[0], math.nan), "final_ptr": torch.full_like(want[1], math.nan)}
    Module(aot.compile_kernel(launch, 10 * major + minor), "ptx").launch(values, batch=2, length=50)
    torch.cuda.synchronize()
    assert (values["y_ptr"] - want[0]).abs().max() < 1e-5
    assert torch.equal(values["final_ptr"], want[1])
