"""What the TensorRT plugins in Python do once TensorRT enqueues them, on an NVIDIA GPU and without TensorRT.

Addresses of device memory, a workspace, a stream; and captured into a CUDA graph, as trtexec does by default.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="tests/gpu need PyTorch")
if not torch.cuda.is_available():
    pytest.skip("tests/gpu need an NVIDIA GPU and a CUDA build of PyTorch", allow_module_level=True)
pytest.importorskip("triton", reason="tests/gpu need Triton")

from matexport_plugins.causal_conv1d.tensorrt_plugin import CausalConv1d  # noqa: E402
from matexport_plugins.mamba2_scan.tensorrt_plugin import Mamba2Scan  # noqa: E402
from matexport_plugins.tensorrt_plugins import enqueue  # noqa: E402
from op_cases import conv_inputs, error, scan_inputs  # noqa: E402
from triton_ops import DEVICE, TOLERANCES, conv_reference, float64, scan_reference, tensors  # noqa: E402

KINDS = {torch.float32: "FLOAT", torch.float16: "HALF", torch.bfloat16: "BF16", torch.bool: "BOOL"}
SCAN = {"batch": 2, "heads": 8, "P": 24, "N": 128, "groups": 2}
CONV = {"batch": 2, "channels": 300, "k": 4}
CASES = [
    *[("scan", {**SCAN, "length": n, "optional": o}) for n in (1, 197, 4096) for o in ("", "state mask")],
    *[("conv", {**CONV, "length": n, "optional": o}) for n in (1, 197) for o in ("", "state mask")],
]


def describe(tensor: Any) -> Any:
    return SimpleNamespace(dims=tuple(tensor.shape), type=SimpleNamespace(name=KINDS[tensor.dtype]))


class Node:
    """A plugin, its inputs, and the memory that it writes, full of NaN."""

    def __init__(self, op: str, case: dict[str, Any], dtype: Any, final_state: bool = True) -> None:
        made = scan_inputs(**case) if op == "scan" else conv_inputs(**case)
        self.inputs, self.attributes = tensors(made, dtype), {"groups": case["groups"]} if op == "scan" else {}
        self.plugin: Any = (
            Mamba2Scan(groups=case["groups"], final_state=final_state) if op == "scan" else CausalConv1d()
        )
        self.reference = scan_reference if op == "scan" else conv_reference
        batch, _, width = self.inputs["x"].shape
        state = (batch, case["heads"], case["N"], case["P"]) if op == "scan" else (batch, width, case["k"] - 1)
        nan = {"fill_value": math.nan, "device": DEVICE}
        self.outputs = [torch.full_like(self.inputs["x"], math.nan), torch.full(state, **nan)][: self.plugin.outputs]
        names = self.plugin.names([KINDS[v.dtype].lower() for v in self.inputs.values()],
                                  [v.dim() for v in self.inputs.values()])  # fmt: skip
        shapes = dict(zip(names, (tuple(v.shape) for v in self.inputs.values()), strict=True))
        size = self.plugin.workspace(shapes, str(dtype).removeprefix("torch."))
        self.memory = torch.full((size + 64,), **nan)

    def enqueue(self, stream: int) -> None:
        values = list(self.inputs.values())
        enqueue(
            self.plugin, [describe(v) for v in values], [describe(v) for v in self.outputs],
            [v.data_ptr() for v in values], [v.data_ptr() for v in self.outputs], self.memory.data_ptr(), stream,
        )  # fmt: skip

    def error(self) -> float:
        want = self.reference(**float64(self.inputs), **self.attributes)
        got = [v.double().cpu().numpy() for v in self.outputs]
        assert self.memory[-64:].isnan().all()
        return max(error(a, b) for a, b in zip(got, map(np.asarray, want), strict=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "case"), CASES, ids=str)
def test_on_a_stream(op: str, case: dict[str, Any], dtype: Any) -> None:
    node, stream = Node(op, case, dtype), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    node.enqueue(stream.cuda_stream)
    stream.synchronize()
    assert node.error() < TOLERANCES[dtype]


@pytest.mark.parametrize(("op", "case"), CASES, ids=str)
def test_captured_into_a_graph(op: str, case: dict[str, Any]) -> None:
    """Nothing is allocated: memory stays as it is, and the graph writes what an ordinary run writes."""
    node, graph = Node(op, case, torch.bfloat16), torch.cuda.CUDAGraph()
    node.enqueue(torch.cuda.current_stream().cuda_stream)  # compiles
    want = [v.clone() for v in node.outputs]
    for value in node.outputs:
        value.fill_(math.nan)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with torch.cuda.graph(graph):
        node.enqueue(torch.cuda.current_stream().cuda_stream)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, node.outputs, want))


@pytest.mark.parametrize("length", [1, 197])
def test_without_the_final_state(length: int) -> None:
    node = Node("scan", {**SCAN, "length": length, "optional": "state"}, torch.bfloat16, final_state=False)
    node.enqueue(torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    assert node.error() < TOLERANCES[torch.bfloat16]
