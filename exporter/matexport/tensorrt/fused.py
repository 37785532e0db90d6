"""The ONNX model of a fused engine: one of form `custom`, made ready for the plugins."""

from __future__ import annotations

from collections import Counter
from typing import Any

from matexport_plugins.tensorrt_plugins import NAMESPACE

ROWS = {"Mamba2Scan": (0, 1, 3, 4), "CausalConv1d": (0,)}  # the inputs that are of x's type
MOVES = {"Reshape", "Split", "Transpose", "Slice"}  # which change no number of their first input
FLOAT = 1  # onnx.TensorProto


def fused_model(model: Any, *, in_place: bool = False) -> tuple[list[str], dict[str, str]]:
    """Turns an ONNX model of form `custom` (a ModelProto) into one for the plugins.

    The functions of our ops go, because TensorRT's parser prefers a function to a plugin; states of zeros too, because
    a plugin starts with zeros by itself; and states of the scan that nobody reads, since they can be larger than x.
    Where products are in half precision, what the ops read and write along the sequence is so too; they sum in float32.

    Args:
        in_place: a state that is an input, and is read by nothing else, is written over by the one that follows it.

    Returns:
        The names of the ops; and the outputs that share memory with an input, if `in_place`, with that input.
    """
    from onnx import helper

    graph, zeros = model.graph, _zeros(model.graph)
    for node in _ours(graph):
        for i in reversed([i for i, name in enumerate(node.input) if name in zeros or not name]):
            del node.input[i]  # TensorRT's parser takes no empty names, and the plugins need none
    needed = {value.name for value in graph.output}.union(*(node.input for node in graph.node))
    for node in _ours(graph):
        if node.op_type == "Mamba2Scan" and len(node.output) > 1 and node.output[1] not in needed:
            del node.output[1]
            node.attribute.append(helper.make_attribute("final_state", 0))
    _drop_unused(graph)
    _narrow(graph)
    del model.functions[:]
    _drop_domains(model)
    aliases = {}
    if in_place:
        outside = {value.name for value in graph.input}, {value.name for value in graph.output}
        readers = Counter(name for node in graph.node for name in node.input)
        for node in _ours(graph):
            state = next((n for n in node.input if n in outside[0] and readers[n] == 1), None)
            if state and len(node.output) > 1 and node.output[1] in outside[1]:
                node.attribute.append(helper.make_attribute("in_place", 1))
                aliases[node.output[1]] = state
    return sorted({node.op_type for node in _ours(graph)}), aliases


def _ours(graph: Any) -> list[Any]:
    return [node for node in graph.node if node.domain == NAMESPACE]


def _zeros(graph: Any) -> set[str]:
    """The tensors that are zeros, spread to some shape."""
    from onnx import numpy_helper

    small = [t for t in graph.initializer if not t.external_data]
    zero = {t.name for t in small if not numpy_helper.to_array(t).any()}
    return {node.output[0] for node in graph.node if node.op_type == "Expand" and node.input[0] in zero}


def _drop_unused(graph: Any) -> None:
    """Removes the nodes and initializers that no output needs."""
    needed, kept = {value.name for value in graph.output}, []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
            needed.update(name for a in node.attribute for inner in a.g.node for name in inner.input)
    initializers = [t for t in graph.initializer if t.name in needed]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(reversed(kept))
    graph.initializer.extend(initializers)


def _narrow(graph: Any) -> None:
    """Gives the ops rows in the type of the products. Casts from it to float32 go past what only moves numbers, until
    they meet the casts back, and both go."""
    from onnx import helper

    weights = {t.name: t.data_type for t in graph.initializer}
    products = (n for n in graph.node if n.op_type in ("Gemm", "MatMul"))
    kinds = {weights[n.input[1]] for n in products if n.input[1] in weights}
    if len(kinds) != 1 or kinds == {FLOAT}:
        return
    [kind] = kinds
    half = _Half(graph, kind)
    nodes = []
    for node in graph.node:
        rows = ROWS.get(node.op_type, ()) if node.domain == NAMESPACE else ()
        for i in rows:
            narrow = f"{node.name}/{i}/narrow"
            nodes.append(helper.make_node("Cast", [node.input[i]], [narrow], f"{node.name}/cast_{i}", to=kind))
            half.name(node.input[i], narrow)
            node.input[i] = narrow
        nodes.append(node)
        if rows:
            nodes.append(half.widened(node, 0))
    half.sink(nodes)
    del graph.node[:]
    graph.node.extend(nodes)


class _Half:
    """Casts between float32 and a half precision in a list of nodes."""

    def __init__(self, graph: Any, kind: int) -> None:
        self.graph, self.kind = graph, kind
        self.outputs = {value.name for value in graph.output}
        self.infos = {value.name: value for value in graph.value_info}

    def name(self, wide: str, narrow: str) -> None:
        """Notes that a tensor in half precision has the shape of another one."""
        if wide in self.infos:
            info = self.graph.value_info.add()
            info.CopyFrom(self.infos[wide])
            info.name, info.type.tensor_type.elem_type = narrow, self.kind

    def widened(self, node: Any, i: int) -> Any:
        """Makes output i of a node one in half precision; returns the node that casts it to float32."""
        from onnx import helper

        wide, narrow = node.output[i], f"{node.output[i]}/narrow"
        self.name(wide, narrow)
        node.output[i] = narrow
        return helper.make_node("Cast", [narrow], [wide], f"{narrow}/cast", to=FLOAT)

    def casts(self, node: Any, to: int) -> bool:
        return bool(node.op_type == "Cast" and node.attribute[0].i == to)

    def sink(self, nodes: list[Any]) -> None:
        """Moves casts to float32 down, in the given list."""
        kinds = {v.name: v.type.tensor_type.elem_type for v in self.graph.value_info}
        i = 0
        while i < len(nodes):
            node = nodes[i]
            if self.casts(node, FLOAT) and kinds.get(node.input[0], self.kind) == self.kind:
                narrow, wide = node.input[0], node.output[0]
                for reader in [n for n in nodes[i + 1 :] if wide in n.input]:
                    if self.casts(reader, self.kind):
                        self._replace(nodes, reader.output[0], narrow)
                        nodes.remove(reader)
                    elif reader.op_type in MOVES and reader.input[0] == wide:
                        reader.input[0] = narrow
                        at = nodes.index(reader) + 1
                        nodes[at:at] = [self.widened(reader, k) for k in range(len(reader.output))]
                if wide not in self.outputs and not any(wide in n.input for n in nodes):
                    nodes.pop(i)
                    continue
            i += 1

    def _replace(self, nodes: list[Any], old: str, new: str) -> None:
        for node in nodes:
            for k, name in enumerate(node.input):
                if name == old:
                    node.input[k] = new


def _drop_domains(model: Any) -> None:
    used = {node.domain for node in model.graph.node}
    kept = [entry for entry in model.opset_import if not entry.domain or entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)
