"""Runs the ops of matexport_plugins, one at a time: the float64 reference, and all BACKENDS that there are.

A new backend is a class like `TorchRunner` and a line in that table; tests/plugins/test_ops.py does the rest.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

import cuda_kernels
import matexport_plugins
import matexport_plugins.causal_conv1d.torch_op
import matexport_plugins.mamba2_scan.torch_op
from matexport.graph import stateful
from matexport.graph.builder import Graph
from matexport.graph.chunks import cut_any
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


ALONG_LENGTH = {"x", "dt_raw", "B", "C", "mask", "z"}
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


def graph_bytes(op: Op, inputs: Mapping[str, np.ndarray], form: str, attributes: Mapping[str, Any]) -> bytes:
    """The op as an exported model has it, in one of its three forms; `custom` carries functions."""
    g = Graph(op.name)
    values = {k: g.input(k, "BOOL" if v.dtype == bool else "F32", [None] * v.ndim) for k, v in inputs.items()}
    given = [values.get(name) for name in op.inputs if name != "z"]
    groups, dt_limit = attributes.get("groups", 1), attributes.get("dt_limit", (0.0, np.inf))
    kernel = 1
    if op is CONV:
        kernel, sizes = inputs["weight"].shape[-1], [g.op("Shape", values["x"], start=i, end=i + 1) for i in range(2)]
        taps = stateful.taps(g, *sizes, values.get("mask"), kernel=kernel)
        outputs = stateful.causal_conv1d(g, form, *given, taps)
    else:
        if "mask" in inputs and form != "custom":
            given[-1] = stateful.numbers(g, values["mask"])
        heads, length = len(inputs["A"]), g.op("Shape", values["x"], start=1, end=2)
        outputs = stateful.mamba2_scan(
            g, form, *given, heads=heads, head_dim=inputs["x"].shape[2] // heads, groups=groups,
            state=inputs["B"].shape[2] // groups, dt_limit=dt_limit, chunks=cut_any(g, length),
        )  # fmt: skip
    for value, name, axes in zip(outputs, ("y", "final_state"), (3, op.state_axes), strict=True):
        g.output(value, name, "F32", [None] * axes)
    g.functions = stateful.functions(form, kernel=kernel, masked="mask" in inputs, dt_limit=dt_limit)
    return ir.to_proto(g.to_model(producer_version="", metadata={})).SerializeToString()


def session(model: bytes, isa: str | None, threads: int = 1) -> Any:
    """A session with our library, `isa` naming its kernels; without it where that is None."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if isa is not None:
        options.register_custom_ops_library(str(library()))
    with mock.patch.dict(os.environ, MATEXPORT_ISA=isa or ""):
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class Run(Protocol):
    """One op with its attributes. Called with the inputs, it gives y and the final state in float32.

    Memory is poisoned before: what it is going to write, and what it keeps from call to call, hold NaN.
    """

    def __call__(self, **inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass
class OrtRunner:
    """In ONNX Runtime: with our kernels for `isa`, or in a form that needs none of them."""

    op: Op
    isa: str | None
    threads: int = 1
    attributes: Mapping[str, Any] = field(default_factory=dict)
    form: str = "custom"

    def __post_init__(self) -> None:
        self.sessions: dict[tuple[str, ...], Any] = {}

    def __call__(self, **inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        key = tuple(inputs)
        if key not in self.sessions:
            node = self.isa is not None
            model = (
                model_bytes(self.op, key, **self.attributes)
                if node
                else graph_bytes(self.op, inputs, self.form, self.attributes)
            )
            self.sessions[key] = session(model, self.isa, self.threads)
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


@dataclass
class TorchRunner:
    """`torch.ops.matexport.*`; x, dt_raw, B, C, z are rounded to `dtype`."""

    op: Op
    attributes: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def __call__(self, **inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        function = {SCAN: torch.ops.matexport.mamba2_scan, CONV: torch.ops.matexport.causal_conv1d}[self.op]
        tensors = {k: torch.from_numpy(v).to(self.device) for k, v in inputs.items()}
        tensors |= {k: v.to(self.dtype) for k, v in tensors.items() if k in ALONG_LENGTH and v.dtype != torch.bool}
        torch.use_deterministic_algorithms(True)  # torch.empty is then full of NaN
        try:
            y, state = function(**tensors, **self.attributes)
        finally:
            torch.use_deterministic_algorithms(False)
        assert (y.dtype, state.dtype) == (self.dtype, torch.float32)
        return y.float().cpu().numpy(), state.cpu().numpy()


@dataclass
class CudaRunner:
    """The CUDA kernels, compiled for the CPU; x, dt_raw, B, C, z are rounded to `dtype`."""

    op: Op
    attributes: Mapping[str, Any]
    dtype: torch.dtype

    def __call__(self, **inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tensors = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in inputs.items()}
        given = cuda_kernels.rounded(tensors, self.dtype)
        y, state = cuda_kernels.run(cuda_kernels.kernels_on_cpu(), self.op.name, given, **self.attributes)
        return y.float().numpy(), state.numpy()


@dataclass(frozen=True)
class Backend:
    """`make(op, attributes, threads)` gives a `Run`.

    Attributes:
        tolerance, state_tolerance: of y and the state, relative to their largest values.
        rounds: to what x, dt_raw, B, C, z are rounded before (the reference gets the rounded ones).
        whole: it takes every input, and writes zeros where the mask is. The functions in our models have no z, need the
            state, and leave masked steps of y without meaning.
    """

    make: Callable[[Op, Mapping[str, Any], int], Run]
    tolerance: float = 1e-5
    state_tolerance: float = 1e-5
    rounds: torch.dtype = torch.float32
    whole: bool = True

    def takes(self, case: Mapping[str, Any]) -> bool:
        return self.whole or "state" in case.get("optional", "state")

    def inputs(self, given: Arrays) -> Arrays:
        """What is left of a case's inputs: without z if it takes none, and rounded."""
        return {
            k: torch.from_numpy(v).to(self.rounds).float().numpy() if k in ALONG_LENGTH and v.dtype != bool else v
            for k, v in given.items()
            if self.whole or k != "z"
        }


def _ort(isa: str | None, form: str = "custom") -> Callable[[Op, Mapping[str, Any], int], Run]:
    return lambda op, attributes, threads: OrtRunner(op, isa, threads, attributes, form)


def _bfloat16(op: Op, attributes: Mapping[str, Any], threads: int) -> Run:
    """Products in bfloat16 where the processor has them and the state's size fits; the convolution has none."""
    return OrtRunner(op, "avx512", threads, {**attributes, "bfloat16": 1} if op is SCAN else attributes)


def _torch(dtype: torch.dtype) -> Callable[[Op, Mapping[str, Any], int], Run]:
    return lambda op, attributes, threads: TorchRunner(op, attributes, dtype)


def _cuda(dtype: torch.dtype) -> Callable[[Op, Mapping[str, Any], int], Run]:
    return lambda op, attributes, threads: CudaRunner(op, attributes, dtype)


CUDA_BACKENDS = {
    "cuda-on-cpu-float32": Backend(_cuda(torch.float32)),
    "cuda-on-cpu-bfloat16": Backend(_cuda(torch.bfloat16), 1e-2, 1e-2, rounds=torch.bfloat16),
    "cuda-on-cpu-float16": Backend(_cuda(torch.float16), 2e-3, 2e-3, rounds=torch.float16),
}
BACKENDS = {
    **{f"ort-{isa}": Backend(_ort(isa)) for isa in instruction_sets()},
    **({"ort-bfloat16": Backend(_bfloat16, 1e-2, 1e-2)} if "avx512_bf16" in processor_flags() else {}),
    "ort-function": Backend(_ort(None), whole=False),  # of a model of form `custom`, our library not registered
    "ort-stock": Backend(_ort(None, "stock"), whole=False),
    "torch": Backend(_torch(torch.float32)),
    "torch-bfloat16": Backend(_torch(torch.bfloat16), tolerance=1e-2, rounds=torch.bfloat16),
    "torch-float16": Backend(_torch(torch.float16), tolerance=2e-3, rounds=torch.float16),
    **(CUDA_BACKENDS if has_compiler() else {}),
}


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


def part(inputs: Mapping[str, np.ndarray], start: int, stop: int, state: np.ndarray) -> Arrays:
    """Steps [start, stop) of a sequence, from this state."""
    cut = {k: np.ascontiguousarray(v[:, start:stop]) if k in ALONG_LENGTH else v for k, v in inputs.items()}
    return {**cut, "state": state}


# an example of each op: 100 steps, some of them masked, and all other inputs
INPUTS = {
    SCAN: scan_inputs(1, batch=2, length=100, heads=4, P=24, N=16, groups=2, mask="holes"),
    CONV: conv_inputs(2, batch=2, length=100, channels=24, k=4, mask="holes"),
}
ATTRIBUTES: dict[Op, dict[str, Any]] = {SCAN: {"groups": 2}, CONV: {}}
