"""Quickly-deployable plugins from PTX. TensorRT, which has them, cannot be installed here: they are registered and
built against `helpers/qdp.py`, and by NVIDIA's own Python where TENSORRT_BINDINGS_DIR is set. Not by TensorRT.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper

import qdp
from matexport_plugins import aot, tensorrt_aot
from native_ops import CONV, SCAN, model_bytes
from op_cases import TINY, conv_inputs, error, scan_inputs
from triton_ops import DEVICE, conv_reference, float64, scan_reference, tensors

pytestmark = [
    pytest.mark.skipif(DEVICE == "cuda", reason="here Triton interprets"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
]
KINDS = {TensorProto.FLOAT: qdp.DataType.FLOAT, TensorProto.FLOAT16: qdp.DataType.HALF,
         TensorProto.BOOL: qdp.DataType.BOOL}  # fmt: skip
TORCH = {"*fp32": torch.float32, "*fp16": torch.float16, "*i32": torch.int32, "*i1": torch.bool}
LONG = {**TINY, "heads": 4, "P": 24, "groups": 2, "length": 70}


@pytest.fixture
def trtp(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Kernels are not compiled: here Triton interprets."""
    monkeypatch.setattr(tensorrt_aot, "_registered", set())
    monkeypatch.setattr(tensorrt_aot, "compile_kernel", uncompiled)
    with qdp.tensorrt() as module:
        yield module


def uncompiled(launch: aot.Launch, capability: int) -> Any:
    return SimpleNamespace(
        name=launch.kernel.__name__, ptx="PTX", arguments=launch.arguments, numbers=launch.numbers, grid=launch.grid,
        threads=32 * launch.warps, shared=1000,
    )  # fmt: skip


def model_of(op: Any, inputs: Mapping[str, torch.Tensor], **attributes: Any) -> onnx.ModelProto:
    """One node with dynamic batch and length, and a function of its name."""
    model = onnx.load_from_string(model_bytes(op, tuple(inputs), **attributes))
    kinds = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.bool: TensorProto.BOOL}
    for value in model.graph.input:
        shape: list[Any] = list(inputs[value.name].shape)
        if value.name not in ("A", "D", "dt_bias", "weight", "bias"):
            shape[: 1 if value.name == "state" else 2] = ["batch", "length"][: 1 if value.name == "state" else 2]
        value.CopyFrom(helper.make_tensor_value_info(value.name, kinds[inputs[value.name].dtype], shape))
    body = [helper.make_node("Relu", ["x"], ["y"])]
    model.functions.append(
        helper.make_function("ai.matexport", op.name, ["x"], ["y"], body, [helper.make_opsetid("", 21)])
    )
    model.graph.node[0].name = "node"
    return model


def run(model: onnx.ModelProto, launches: list[aot.Launch], values: dict[str, torch.Tensor], trtp: Any) -> None:
    """Runs a split model: what each plugin said to the builder decides grids, integers and shapes of tensors."""
    by_name = {launch.name: launch for launch in launches}
    batch, length = values["x"].shape[:2]
    known = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input}
    kinds = {v.name: KINDS[v.type.tensor_type.elem_type] for v in model.graph.input}
    for node in model.graph.node:
        assert node.domain == "matexport"
        launch = by_name[node.op_type]
        plugin = qdp.build(trtp, f"matexport::{launch.name}", [(kinds[n], known[n]) for n in node.input])
        shapes, params, integers = plugin.at(batch=batch, length=length)
        for name, pointer, shape, kind in zip(node.output, launch.outputs, shapes, plugin.types, strict=True):
            values[name] = torch.full(shape, -7, dtype=TORCH[launch.arguments[pointer]])  # whatever was in the memory
            known[name] = [
                "batch" if text == "batch" else size for text, size in zip(launch.outputs[pointer], shape, strict=True)
            ]
            kinds[name] = kind
        pointers = [*(values[name] for name in node.input), *integers, *(values[name] for name in node.output)]
        arguments = dict(zip(launch.arguments, pointers, strict=True))  # inputs, integers, outputs: the kernel's order
        assert (params["block_x"], params["shared_mem"]) == (32 * launch.warps, 1000)
        grid = tuple(params[f"grid_{axis}"] for axis in "xyz")
        launch.kernel[grid](**arguments, **launch.constants, num_warps=launch.warps, num_stages=launch.stages)


CASES = [
    *[("scan", {**LONG, "optional": o}, False) for o in ("", "state mask", "state mask z")],
    *[("scan", {**LONG, "length": 1, "optional": o}, True) for o in ("", "state mask z")],
    ("scan", {**LONG, "length": 1, "optional": "state mask"}, False),  # a step through the kernels of a prefill
    ("scan", {**LONG, "optional": "state", "dt_limit": (0.01, 0.2)}, False),
    *[("scan", {**LONG, "length": n, "optional": "state", "no_state": True}, n == 1) for n in (1, 70)],
    *[("conv", {"batch": 3, "length": n, "channels": 9, "k": 4, "optional": o}, n == 1)
      for n in (1, 37) for o in ("", "state mask")],
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("op", "case", "step"), CASES, ids=str)
def test_the_plugins_of_an_op_compute_it(
    op: str, case: dict[str, Any], step: bool, dtype: torch.dtype, trtp: Any
) -> None:
    """From a node of an ONNX file to numbers, by what the plugins tell a builder, through Triton's interpreter."""
    inputs = tensors(scan_inputs(**case) if op == "scan" else conv_inputs(**case), dtype)
    attributes = {k: case[k] for k in ("groups", "dt_limit") if k in case}
    model = model_of(SCAN if op == "scan" else CONV, inputs, **attributes)
    if "no_state" in case:
        del model.graph.node[0].output[1]
    launches = tensorrt_aot.split(model, step=step)
    assert not model.functions  # one of that name would win
    count = {"scan": 1 if step else 2, "conv": 1 + ("mask" in inputs)}[op]
    assert len(launches) == len(model.graph.node) == count
    names = tensorrt_aot.register(launches, 90)
    assert names == [f"matexport::{launch.name}" for launch in launches]
    assert tensorrt_aot.register(launches, 90) == names  # again changes nothing
    values = dict(inputs)
    run(model, launches, values, trtp)
    want = (scan_reference if op == "scan" else conv_reference)(**float64(inputs), **attributes)
    got = [values[name].double().numpy() for name in model.graph.node[-1].output]
    tolerance = 1e-5 if dtype == torch.float32 else 3e-3
    assert len(got) == 1 + ("no_state" not in case)
    assert max(error(a, b) for a, b in zip(got, want, strict=False)) < tolerance


def test_types_that_do_not_fit_are_refused(trtp: Any) -> None:
    """A plugin without attributes and tuning takes whatever types the network has: the wrong kernel would run."""
    inputs = tensors(scan_inputs(**{**LONG, "optional": ""}), torch.float32)
    launches = tensorrt_aot.split(model_of(SCAN, inputs, groups=2))
    tensorrt_aot.register(launches, 90)
    half = [(qdp.DataType.HALF, ["batch", "length", 4]), (qdp.DataType.FLOAT, [4]), (qdp.DataType.FLOAT, [4])]
    with pytest.raises(ValueError, match=r"dt_ptr is DataType.HALF, not \*fp32"):
        qdp.build(trtp, f"matexport::{launches[0].name}", half)


def test_a_file_without_sizes_is_refused() -> None:
    inputs = tensors(scan_inputs(**{**LONG, "optional": "state"}), torch.float32)
    model = model_of(SCAN, inputs, groups=2)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "width"
    with pytest.raises(ValueError, match="node: the file does not say how large x is"):
        tensorrt_aot.split(model)
    model = model_of(SCAN, inputs, groups=2)
    model.graph.node[0].input[7] = "unknown"
    with pytest.raises(ValueError, match="does not say what 'unknown' is"):
        tensorrt_aot.split(model)


def test_the_arithmetic_of_launches() -> None:
    assert aot.evaluate("((length + 63) // 64) * 64 - batch", batch=2, length=65) == 126
    for text in ("__import__('os')", "length / 2", "length ** 9", "other", "1.5", "-length"):
        with pytest.raises(ValueError, match="is no arithmetic on batch, length"):
            aot.evaluate(text, batch=1, length=1)


COMPILED = """
import json, sys, torch
import qdp
from matexport_plugins import tensorrt_aot
from matexport_plugins.mamba2_scan.triton_aot import launches
given = launches(heads=4, P=24, N=16, groups=2, dtype=torch.bfloat16, state=True, dt_limit=(0.0, 0.25))
BF16, FLOAT = qdp.DataType.BF16, qdp.DataType.FLOAT
shapes = {"dt_ptr": (BF16, 4), "x_ptr": (BF16, 96), "B_ptr": (BF16, 32), "C_ptr": (BF16, 32)}
with qdp.tensorrt() as trtp:
    for name, launch in zip(tensorrt_aot.register(given, 90), given):
        inputs = [(shapes[k][0], ["batch", "length", shapes[k][1]]) if k in shapes
                  else (FLOAT, {"sums_ptr": [2, "batch", 4, 128], "state_ptr": ["batch", 4, 16, 24]}.get(k, [4]))
                  for k in launch.inputs]
        built = qdp.build(trtp, name, inputs)
        print(json.dumps([built.kernel, built.ptx, len(launch.arguments), built.at(batch=3, length=100)]))
"""


def test_the_kernels_of_registered_plugins_are_compiled() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(qdp.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (sums, *_), (scan, ptx, arguments, (shapes, params, integers)) = map(json.loads, done.stdout.splitlines())
    assert (sums, scan) == ("sums_kernel", "scan_kernel")
    assert ".target sm_90a" in ptx
    assert len(aot.parameters(ptx)) == arguments  # none is hidden: TensorRT passes what it was told of
    assert "0f3E800000" in json.loads(done.stdout.splitlines()[0])[1]  # 0.25, the limit, is in the code
    assert shapes == [[3, 100, 96], [3, 4, 16, 24]]
    assert integers == [100, 128, 128]
    assert params["grid_z"] == 3
    assert params["shared_mem"] > 0
