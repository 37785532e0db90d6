"""The CUDA kernels through their plain C interface: compiled by g++ for the CPU (cuda_shim.h), or a library for a GPU."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import matexport_plugins
from native_ops import CONV, SCAN, Op, state_shape
from support import REPOSITORY

SOURCES = REPOSITORY / "plugins" / "matexport_plugins"
HALF_TYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
TYPES = {"float32": np.dtype(np.float32), **HALF_TYPES}
CODES = {"float32": 0, "float16": 1, "bfloat16": 2}  # MATEXPORT_FLOAT32 ...
IN_TYPE = {"x", "dt_raw", "B", "C", "z"}  # inputs of the chosen type; the others are float32
FLAGS = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-fvisibility=hidden"]


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


def compiler() -> str:
    """A C++ compiler; without one nothing of this can be tested."""
    for name in (os.environ.get("CXX", "c++"), "c++", "g++", "clang++"):
        if shutil.which(name):
            return name
    pytest.skip("there is no C++ compiler")


def compile_shared(target: Path, *sources: str, flags: tuple[str, ...] = ()) -> Path:
    """A shared library of the given files below plugins/matexport_plugins, kernels compiled for the CPU."""
    # a .cu file is C++ here; no exceptions or RTTI are needed, but TensorRT's classes have RTTI
    command = [compiler(), *FLAGS, *flags, "-shared", "-x", "c++", *(str(SOURCES / name) for name in sources)]
    done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def kernels_on_cpu(folder: Path, *flags: str) -> ctypes.CDLL:
    return open_library(compile_shared(folder / "libkernels.so", "native/cuda_library.cu", flags=flags))


def open_library(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name in ("matexport_cuda_scan_workspace", "matexport_cuda_scan_most_workspace"):
        getattr(library, name).restype = ctypes.c_size_t
    library.matexport_cuda_error.restype = ctypes.c_char_p
    return library


def cuda_library() -> Path | None:
    """The library that nvcc made, or None where there is no nvcc."""
    return matexport_plugins.ort_library(cuda=True)


def sizes(op: Op, inputs: Mapping[str, np.ndarray], attributes: Mapping[str, Any]) -> ScanProblem | ConvProblem:
    batch, length, channels = inputs["x"].shape
    if op is CONV:
        return ConvProblem(batch=batch, length=length, channels=channels, k=inputs["weight"].shape[-1])
    low, high = attributes.get("dt_limit", (0.0, np.inf))
    shape = state_shape(op, inputs, attributes)
    return ScanProblem(batch=batch, length=length, heads=shape[1], groups=attributes.get("groups", 1), N=shape[2],
                       P=shape[3], dt_min=low, dt_max=high)  # fmt: skip


def cast(inputs: Mapping[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """Inputs as the kernels take them: the reference gets the very same numbers."""
    return {k: v.astype(TYPES[dtype]) if k in IN_TYPE else v for k, v in inputs.items()}


def run(library: ctypes.CDLL, op: Op, inputs: Mapping[str, np.ndarray], dtype: str = "float32", *,
        in_place: bool = False, with_state: bool = True, **attributes: Any) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Runs one op on host memory. Outputs and workspace are poisoned with NaN before.

    Args:
        inputs: of the types that `cast` gives.
        in_place: the state is given as final_state too.
        with_state: whether final_state is asked for.
    """
    problem = sizes(op, inputs, attributes)
    y = np.full(inputs["x"].shape, np.nan, TYPES[dtype])
    state = np.full(state_shape(op, inputs, attributes), np.nan, np.float32)
    kept = {k: np.ascontiguousarray(v) for k, v in inputs.items()}
    if in_place:
        state = kept["state"] = inputs["state"].copy()
    for name, value in {**kept, "y": y, "final_state": state if with_state else None}.items():
        setattr(problem, name, None if value is None else value.ctypes.data)
    if op is SCAN:
        size = library.matexport_cuda_scan_workspace(ctypes.byref(problem), CODES[dtype])
        assert size <= library.matexport_cuda_scan_most_workspace(ctypes.byref(problem), CODES[dtype])
        workspace = np.full(size // 4 + 1, np.nan, np.float32)
        memory = ctypes.c_void_p(workspace.ctypes.data)
        status = library.matexport_cuda_scan(ctypes.byref(problem), CODES[dtype], memory, None)
        assert np.isnan(workspace[size // 4])  # it wrote no more than it said
    else:
        status = library.matexport_cuda_conv(ctypes.byref(problem), CODES[dtype], None)
    assert status == 0, library.matexport_cuda_error(status)
    return y, state
