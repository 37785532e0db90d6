"""Runs the ops of matexport_plugins, one node at a time: the float64 reference, and ONNX Runtime with our library."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

import matexport_plugins
from matexport_plugins.causal_conv1d.reference import causal_conv1d
from matexport_plugins.mamba2_scan.reference import mamba2_scan

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Op:
    """What a node looks like, and what it should compute."""

    name: str
    inputs: tuple[str, ...]
    reference: Callable[..., tuple[np.ndarray, np.ndarray]]
    state_axes: int


SCAN = Op("Mamba2Scan", ("x", "dt_raw", "A", "B", "C", "D", "dt_bias", "state", "mask", "z"), mamba2_scan, state_axes=4)
CONV = Op("CausalConv1d", ("x", "weight", "bias", "state", "mask"), causal_conv1d, state_axes=3)


def has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "c++", "g++", "clang++"))


def library() -> Path:
    """Our library. Only where it cannot have been built are its tests left out."""
    path = matexport_plugins.ort_library()
    if path is None and (os.environ.get("MATEXPORT_NATIVE") == "0" or not has_compiler()):
        pytest.skip("matexport-plugins is installed without native code: there is no C++ compiler")
    assert path is not None, "there is a compiler, but matexport-plugins is installed without its library"
    return path


def processor_flags() -> set[str]:
    """The instruction sets of this machine, asked from the operating system and not from our library."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return set()
    info = Path("/proc/cpuinfo").read_text()
    return set(next(line for line in info.splitlines() if line.startswith("flags")).split())


def instruction_sets() -> list[str]:
    """Those that this machine can run; the tests' ids say which."""
    flags = processor_flags()
    found = ["portable"]
    if {"avx2", "fma"} <= flags:
        found.append("avx2")
    if {"avx512f", "avx512vl", "avx512dq", "avx512bw", "fma"} <= flags:
        found.append("avx512")
    return found


def model_bytes(
    op: Op, present: tuple[str, ...], outputs: tuple[str, ...] = ("y", "final_state"), **attributes: Any
) -> bytes:
    """A graph of one node whose optional inputs are those in `present`."""

    def info(name: str, axes: int | None) -> Any:
        kind = TensorProto.BOOL if name == "mask" else TensorProto.FLOAT
        return helper.make_tensor_value_info(name, kind, None if axes is None else [None] * axes)

    inputs = [name if name in present else "" for name in op.inputs]
    while not inputs[-1]:
        inputs.pop()
    node = helper.make_node(op.name, inputs, list(outputs), domain="ai.matexport", **attributes)
    axes = {"y": 3, "final_state": op.state_axes}
    graph = helper.make_graph(
        [node], op.name, [info(n, None) for n in present], [info(n, axes[n]) for n in outputs if n]
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("ai.matexport", 1)]
    return helper.make_model(graph, ir_version=10, opset_imports=imports).SerializeToString()


def session(model: bytes, isa: str, threads: int = 1) -> Any:
    """A session with our library; `isa` names the kernels."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(library()))
    with mock.patch.dict(os.environ, MATEXPORT_ISA=isa):
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@dataclass
class Runner:
    """One op in ONNX Runtime. Memory is poisoned before every run: outputs, and what a kernel keeps, hold NaN."""

    op: Op
    isa: str
    threads: int = 1
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sessions: dict[tuple[str, ...], Any] = {}

    def __call__(self, **inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        key = tuple(inputs)
        if key not in self.sessions:
            self.sessions[key] = session(model_bytes(self.op, key, **self.attributes), self.isa, self.threads)
        runner = self.sessions[key]
        runner.run(None, {k: v if v.dtype == bool else np.full_like(v, np.nan) for k, v in inputs.items()})
        binding = runner.io_binding()
        for name, value in inputs.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        outputs = []  # the arrays own the memory that the values refer to
        for name, shape in (("y", inputs["x"].shape), ("final_state", state_shape(self.op, inputs, self.attributes))):
            outputs.append(np.full(shape, np.nan, np.float32))
            if outputs[-1].size:
                binding.bind_ortvalue_output(name, onnxruntime.OrtValue.ortvalue_from_numpy(outputs[-1]))
            else:
                binding.bind_output(name)
        runner.run_with_iobinding(binding)
        y, state = outputs
        assert np.array_equal(binding.get_outputs()[0].numpy(), y, equal_nan=True)  # it wrote where the poison was
        return y, state


def state_shape(op: Op, inputs: Mapping[str, np.ndarray], attributes: Mapping[str, Any]) -> tuple[int, ...]:
    batch, _, channels = inputs["x"].shape
    if op is CONV:
        return batch, channels, inputs["weight"].shape[-1] - 1
    heads = len(inputs["A"])
    return batch, heads, inputs["B"].shape[-1] // attributes.get("groups", 1), channels // heads


def mask_of(kind: str, batch: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """`left`, `right`, `both` sides padded (each entry of the batch by another number), `holes`, or `all` masked."""
    mask = np.ones((batch, length), bool)
    for row in mask:
        left, right = sorted(rng.integers(0, length + 1, 2))
        if kind in ("left", "both"):
            row[:left] = False
        if kind in ("right", "both"):
            row[right:] = False
    if kind == "holes":
        mask = rng.random((batch, length)) < 0.6
    return np.zeros_like(mask) if kind == "all" else mask


def scan_inputs(
    seed: int, *, batch: int, length: int, heads: int, P: int, N: int, groups: int, optional: str = "state mask z",
    mask: str = "both", decay: float = 1.0,
) -> Arrays:  # fmt: skip
    rng = np.random.default_rng(seed)

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    inputs = {
        "x": normal(batch, length, heads * P),
        "dt_raw": normal(batch, length, heads, scale=2.0) - np.float32(1),
        "A": (-decay * np.exp(rng.uniform(0, 2.8, heads))).astype(np.float32),
        "B": normal(batch, length, groups * N),
        "C": normal(batch, length, groups * N, scale=N**-0.5),
        "D": normal(heads),
        "dt_bias": normal(heads) - np.float32(1),
        "state": normal(batch, heads, N, P),
        "mask": mask_of(mask, batch, length, rng),
        "z": normal(batch, length, heads * P, scale=3.0),
    }
    return {k: v for k, v in inputs.items() if k not in ("state", "mask", "z") or k in optional.split()}


def conv_inputs(
    seed: int, *, batch: int, length: int, channels: int, k: int, optional: str = "state mask", mask: str = "both"
) -> Arrays:
    rng = np.random.default_rng(seed)
    inputs = {
        "x": rng.standard_normal((batch, length, channels)).astype(np.float32),
        "weight": rng.standard_normal((channels, 1, k)).astype(np.float32),
        "bias": rng.standard_normal(channels).astype(np.float32),
        "state": rng.standard_normal((batch, channels, k - 1)).astype(np.float32),
        "mask": mask_of(mask, batch, length, rng),
    }
    return {k: v for k, v in inputs.items() if k not in ("state", "mask") or k in optional.split()}


def error(got: np.ndarray, want: np.ndarray) -> float:
    """The largest difference relative to the largest value; NaN wherever something is not finite."""
    if got.size == 0:
        return 0.0
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / max(float(np.abs(want).max()), 1e-30))
