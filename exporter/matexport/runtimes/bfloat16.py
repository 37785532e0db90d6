"""Models with products in bfloat16, for runtimes without: in float32, with what is bfloat16 rounded to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

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
