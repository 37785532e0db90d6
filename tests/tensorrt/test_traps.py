"""What TensorRT-RTX 1.7 refuses without a GPU, so that a newer version that does not is noticed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from matexport.tensorrt.build import rtx_environment

CHILD = Path(__file__).parents[1] / "helpers" / "rtx_flags.py"
FLOAT, BOOL, INT64 = TensorProto.FLOAT, TensorProto.BOOL, TensorProto.INT64


def save(
    path: Path, nodes: Sequence[Any], inputs: dict[str, Any], initializers: Sequence[Any] = (), opset: int = 21
) -> Path:
    """A model whose output is y, with float32 inputs of these shapes."""
    values = [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in inputs.items()]
    graph = helper.make_graph(nodes, "g", values, [helper.make_tensor_value_info("y", FLOAT, None)], list(initializers))
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("nowhere", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def answers(model: Path, *requests: dict[str, Any]) -> list[str | None]:
    """For each request None if an engine was built, else the first message."""
    with rtx_environment() as environment:
        command = [sys.executable, str(CHILD), str(model), json.dumps(requests)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[str | None] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Path:
    weight = onnx.numpy_helper.from_array(np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32), "w")
    path = tmp_path_factory.mktemp("traps") / "product.onnx"
    return save(path, [helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": [4, 16]}, [weight])


def test_what_needs_a_gpu_is_not_offered(product: Path) -> None:
    """`matexport trt` has no option for any of these; without one of them an engine is built."""
    flags = ("REFIT", "REFIT_IDENTICAL", "STRIP_PLAN", "VERSION_COMPATIBLE")
    plain, *refused = answers(product, {}, *({"flags": [flag]} for flag in flags))
    assert plain is None
    assert all(message and "CUDA_SUCCESS" in message for message in refused[:-1])
    assert refused[-1] is not None
    assert "libnvinfer_lean.so.1" in refused[-1]


def test_gpus_that_it_knows(product: Path) -> None:
    """Kits are for the others; Turing has no float32 products, so that it is no target."""
    built, others = (80, 86, 89, 120, 121), (87, 90, 100, 103, 110)
    assert answers(product, *({"capabilities": [n]} for n in built)) == [None] * len(built)
    for message in answers(product, *({"capabilities": [n]} for n in others)):
        assert message is not None
        assert "Compute capability is invalid or not supported" in message
    [turing] = answers(product, {"capabilities": [75]})
    assert turing is not None
    assert "FP32 GEMM is not supported" in turing


def test_bfloat16_is_not_for_turing(tmp_path: Path) -> None:
    weight = helper.make_tensor("w", TensorProto.BFLOAT16, [16, 16], np.full(512, 63, np.uint8).tobytes(), raw=True)
    nodes = [
        helper.make_node("Cast", ["x"], ["narrow"], to=TensorProto.BFLOAT16),
        helper.make_node("MatMul", ["narrow", "w"], ["product"]),
        helper.make_node("Cast", ["product"], ["y"], to=FLOAT),
    ]
    model = save(tmp_path / "m.onnx", nodes, {"x": [4, 16]}, [weight])
    turing, ampere = answers(model, {"capabilities": [75]}, {"capabilities": [86]})
    assert ampere is None
    assert turing is not None
    assert "HW-specific datatypes" in turing


@pytest.mark.parametrize("condition", ["", "true"])
def test_a_loop_needs_a_condition(tmp_path: Path, condition: str) -> None:
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Add", ["a", "a"], ["b"]), helper.make_node("Identity", ["c"], ["d"])], "body",
        [info("i", INT64, []), info("c", BOOL, []), info("a", FLOAT, [4])],
        [info("d", BOOL, []), info("b", FLOAT, [4])],
    )  # fmt: skip
    constants = [helper.make_tensor("n", INT64, [], [3]), helper.make_tensor("true", BOOL, [], [True])]
    loop = helper.make_node("Loop", ["n", condition, "x"], ["y"], body=body)
    [message] = answers(save(tmp_path / "m.onnx", [loop], {"x": [4]}, constants), {})
    assert (message is None) == bool(condition)


def test_linear_attention_is_a_plugin_that_nobody_has(tmp_path: Path) -> None:
    """So our graphs spell it; without its state, TensorRT could not even ask for the plugin."""
    options = {"update_rule": "gated", "scale": 1.0, "q_num_heads": 2, "kv_num_heads": 2}
    shapes = {"q": [1, 4, 8], "k": [1, 4, 8], "v": [1, 4, 8], "past": [1, 2, 4, 4], "decay": [1, 4, 2]}
    for past in ("past", ""):
        node = helper.make_node("LinearAttention", ["q", "k", "v", past, "decay"], ["y", "final"], **options)
        given = {name: shape for name, shape in shapes.items() if past or name != "past"}
        [message] = answers(save(tmp_path / "m.onnx", [node], given, opset=27), {})
        assert message is not None
        assert "LinearAttention" in message
