"""The CUDA kernels on an NVIDIA GPU: all types and sizes against the float64 reference, and the TensorRT plugins' life.

Needs torch, numpy and pytest, and libmatexport_cuda.so: the installed one, or an nvcc that makes it here.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="tests/gpu need PyTorch")
if not torch.cuda.is_available():
    pytest.skip("tests/gpu need an NVIDIA GPU and a CUDA build of PyTorch", allow_module_level=True)

import cuda_kernels  # noqa: E402
import matexport_plugins  # noqa: E402
from matexport_plugins.causal_conv1d.reference import causal_conv1d  # noqa: E402
from matexport_plugins.mamba2_scan.reference import mamba2_scan  # noqa: E402
from op_cases import CONV_CASES, SCAN_CASES, conv_inputs, error, name_of, scan_inputs  # noqa: E402

WIDE = {"batch": 2, "heads": 64, "N": 128, "groups": 1, "optional": "state mask"}
LONG = [{**WIDE, "batch": 1, "heads": 8, "P": P, "length": 5000} for P in (16, 48, 64)]  # cut into segments
MATMAMBA = [{**WIDE, "P": P, "length": n} for P in (16, 24, 32, 48, 64) for n in (1, 197)]
CASES = [("Mamba2Scan", case) for case in (*SCAN_CASES, *LONG, *MATMAMBA)]
CASES += [("CausalConv1d", case) for case in CONV_CASES]
TOLERANCES = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2.5e-2}  # of the largest value
KERNELS = cuda_kernels.SOURCES / cuda_kernels.KERNELS


def nvcc(*arguments: str) -> None:
    done = subprocess.run(["nvcc", "-std=c++17", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    installed = matexport_plugins.trt_library()
    if installed is not None:
        return installed
    if not shutil.which("nvcc"):
        pytest.skip("there is neither libmatexport_cuda nor an nvcc: the CUDA kernels were NOT run")
    target = tmp_path_factory.mktemp("cuda") / "libmatexport_cuda.so"
    sources = [str(KERNELS), str(KERNELS.with_name("trt_plugin.cc"))]
    nvcc("-O3", "-arch=native", "-shared", "-Xcompiler=-fPIC,-fvisibility=hidden", *sources, "-o", str(target))
    return target


@pytest.fixture(scope="module")
def library(path: Path) -> Any:
    return cuda_kernels.open_library(path)


def tensors(op: str, case: dict[str, Any], dtype: Any) -> dict[str, Any]:
    made = scan_inputs(**case) if op == "Mamba2Scan" else conv_inputs(**case)
    given = cuda_kernels.rounded({k: torch.from_numpy(v).cuda() for k, v in made.items()}, dtype)
    for name in cuda_kernels.ROUNDED if "mask" in given else ():
        if name in given:
            given[name][~given["mask"]] = torch.nan
    return given


def attributes(case: dict[str, Any]) -> dict[str, Any]:
    return {k: case[k] for k in ("groups", "dt_limit") if k in case}


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize(("op", "case"), CASES, ids=[f"{op}-{name_of(case)}" for op, case in CASES])
def test_against_the_reference(library: Any, op: str, case: dict[str, Any], dtype: Any) -> None:
    inputs = tensors(op, case, dtype)
    exact = {k: (v if v.dtype == torch.bool else v.double().nan_to_num()).cpu().numpy() for k, v in inputs.items()}
    reference = mamba2_scan if op == "Mamba2Scan" else causal_conv1d
    want, want_state = reference(**exact, **attributes(case))
    y, state = cuda_kernels.run(library, op, inputs, **attributes(case))
    assert error(y.double().cpu().numpy(), want) < TOLERANCES[dtype]
    assert error(state.double().cpu().numpy(), want_state) < TOLERANCES[dtype]
    if "mask" in inputs:
        assert not y[~inputs["mask"]].any()
    if "state" in inputs:
        again = cuda_kernels.run(library, op, inputs, in_place=True, **attributes(case))
        assert torch.equal(again[0], y)
        assert torch.equal(again[1], state)


def test_a_captured_graph_computes_the_same(library: Any) -> None:
    """Nothing in a launch waits or allocates."""
    inputs = tensors("Mamba2Scan", {**WIDE, "P": 32, "length": 197}, torch.bfloat16)
    want = cuda_kernels.run(library, "Mamba2Scan", inputs)
    call, memory = cuda_kernels.prepare(library, "Mamba2Scan", inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    memory["y"].fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(memory["y"], want[0])
    assert torch.equal(memory["final_state"], want[1])


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("nvcc"):
        pytest.skip("there is no nvcc: the TensorRT plugins were NOT run")
    target = tmp_path_factory.mktemp("harness") / "harness"
    nvcc("-x", "cu", str(KERNELS.with_name("trt_harness.cc")), "-o", str(target), "-ldl")
    return target


def test_the_plugins_live_on_device_memory(harness: Path, path: Path) -> None:
    done = subprocess.run([str(harness), str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("one life, right results") == 12


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_compute_sanitizer_finds_nothing(harness: Path, path: Path, tool: str) -> None:
    if not shutil.which("compute-sanitizer"):
        pytest.skip("there is no compute-sanitizer: races and reads of unwritten memory were NOT looked for")
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", str(harness), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
