"""The plugins that launch Triton kernels: their enqueue computes, in Triton's interpreter on the host's memory, with
TensorRT-RTX's own descriptors; their engines are built in test_fused.py. On a GPU none of it has been run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx as trt
import torch

from matexport_plugins import tensorrt_plugins
from matexport_plugins.causal_conv1d.tensorrt_plugin import CausalConv1d
from matexport_plugins.mamba2_scan.tensorrt_plugin import Mamba2Scan
from op_cases import CONV_CASES, DECAYS, LIMITS, MASKS, OPTIONS, TINY, conv_inputs, error, name_of, scan_inputs
from triton_ops import DEVICE, conv_op, conv_reference, float64, scan_op, scan_reference, tensors

pytestmark = [
    pytest.mark.skipif(DEVICE == "cuda", reason="here Triton interprets; on a GPU: make gpu"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
]
KINDS = {torch.float32: "FLOAT", torch.float16: "HALF", torch.bfloat16: "BF16", torch.bool: "BOOL"}
WIDE = {"batch": 1, "length": 520, "heads": 2, "P": 24, "N": 16, "groups": 1}
CASES = [
    *[("scan", case) for case in [*OPTIONS, *MASKS[::2], *DECAYS[1:3], *LIMITS, {**TINY, "heads": 8, "groups": 8}]],
    *[("conv", case) for case in [*CONV_CASES[::4], *CONV_CASES[-6:]]],
]


def plugin_of(op: type[Any], **attributes: np.ndarray) -> Any:
    """As TensorRT makes one, by way of the creator."""
    creator = tensorrt_plugins.creator_class(trt)(op, tensorrt_plugins.plugin_class(trt))
    fields = tensorrt_plugins.Fields(trt, attributes)
    return creator.create_plugin("node", fields.collection, trt.TensorRTPhase.RUNTIME)


def describe(tensor: torch.Tensor) -> Any:
    desc = trt.PluginTensorDesc()
    desc.dims, desc.type = tuple(tensor.shape), getattr(trt.DataType, KINDS[tensor.dtype])
    desc.format = trt.TensorFormat.LINEAR
    return desc


def largest(tensor: torch.Tensor) -> Any:
    desc = trt.DynamicPluginTensorDesc()
    desc.desc, desc.max = describe(tensor), tuple(tensor.shape)
    return desc


def guarded(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor full of NaN, and the memory that it is the middle of."""
    memory = torch.full((math.prod(shape) + 128,), torch.nan, dtype=dtype)
    return memory[64:-64].view(shape), memory


def run(op: str, inputs: Mapping[str, torch.Tensor], **attributes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Enqueues a plugin once on addresses, as TensorRT would, with the workspace that it asked for."""
    plugin = plugin_of(Mamba2Scan, **attributes) if op == "scan" else plugin_of(CausalConv1d)
    x, values = inputs["x"], list(inputs.values())
    if op == "scan":
        heads, N = len(inputs["A"]), inputs["B"].shape[2] // int(attributes.get("groups", np.ones(1))[0])
        shape = (x.shape[0], heads, N, x.shape[2] // heads)
    else:
        shape = (x.shape[0], x.shape[2], inputs["weight"].shape[2] - 1)
    (y, around_y), (state, around_state) = guarded(tuple(x.shape), x.dtype), guarded(shape, torch.float32)
    results = [y, state][: plugin.num_outputs]
    wanted = plugin.get_workspace_size([largest(v) for v in values], [])
    assert wanted % 4 == 0
    workspace, around = guarded((wanted // 4,), torch.float32)
    before = [v.clone() for v in values]
    plugin.clone().enqueue(
        [describe(v) for v in values], [describe(v) for v in results], [v.data_ptr() for v in values],
        [v.data_ptr() for v in results], workspace.data_ptr() if wanted else 0, 0,
    )  # fmt: skip
    for memory in (around_y, around_state, around):
        assert memory[:64].isnan().all()
        assert memory[-64:].isnan().all()
    for value, old in zip(values, before, strict=True):
        assert torch.equal(value.nan_to_num() if value.is_floating_point() else value,
                           old.nan_to_num() if old.is_floating_point() else old)  # fmt: skip
    return y, state


def errors(op: str, case: dict[str, Any], dtype: torch.dtype) -> float:
    inputs = tensors(scan_inputs(**case) if op == "scan" else conv_inputs(**case), dtype)
    attributes = {k: case[k] for k in ("groups", "dt_limit") if k in case}
    types = {"groups": np.int32, "dt_limit": np.float32}
    got = run(op, inputs, **{k: np.array(v, types[k]).reshape(-1) for k, v in attributes.items()})
    want = (scan_reference if op == "scan" else conv_reference)(**float64(inputs), **attributes)
    return max(error(a.double().numpy(), b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(("op", "case"), CASES, ids=[f"{op}-{name_of(case)}" for op, case in CASES])
def test_enqueue_computes_the_op(op: str, case: dict[str, Any]) -> None:
    assert errors(op, case, torch.float32) < 1e-5


@pytest.mark.parametrize(("op", "case"), [("scan", OPTIONS[5]), ("scan", MASKS[2]), ("conv", CONV_CASES[-2])])
def test_enqueue_in_float16(op: str, case: dict[str, Any]) -> None:
    assert errors(op, case, torch.float16) < 3e-3


@pytest.mark.parametrize("length", [1, 45, 520])
def test_without_the_final_state(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_op, "processors", lambda device: 1000)
    inputs = tensors(scan_inputs(**{**WIDE, "length": length, "optional": "state"}), torch.float32)
    y, state = run("scan", inputs, final_state=np.array([0], np.int32))
    assert error(y.double().numpy(), scan_reference(**float64(inputs))[0]) < 1e-5
    assert state.isnan().all()  # nothing was written there


@pytest.mark.parametrize("processors", [8, 1000])
def test_the_workspace_suffices_on_every_gpu(processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many processors cut a sequence into segments, of which there are never more than memory was asked for."""
    monkeypatch.setattr(scan_op, "processors", lambda device: processors)
    assert errors("scan", {**WIDE, "optional": "state mask"}, torch.float32) < 1e-5


def test_the_workspace_grows_with_batch_and_length() -> None:
    """What is asked for at build time, for the largest shapes, suffices for all others."""
    op, rng = Mamba2Scan(), np.random.default_rng(0)
    conv = CausalConv1d()
    for _ in range(300):
        heads, P, N = int(rng.integers(1, 65)), int(rng.integers(1, 129)), int(rng.integers(1, 257))
        (b, most_b), (n, most_n) = (np.sort(rng.integers(1, high, 2)).tolist() for high in (65, 5000))
        for kind in ("float32", "bfloat16"):
            sizes = [
                op.workspace({"x": (batch, length, heads * P), "A": (heads,), "B": (batch, length, N)}, kind)
                for batch, length in ((b, n), (most_b, most_n))
            ]
            assert sizes[0] <= sizes[1]
        assert conv.workspace({"x": (b, n, P), "mask": (b, n)}, kind) <= conv.workspace(
            {"x": (most_b, most_n, P), "mask": (most_b, most_n)}, kind
        )


def test_with_too_little_workspace_nothing_is_written_beyond_it() -> None:
    inputs = tensors(scan_inputs(**WIDE, optional=""), torch.float32)
    with pytest.raises(ValueError, match="workspace: 10 elements are left where"):
        scan_op.mamba2_scan(**inputs, workspace=torch.empty(10))
    conv = tensors(conv_inputs(batch=2, length=9, channels=5, k=4, optional="mask"), torch.float32)
    with pytest.raises(ValueError, match="workspace: expected 36 elements"):
        conv_op.causal_conv1d(**conv, workspace=torch.empty(35))
    for op, given in ((scan_op.mamba2_scan, inputs), (conv_op.causal_conv1d, conv)):
        with pytest.raises(ValueError, match="out: expected contiguous"):
            op(**given, out=torch.empty(1))
        with pytest.raises(ValueError, match="out_state: expected contiguous"):
            op(**given, out_state=torch.empty(1))


def test_enqueue_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative controls: what the comparison must notice."""
    case = {**TINY, "optional": "state mask z"}
    right = Mamba2Scan.names
    monkeypatch.setattr(Mamba2Scan, "names", lambda *a: [{"B": "C", "C": "B"}.get(n, n) for n in right(*a)])
    assert errors("scan", case, torch.float32) > 1e-3
    monkeypatch.undo()
    with pytest.raises(NotImplementedError, match="bfloat16"):
        errors("scan", case, torch.bfloat16)  # the interpreter computes it wrongly


def test_attributes_that_make_no_sense_are_refused() -> None:
    for attributes in ({"groups": np.array([0], np.int32)}, {"dt_limit": np.array([1, 0], np.float32)},
                       {"dt_limit": np.array([1], np.float32)}):  # fmt: skip
        with pytest.raises(ValueError, match="make no sense"):
            plugin_of(Mamba2Scan, **attributes)
    plugin = plugin_of(Mamba2Scan, groups=np.array([2], np.int32), dt_limit=np.array([0, 0.5], np.float32))
    fields = {field.name: np.asarray(field.data).tolist() for field in plugin.get_fields_to_serialize()}
    assert fields == {
        "groups": [2],
        "final_state": [1],
        "dt_limit": [0, 0.5],
    }  # what it is made of again where the engine is loaded
    assert {f.name: f.data.tolist() for f in plugin_of(Mamba2Scan).get_fields_to_serialize()} == {
        "groups": [1], "final_state": [1], "dt_limit": [0, math.inf]
    }  # fmt: skip


def test_memory_on_a_gpu_is_taken_over_without_a_copy() -> None:
    """Of this only the description can be tested here: torch reads it as the array interface of CUDA."""
    memory = tensorrt_plugins.CudaMemory(4096, [2, 3], "<i2").__cuda_array_interface__
    assert memory == {"data": (4096, False), "shape": (2, 3), "typestr": "<i2", "strides": None, "version": 3}
