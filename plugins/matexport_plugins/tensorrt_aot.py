"""The Triton kernels in TensorRT engines without Python: quickly-deployable plugins (QDP), compiled ahead of time.

For TensorRT 10.9 and newer, on the machine that builds the engine; TensorRT-RTX has no QDP. The engine holds PTX: where
it runs it needs neither Python nor Triton nor a library of ours.

    import tensorrt as trt
    from matexport_plugins import tensorrt_aot

    launches = tensorrt_aot.split(model)       # an onnx.ModelProto with nodes of our ops
    tensorrt_aot.register(launches, 90)        # compute capability of the GPU

A plugin of this kind launches one kernel and has no workspace. So the kernels of one op are several plugins, with
tensors between them, each for the sizes of one node: nothing but batch and length is left open. Kernels take inputs,
integers and outputs, in this order; floats are constants in the code. They have no attributes: TensorRT would not
serialise them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Sequence
from typing import Any

from matexport_plugins.aot import Launch, compile_kernel, evaluate

NAMESPACE = "matexport"  # TensorRT takes no dots here
DOMAIN = "ai.matexport"


# ---------------------------------------------------------------------------------------- registration
def register(launches: Iterable[Launch], capability: int) -> list[str]:
    """Registers a plugin for each launch that has none yet; `matexport::` and the launch's name.

    Args:
        capability: of the GPU that the engine is built for, 90 for 9.0. Each kernel is compiled once TensorRT asks.

    Returns:
        The names of the plugins, in the order of the launches.
    """
    import tensorrt.plugin as trtp

    names = []
    for launch in launches:
        name = f"{NAMESPACE}::{launch.name}"
        if name not in _registered:
            describe, implement = functions(launch, capability)
            trtp.register(name)(describe)
            trtp.aot_impl(name)(implement)
            _registered.add(name)
        names.append(name)
    return names


_registered: set[str] = set()


def functions(launch: Launch, capability: int) -> tuple[Any, Any]:
    """What `tensorrt.plugin.register` and `aot_impl` decorate. TensorRT reads the inputs from their signatures.

    Both raise ValueError, which TensorRT reports, where an input has another type than the kernel is for.
    """
    import tensorrt as trt
    import tensorrt.plugin as trtp

    kinds = {"*fp32": trt.float32, "*fp16": trt.float16, "*bf16": trt.bfloat16, "*i32": trt.int32, "*i1": trt.bool}
    inputs, outputs = launch.inputs, list(launch.outputs)
    compiled: list[Any] = []

    def sizes(descs: Sequence[Any]) -> dict[str, Any]:
        """Every first input begins with these axes."""
        for name, desc in zip(inputs, descs, strict=True):
            if desc.dtype != kinds[launch.arguments[name]]:
                raise ValueError(f"{launch.name}: {name} is {desc.dtype}, not {launch.arguments[name]}")
        return {"batch": descs[0].shape_expr[0], "length": descs[0].shape_expr[1]}

    def describe(*descs: Any) -> Any:
        known = sizes(descs)
        shapes = [tuple(evaluate(size, **known) for size in launch.outputs[name]) for name in outputs]
        types = [kinds[launch.arguments[name]] for name in outputs]
        return tuple(trtp.from_shape_expr(shape, dtype=kind) for shape, kind in zip(shapes, types, strict=True))

    def implement(*arguments: Any) -> Any:
        known = sizes(arguments[: len(inputs)])
        if not compiled:
            compiled.append(compile_kernel(launch, capability))
        [kernel] = compiled
        params = trtp.KernelLaunchParams()
        params.grid_x, params.grid_y, params.grid_z = (evaluate(size, **known) for size in kernel.grid)
        params.block_x, params.shared_mem = kernel.threads, kernel.shared
        numbers = [kernel.numbers[name] for name, kind in kernel.arguments.items() if not kind.startswith("*")]
        extra = trtp.SymIntExprs(len(numbers))
        for i, text in enumerate(numbers):
            extra[i] = trtp.SymInt32(evaluate(text, **known))
        return kernel.name, kernel.ptx, params, extra

    def signed(function: Any, result: Any, *more: str) -> Any:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(name, kind, annotation=trtp.TensorDesc) for name in inputs]
        parameters += [inspect.Parameter(name, kind) for name in more]
        function.__signature__ = inspect.Signature(parameters, return_annotation=result)
        return function

    described = tuple.__class_getitem__((trtp.TensorDesc,) * len(outputs))
    built = tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]
    return signed(describe, described), signed(implement, built, "outputs", "tactic")


# -------------------------------------------------------------------------------------------- in a model
def split(model: Any, *, capability: int = 90, step: bool = False) -> list[Launch]:
    """Replaces the nodes of our ops in an ONNX model by the nodes that these plugins are; returns their launches.

    Args:
        model: an `onnx.ModelProto` of form `custom`; it is changed. Functions of our ops are dropped: they would win.
        capability: of the GPU that tiles are chosen for.
        step: for engines with one new token at a time.

    Raises:
        ValueError: the sizes of a node are not in the file.
    """
    from onnx import helper

    known, nodes = shapes_of(model), []
    found: dict[str, Launch] = {}
    for node in model.graph.node:
        if node.domain != DOMAIN:
            nodes.append(node)
            continue
        names = roles(node, known)
        values = {f"{role}_ptr": name for role, name in names.items()}
        values |= dict(zip(("y_ptr", "final_ptr"), node.output, strict=False))
        for launch in launches_of(node, known, capability=capability, step=step):
            inner = {name: f"{node.name}/{name}" for name in launch.outputs if name not in ("y_ptr", "final_ptr")}
            values |= inner
            outputs = [values.get(name, f"{node.name}/{name}") for name in launch.outputs]
            place = {"name": f"{node.name}/{launch.kernel.__name__}", "domain": NAMESPACE}
            nodes.append(helper.make_node(launch.name, [values[name] for name in launch.inputs], outputs, **place))
            found[launch.name] = launch
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    kept = [f for f in model.functions if f.domain != DOMAIN]
    del model.functions[:]
    model.functions.extend(kept)
    model.opset_import.append(helper.make_opsetid(NAMESPACE, 1))
    return list(found.values())


def shapes_of(model: Any) -> dict[str, tuple[tuple[int | str, ...], int]]:
    """Shape and ONNX's element type of every value in a file that has them; dynamic axes are names."""
    graph = model.graph
    known = {value.name: (tuple(value.dims), value.data_type) for value in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        known[value.name] = (tuple(d.dim_value or d.dim_param for d in kind.shape.dim), kind.elem_type)
    return known


def roles(node: Any, known: dict[str, Any]) -> dict[str, str]:
    """The inputs of a node, by the names that kernels give them. Optional ones may be empty, or left out."""
    required = {
        "Mamba2Scan": ["x", "dt", "A", "B", "C", "D", "bias"], "CausalConv1d": ["x", "weight", "bias"]
    }[node.op_type]  # fmt: skip
    names: dict[str, str] = dict(zip(required, node.input, strict=False))
    for name in filter(None, node.input[len(required) :]):
        shape, kind = known.get(name, ((), 0))
        if not kind:
            raise ValueError(f"{node.name}: the file does not say what {name!r} is")
        names["mask" if kind == BOOL else "z" if node.op_type == "Mamba2Scan" and len(shape) == 3 else "state"] = name
    return names


BOOL, ELEMENTS = 9, {1: "float32", 10: "float16", 16: "bfloat16"}  # onnx.TensorProto


def launches_of(node: Any, known: dict[str, Any], *, capability: int = 90, step: bool = False) -> list[Launch]:
    """The launches of one node of our ops; `known` is from `shapes_of`. Raises ValueError where sizes are missing."""
    import torch

    def size(role: str, axis: int) -> int:
        shape = known.get(names[role], ((), 0))[0]
        if len(shape) <= axis or not isinstance(shape[axis], int):
            raise ValueError(f"{node.name}: the file does not say how large {role} is: export it again")
        return int(shape[axis])

    names = roles(node, known)
    state, mask = "state" in names, "mask" in names
    dtype = getattr(torch, ELEMENTS[known[names["x"]][1]])
    if node.op_type == "CausalConv1d":
        from matexport_plugins.causal_conv1d.triton_aot import launches as conv

        return conv(channels=size("weight", 0), k=size("weight", 2), dtype=dtype, step=step, state=state, mask=mask)
    from matexport_plugins.mamba2_scan.triton_aot import launches as scan

    attributes = {a.name: a for a in node.attribute}
    groups = attributes["groups"].i if "groups" in attributes else 1
    low, high = attributes["dt_limit"].floats if "dt_limit" in attributes else (0.0, math.inf)
    heads = size("bias", 0)
    return scan(
        heads=heads, P=size("x", 2) // heads, N=size("B", 2) // groups, groups=groups, dtype=dtype, step=step,
        state=state, mask=mask, z="z" in names, final_state=len(node.output) > 1, dt_limit=(low, high),
        capability=capability,
    )  # fmt: skip
