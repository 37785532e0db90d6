"""Models with products in bfloat16, for runtimes without: in float32, with what is bfloat16 rounded to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx


def without_bfloat16(model: onnx.ModelProto) -> bool:
    """Changes a model, whose values have types, so that casts alone see bfloat16; returns whether there was any need.

    Sums are in float32 and results are rounded once, as on processors with such products.
    """
    from onnx import TensorProto, helper

    graph = model.graph
    rounded = {i.name for i in graph.initializer if i.data_type == TensorProto.BFLOAT16}
    for value in [*graph.input, *graph.output, *graph.value_info]:
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            rounded.add(value.name)
    wide: dict[str, str] = {}  # what is bfloat16 -> the same in float32

    def changed(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """A node between the casts that it needs."""
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
            yield helper.make_node("Cast", [f"{name}/unrounded"], [name], to=TensorProto.BFLOAT16)

    nodes = list(graph.node)
    found = [new for node in nodes for new in (changed(node) if node.op_type != "Cast" else [node])]
    del graph.node[:]
    graph.node.extend(found)
    del graph.value_info[:]
    return len(found) > len(nodes)
