"""The CUDA kernels through their plain C interface, on torch tensors; needs numpy, torch and a library.

That is either the one that nvcc made, for tensors on a GPU, or the same sources compiled by g++ (`native/cuda_shim.h`),
for tensors on the CPU.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

SOURCES = Path(__file__).parents[2] / "plugins" / "matexport_plugins"
KERNELS = "native/cuda_library.cu"
CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # MATEXPORT_FLOAT32 ...
ROUNDED = ("x", "dt_raw", "B", "C", "z")  # inputs of the chosen type; the others are float32
FLAGS = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-fvisibility=hidden"]
Tensors = Mapping[str, torch.Tensor]


def pointers(*names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_void_p) for name in names]


class ScanProblem(ctypes.Structure):
    """`matexport_scan`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "length", "heads", "groups", "N", "P")),
        ("dt_min", ctypes.c_float),
        ("dt_max", ctypes.c_float),
        *pointers("x", "dt_raw", "A", "B", "C", "D", "dt_bias", "state", "mask", "z", "y", "final_state"),
    ]


class ConvProblem(ctypes.Structure):
    """`matexport_conv`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "length", "channels", "k")),
        *pointers("x", "weight", "bias", "state", "mask", "y", "final_state"),
    ]


def compiler() -> str | None:
    """The C++ compiler of this machine."""
    return next(
        (found for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if (found := shutil.which(name or ""))),
        None,
    )


def compile_for_cpu(target: Path, *sources: str | Path, flags: tuple[str, ...] = ()) -> Path:
    """A library of files below plugins/matexport_plugins; .cu files are C++ here. Warnings are errors."""
    paths = [str(SOURCES / source) for source in sources]
    command = [str(compiler()), *FLAGS, *flags, "-shared", "-x", "c++", *paths, "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


@functools.cache
def kernels_on_cpu(*flags: str) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:  # loaded, a library needs no file
        return open_library(compile_for_cpu(Path(folder, "libkernels.so"), KERNELS, flags=flags))


def open_library(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name in ("matexport_cuda_scan_workspace", "matexport_cuda_scan_most_workspace"):
        getattr(library, name).restype = ctypes.c_size_t
    library.matexport_cuda_error.restype = ctypes.c_char_p
    return library


def scan_problem(inputs: Tensors, groups: int = 1, dt_limit: tuple[float, float] = (0.0, math.inf)) -> ScanProblem:
    (batch, length, width), heads = inputs["x"].shape, len(inputs["A"])
    return ScanProblem(batch=batch, length=length, heads=heads, groups=groups, N=inputs["B"].shape[2] // groups,
                       P=width // heads, dt_min=dt_limit[0], dt_max=dt_limit[1])  # fmt: skip


def conv_problem(inputs: Tensors) -> ConvProblem:
    batch, length, channels = inputs["x"].shape
    return ConvProblem(batch=batch, length=length, channels=channels, k=inputs["weight"].shape[2])


def rounded(inputs: Tensors, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {k: v.to(dtype) if k in ROUNDED else v for k, v in inputs.items()}


def prepare(library: ctypes.CDLL, op: str, inputs: Tensors, *, in_place: bool = False, with_state: bool = True,
            **attributes: Any) -> tuple[Callable[[], None], dict[str, torch.Tensor]]:  # fmt: skip
    """A call of "Mamba2Scan" or "CausalConv1d", and the memory it writes, full of NaN: y, final_state, workspace.

    Args:
        inputs: contiguous, of the types that the kernels take.
        in_place: the state is given as final_state too.
        with_state: whether final_state is asked for.
    """
    scan, x = op == "Mamba2Scan", inputs["x"]
    problem = scan_problem(inputs, **attributes) if scan else conv_problem(inputs)
    shape = (problem.batch, problem.heads, problem.N, problem.P) if scan else (*x.shape[::2], problem.k - 1)
    y = torch.full_like(x, torch.nan)
    state = torch.full(shape, torch.nan, device=x.device)
    given = dict(inputs)
    if in_place:
        state = given["state"] = inputs["state"].clone()
    for name, value in {**given, "y": y, "final_state": state if with_state else None}.items():
        setattr(problem, name, None if value is None else value.data_ptr())
    reference, code, size = ctypes.byref(problem), CODES[x.dtype], 0
    if scan:
        size = library.matexport_cuda_scan_workspace(reference, code)
        assert size <= library.matexport_cuda_scan_most_workspace(reference, code)
    workspace = torch.full((size // 4 + 1,), torch.nan, device=x.device)

    def call() -> None:
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream) if x.is_cuda else None
        if scan:
            status = library.matexport_cuda_scan(reference, code, ctypes.c_void_p(workspace.data_ptr()), stream)
        else:
            status = library.matexport_cuda_conv(reference, code, stream)
        assert status == 0, library.matexport_cuda_error(status)

    call.keeps = given, problem  # type: ignore[attr-defined]  # memory that the kernels read
    return call, {"y": y, "final_state": state, "workspace": workspace}


def run(library: ctypes.CDLL, op: str, inputs: Tensors, **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Calls what `prepare` prepares, once: y and the final state."""
    call, memory = prepare(library, op, inputs, **how)
    call()
    assert memory["workspace"][-1].isnan()  # it wrote no more than it said
    return memory["y"], memory["final_state"]
