"""What is particular to the CUDA kernels: barriers, states in place, segments, unaligned memory, resources on each GPU.

Their results are compared with the reference in test_ops.py, as the backends cuda-on-cpu-*.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cuda_kernels
from cuda_kernels import CODES, KERNELS, SOURCES, conv_problem, kernels_on_cpu, rounded, run, scan_problem
from native_ops import ATTRIBUTES, CONV, INPUTS, SCAN, Op, conv_inputs, error, scan_inputs

needs_compiler = pytest.mark.skipif(not cuda_kernels.compiler(), reason="there is no C++ compiler")
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc: CUDA kernels were NOT compiled")
both_ops = pytest.mark.parametrize("op", [SCAN, CONV], ids=lambda op: op.name)
every_type = pytest.mark.parametrize("dtype", list(CODES), ids=str)
LONG = {"batch": 1, "length": 1180, "heads": 2, "P": 24, "N": 16, "groups": 1}  # cut into segments


def tensors(inputs: dict[str, np.ndarray], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return rounded({k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in inputs.items()}, dtype)


def example(op: Op, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return tensors(INPUTS[op], dtype)


def same(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@needs_compiler
@both_ops
@every_type
def test_the_order_of_threads_changes_no_bit(op: Op, dtype: torch.dtype) -> None:
    library, inputs = kernels_on_cpu(), example(op, dtype)
    want = run(library, op.name, inputs, **ATTRIBUTES[op])
    library.matexport_shim_reversed(1)
    try:
        assert same(run(library, op.name, inputs, **ATTRIBUTES[op]), want)
    finally:
        library.matexport_shim_reversed(0)


@needs_compiler
def test_without_barriers_results_are_wrong() -> None:
    """The fibers do show a race."""
    library, inputs = kernels_on_cpu("-DMATEXPORT_SHIM_WITHOUT_BARRIERS"), example(SCAN, torch.float32)
    want, _ = SCAN.reference(**INPUTS[SCAN], groups=2)
    library.matexport_shim_reversed(1)
    y, _ = run(library, "Mamba2Scan", inputs, groups=2)
    assert not error(y.numpy(), want) < 1e-2


@needs_compiler
@both_ops
@every_type
@pytest.mark.parametrize("length", [1, 100])
def test_the_state_may_be_overwritten(op: Op, dtype: torch.dtype, length: int) -> None:
    inputs = {k: v[:, :length].contiguous() if k in ("x", "dt_raw", "B", "C", "mask", "z") else v
              for k, v in example(op, dtype).items()}  # fmt: skip
    want = run(kernels_on_cpu(), op.name, inputs, **ATTRIBUTES[op])
    assert same(run(kernels_on_cpu(), op.name, inputs, in_place=True, **ATTRIBUTES[op]), want)


@needs_compiler
@every_type
@pytest.mark.parametrize("optional", ["", "state", "state mask z"])
def test_a_long_sequence_is_cut_into_segments(dtype: torch.dtype, optional: str) -> None:
    inputs = tensors(scan_inputs(7, **LONG, optional=optional, mask="holes"), dtype)
    size = kernels_on_cpu().matexport_cuda_scan_workspace(ctypes.byref(scan_problem(inputs)), CODES[dtype])
    assert size == 4 * (2 * 16 * 24 + 2) * 4  # 19 chunks: segments of 5, 5, 5 and 4 of them
    want, want_state = SCAN.reference(**{k: v.double().numpy() for k, v in inputs.items()})
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    for in_place in (False, True)[: 1 + ("state" in inputs)]:
        y, state = run(kernels_on_cpu(), "Mamba2Scan", inputs, in_place=in_place)
        assert error(y.double().numpy(), want) < tolerance
        assert error(state.numpy(), want_state) < tolerance


@needs_compiler
@both_ops
@pytest.mark.parametrize("case", [{"length": 1}, {"length": 100}, {"length": 100, "N": 200}], ids=str)
def test_the_final_state_may_be_left_out(op: Op, case: dict[str, int]) -> None:
    scan = {"batch": 2, "heads": 2, "P": 24, "N": 16, "groups": 1} | case
    made = scan_inputs(4, **scan) if op is SCAN else conv_inputs(4, batch=2, length=case["length"], channels=9, k=4)
    inputs = tensors(made, torch.float32)
    y, state = run(kernels_on_cpu(), op.name, inputs, with_state=False)
    assert torch.equal(y, run(kernels_on_cpu(), op.name, inputs)[0])
    assert state.isnan().all()


@needs_compiler
@both_ops
@every_type
def test_memory_need_not_be_aligned(op: Op, dtype: torch.dtype) -> None:
    """Tensors that start one element after a multiple of 16 bytes take other paths to the same bits."""

    def shifted(t: torch.Tensor) -> torch.Tensor:
        moved = torch.empty(t.numel() + 17, dtype=t.dtype)
        start = next(i for i in range(17) if (moved.data_ptr() + i * t.element_size()) % 16 == t.element_size() % 16)
        return moved[start : start + t.numel()].view(t.shape).copy_(t)

    inputs = {k: v.reshape(v.shape) for k, v in example(op, dtype).items()}
    want = run(kernels_on_cpu(), op.name, inputs, **ATTRIBUTES[op])
    inputs = {k: shifted(v) if v.dtype != torch.bool else v for k, v in inputs.items()}
    assert same(run(kernels_on_cpu(), op.name, inputs, **ATTRIBUTES[op]), want)


@needs_compiler
@every_type
@pytest.mark.parametrize("P", [1, 8, 24, 64, 128])
def test_the_largest_blocks_fit_every_gpu(dtype: torch.dtype, P: int) -> None:
    """The launch on the CPU refuses more than the 99 KiB of shared memory that sm_86, 89 and 120 have."""
    inputs = tensors(scan_inputs(1, batch=1, length=2, heads=16, P=P, N=128, groups=1), dtype)
    assert run(kernels_on_cpu(), "Mamba2Scan", inputs)[0].isfinite().all()


@needs_compiler
def test_the_most_workspace_is_enough() -> None:
    library, worst = kernels_on_cpu(), 0
    for batch, length, heads, P in itertools.product((1, 2, 3, 70), (2, 300, 900, 20000), (1, 8, 64), (16, 80)):
        x = torch.empty(1).expand(batch, length, heads * P)
        inputs = {"x": x, "A": torch.empty(heads), "B": x[..., :1].expand(-1, -1, 128)}
        problem, code = scan_problem(inputs), CODES[torch.bfloat16]
        size = library.matexport_cuda_scan_workspace(ctypes.byref(problem), code)
        assert size <= library.matexport_cuda_scan_most_workspace(ctypes.byref(problem), code)
        worst = max(worst, size)
    assert 2**20 < worst < 2**25


BAD_SCANS: list[tuple[dict[str, Any], int, str]] = [
    ({"heads": 3, "groups": 2}, -3, "sizes"),
    ({"length": 0}, -3, "sizes"),
    ({"dt_min": 1.0, "dt_max": 0.0}, -3, "sizes"),
    ({"dt_max": float("nan")}, -3, "sizes"),
    ({"length": 2**45}, -3, "sizes"),
    ({"x": None}, -4, "null"),
    ({"type": 3}, -1, "float32, float16, bfloat16"),
]


@needs_compiler
@pytest.mark.parametrize(("change", "status", "message"), BAD_SCANS, ids=str)
def test_arguments_that_make_no_sense(change: dict[str, Any], status: int, message: str) -> None:
    library, inputs = kernels_on_cpu(), example(SCAN, torch.float32)
    problem = scan_problem(inputs, groups=2)
    for name, value in inputs.items():
        setattr(problem, name, value.data_ptr())
    problem.y = problem.x
    code = change.pop("type", 0)
    for name, value in change.items():
        setattr(problem, name, value)
    assert library.matexport_cuda_scan(ctypes.byref(problem), code, None, None) == status
    assert message in library.matexport_cuda_error(status).decode()


@needs_compiler
def test_a_convolution_of_too_many_taps() -> None:
    problem = conv_problem(example(CONV, torch.float32))
    problem.k = 257
    assert kernels_on_cpu().matexport_cuda_conv(ctypes.byref(problem), 0, None) == -3


TYPES = """
#include "cuda_types.h"
using namespace matexport::cuda;
#define API extern "C" __attribute__((visibility("default")))
API void to_half(const float *in, uint16_t *out, int n) { while (n--) out[n] = nearest<Half>(in[n]).bits; }
API void to_bf16(const float *in, uint16_t *out, int n) { while (n--) out[n] = nearest<Bf16>(in[n]).bits; }
API void from_half(const uint16_t *in, float *out, int n) { while (n--) out[n] = value(Half{in[n]}); }
"""


@needs_compiler
def test_the_types_round_as_those_of_torch(tmp_path: Path) -> None:
    """On the CPU; a GPU has instructions for it."""
    source = tmp_path / "types.cc"
    source.write_text(TYPES)
    flags = (f"-I{SOURCES / 'native'}", "-Wno-unused-function", "-Wno-unused-variable")
    library = ctypes.CDLL(str(cuda_kernels.compile_for_cpu(tmp_path / "types.so", source, flags=flags)))
    codes = np.arange(65536, dtype=np.uint16)
    exact = np.empty(65536, np.float32)
    library.from_half(codes.ctypes.data_as(ctypes.c_void_p), exact.ctypes.data_as(ctypes.c_void_p), 65536)
    assert np.array_equal(exact, codes.view(np.float16).astype(np.float32), equal_nan=True)
    rng = np.random.default_rng(0)
    exact = exact[~np.isnan(exact) & ~np.isinf(exact)]
    between = (exact + np.roll(exact, -1)) / 2  # ties, and the largest values
    numbers = np.concatenate(
        [exact, between, rng.standard_normal(5000).astype(np.float32), [1e-8, 65519.9, 65520, 1e38, np.inf]]
    )
    numbers = numbers.astype(np.float32)
    for name, dtype in (("to_half", torch.float16), ("to_bf16", torch.bfloat16)):
        out = np.empty(len(numbers), np.int16)
        getattr(library, name)(numbers.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p), len(out))
        want = torch.from_numpy(numbers).to(dtype).view(torch.int16).numpy()
        assert np.array_equal(out, want)


DEADLOCK = """
#include "cuda_shim.h"
struct Nothing {};
static void kernel(Nothing) { if (threadIdx.x != 3u) __syncthreads(); else matexport::cuda::ballot(true); }
extern "C" __attribute__((visibility("default"))) int go() {
  return matexport::cuda::launch(kernel, 1, 32, 0, nullptr, Nothing{});
}
"""


@needs_compiler
def test_a_barrier_that_not_all_threads_reach(tmp_path: Path) -> None:
    source = tmp_path / "deadlock.cc"
    source.write_text(DEADLOCK)
    flags = (f"-I{SOURCES / 'native'}", "-Wno-unused-function", "-Wno-unused-variable")
    library = cuda_kernels.compile_for_cpu(tmp_path / "deadlock.so", source, flags=flags)
    code = f"import ctypes; ctypes.CDLL({str(library)!r}).go()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode < 0
    assert "a barrier that not all threads reach" in done.stderr


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ptx") / "kernels.ptx"
    command = ["nvcc", "-std=c++17", "-O3", "-ptx", "-arch=compute_80", str(SOURCES / KERNELS), "-o", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    return path


@needs_nvcc
@pytest.mark.parametrize("target", [80, 86, 87, 89, 90, 100, 120])
def test_registers_suffice_on_every_target(ptx: Path, target: int, tmp_path: Path) -> None:
    """No spills; two blocks of the chunked kernel, six of a step, eight of others fit 65536 registers."""
    ptxas = shutil.which("ptxas", path=f"{Path(shutil.which('nvcc') or '').resolve().parent}") or shutil.which("ptxas")
    command = [str(ptxas), f"-arch=sm_{target}", "-v", str(ptx), "-o", str(tmp_path / "kernels.cubin")]
    log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    kernels = re.findall(r"entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", log, re.S)
    assert len(kernels) == 27
    for name, spilled, registers in kernels:
        assert int(spilled) == 0, name
        blocks = 2 if "scan_chunks" in name else 6 if "scan_steps" in name else 8
        assert int(registers) * 128 * blocks <= 65536, (name, registers)


@needs_nvcc
def test_a_step_has_many_loads_in_flight(ptx: Path) -> None:
    """Bound by bandwidth, it must not wait for one row of the state before it reads the next."""
    kernels = [
        text for text in ptx.read_text().split(".visible .entry ")[1:] if re.match(r"\w*scan_steps\w*Li4E", text)
    ]
    assert len(kernels) == 3
    for text in kernels:
        assert re.findall(r"(ld|st)\.global\.v4", text) == ["ld"] * 4 + ["st"] * 4


@needs_nvcc
def test_a_convolution_has_many_loads_in_flight(ptx: Path) -> None:
    kernels = [text for text in ptx.read_text().split(".visible .entry ")[1:] if re.match(r"\w*conv_rows\w*Li4E", text)]
    assert len(kernels) == 3
    for text in kernels:
        assert re.findall(r"(ld|st)\.global", text)[-16:] == ["ld"] * 8 + ["st"] * 8


@needs_nvcc
def test_chunks_are_written_in_pairs(ptx: Path) -> None:
    """Two channels of y, and of the state, in one store wherever a row begins at an even element."""
    kernels = re.findall(r"entry (\w*scan_chunks\w*Lb0E\w*)\((.*?)(?=\.visible|\Z)", ptx.read_text(), re.S)
    assert len(kernels) == 3
    for name, text in kernels:
        assert re.search(r"st\.global\.v2\.f32" if "If" in name else r"st\.global\.(v2\.u16|u32|v2\.b16|b32)", text), (
            name
        )


@needs_compiler
@pytest.mark.parametrize(("heads", "P"), [(2, 80), (2, 68), (3, 64), (128, 64), (1, 130), (128, 7), (1, 32)])
def test_a_step_is_divided_among_blocks(heads: int, P: int) -> None:
    """Few heads give few blocks, so they are divided; many are not."""
    inputs = tensors(scan_inputs(5, batch=2, length=1, heads=heads, P=P, N=11, groups=1), torch.float32)
    want, want_state = SCAN.reference(
        **{k: v.double().numpy() if v.dtype != torch.bool else v for k, v in inputs.items()}
    )
    y, state = run(kernels_on_cpu(), "Mamba2Scan", inputs)
    assert error(y.numpy(), want) < 1e-5
    assert error(state.numpy(), want_state) < 1e-5
