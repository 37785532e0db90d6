"""Models in types that ONNX Runtime's CPU has no kernels for, with the same numbers in types that it has.

Products in bfloat16 are computed in float32, with what is bfloat16 rounded to it; codes in e2m1 become their doubles,
which are whole numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx


def without_bfloat16(model: onnx.ModelProto) -> bool:
    """Changes a model, whose values have types, so that casts alone see bfloat16; returns whether there was any need.

    Sums are in float32 and results are rounded once, as on processors with such products. Inputs and outputs become
    float32, which NumPy has, and hold the same numbers.
    """
    from onnx import TensorProto, helper

    graph = model.graph
    rounded = {i.name for i in graph.initializer if i.data_type == TensorProto.BFLOAT16}
    wide: dict[str, str] = {}  # what is bfloat16 -> the same in float32
    for value in [*graph.input, *graph.output, *graph.value_info]:
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            rounded.add(value.name)
    for value in [*graph.input, *graph.output]:
        if value.name in rounded:
            value.type.tensor_type.elem_type, wide[value.name] = TensorProto.FLOAT, value.name
    typed = bool(wide)

    def changed(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """A node between the casts that it needs."""
        if node.op_type == "Cast":
            name = node.output[0]
            if name in wide:  # an output of the model
                node.output[0] = f"{name}/bfloat16"
            yield node
            if name in wide:
                yield helper.make_node("Cast", [node.output[0]], [name], to=TensorProto.FLOAT)
            return
        for i, name in enumerate(node.input):
            if name in rounded:
                if name not in wide:
                    wide[name] = f"{name}/float32"
                    yield helper.make_node("Cast", [name], [wide[name]], to=TensorProto.FLOAT)
                node.input[i] = wide[name]
        outputs = [(i, name) for i, name in enumerate(node.output) if name in rounded]
        for i, name in outputs:
            node.output[i] = f"{name}/unrounded"
        yield node
        for _, name in outputs:
            to = f"{name}/bfloat16" if name in wide else name
            yield helper.make_node("Cast", [f"{name}/unrounded"], [to], to=TensorProto.BFLOAT16)
            if name in wide:
                yield helper.make_node("Cast", [to], [name], to=TensorProto.FLOAT)

    nodes = list(graph.node)
    found = [new for node in nodes for new in changed(node)]
    del graph.node[:]
    graph.node.extend(found)
    del graph.value_info[:]
    return typed or len(found) > len(nodes)


def without_float4(model: onnx.ModelProto, folder: Path) -> bool:
    """Changes a model, whose data is in `folder`, so that it has no e2m1; returns whether there was any need."""
    from onnx import TensorProto, helper, numpy_helper
    from onnx.external_data_helper import load_external_data_for_tensor

    graph, doubled = model.graph, set()
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT4E2M1:
            load_external_data_for_tensor(tensor, str(folder))
            codes = np.asarray(numpy_helper.to_array(tensor)).astype(np.float32) * 2
            tensor.CopyFrom(numpy_helper.from_array(codes.astype(np.int8), tensor.name))
            doubled.add(tensor.name)
    if not doubled:
        return False
    half = helper.make_tensor("/float4/half", TensorProto.FLOAT, [], [0.5])
    graph.initializer.append(half)
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        if node.input and node.input[0] in doubled:
            scale, factor = node.input[1], f"{node.input[1]}/half"
            graph.node.append(helper.make_node("CastLike", [half.name, scale], [factor]))
            graph.node.append(helper.make_node("Mul", [scale, factor], [f"{factor}/scale"]))
            node.input[1] = f"{factor}/scale"
        graph.node.append(node)
    return True
