"""A small builder over onnx-ir: nodes with readable names, weights as references to planned tensors."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from matexport.graph.encoding import Encoding
from matexport.graph.options import GraphOptions
from matexport.planning import PlannedTensor
from matexport.tensors import FLOATS, numpy_dtype

IR_VERSIONS = {21: 10, 23: 11}  # 23: onnxruntime 1.23

DTYPES = {
    "F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16, "F64": ir.DataType.DOUBLE,
    "I64": ir.DataType.INT64, "I32": ir.DataType.INT32, "I8": ir.DataType.INT8, "U8": ir.DataType.UINT8,
    "BOOL": ir.DataType.BOOL, "F8": ir.DataType.FLOAT8E4M3FN, "F4": ir.DataType.FLOAT4E2M1, "I4": ir.DataType.INT4,
}  # fmt: skip
NUMPY: dict[str, Any] = {
    "I64": np.int64,
    "F32": np.float32,
    "F64": np.float64,
    "BOOL": np.bool_,
    "U8": np.uint8,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8": ml_dtypes.float8_e4m3fn,
}  # of constants


@dataclass(frozen=True)
class Weight:
    """One initializer: a planned tensor as it is stored.

    Attributes:
        transposed: of two axes only.
        encoding: one of the arrays that a quantised matrix is stored as.
    """

    value: ir.Value
    tensor: PlannedTensor
    transposed: bool = False
    encoding: Encoding | None = None

    @property
    def dtype(self) -> str:
        return self.encoding.dtype if self.encoding else self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        if self.encoding:
            n, k = self.tensor.shape
            return self.encoding.shape(n, k)
        return self.tensor.shape[::-1] if self.transposed else self.tensor.shape

    @property
    def numpy(self) -> np.dtype:
        """The type of the array that is stored."""
        return self.encoding.numpy if self.encoding else numpy_dtype(self.dtype)

    @property
    def nbytes(self) -> int:
        if self.encoding:
            n, k = self.tensor.shape
            return self.encoding.nbytes(n, k)
        return math.prod(self.shape) * self.numpy.itemsize


class Graph:
    """An ONNX graph that is being written down. Values are onnx-ir's; nothing here holds a weight.

    Names follow `/scope/scope/Op`; the outputs of a node are named after it.
    """

    def __init__(self, name: str, options: GraphOptions | None = None):
        self.name, self.options = name, options or GraphOptions()
        self.products: dict[str, ir.Value] = {}  # what each matrix is multiplied with, where none is quantised
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        self.weights: dict[str, Weight] = {}
        self.functions: list[ir.Function] = []  # what ops are where they have no kernel; callee first
        self._ready: dict[str, ir.Value] = {}  # weights as they are used
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._scope: list[str] = []
        self._used: Counter[str] = Counter()

    @property
    def dtype(self) -> str:
        """What products are computed in."""
        return self.options.dtype

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Puts `name` into the names of the nodes made in this block."""
        self._scope.append(name)
        yield
        self._scope.pop()

    def input(self, name: str, dtype: str, shape: Sequence[int | str | None] | None) -> ir.Value:
        """A graph input; a string in `shape` is a dynamic axis of that name, None one without."""
        known = None if shape is None else ir.Shape(shape)
        value = ir.Value(name=name, shape=known, type=ir.TensorType(DTYPES[dtype]))
        self.inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: str, shape: Sequence[int | str]) -> None:
        """Declares a value to be a graph output, under a name of its own."""
        value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(DTYPES[dtype])
        self.outputs.append(value)

    def weight(
        self,
        name: str,
        tensor: PlannedTensor,
        *,
        transposed: bool = False,
        encoding: Encoding | None = None,
        dtype: str | None = None,
    ) -> ir.Value:
        """A weight by its name; see `Weight`. Asking twice for the same one gives the same value.

        Args:
            dtype: the float type that it is used in; by default that of products.
        """
        used = dtype or self.dtype
        value = self._stored(Weight(ir.Value(name=name), self._typed(tensor, used), transposed, encoding))
        if name not in self._ready:
            self._ready[name] = value
            stored = self.weights[name].dtype
            if encoding is None and stored in FLOATS and stored != used:
                cast = self._ready[name] = self.op("Cast", value, to=int(DTYPES[used]))
                cast.shape, cast.type = value.shape, ir.TensorType(DTYPES[used])
        return self._ready[name]

    def _typed(self, tensor: PlannedTensor, dtype: str) -> PlannedTensor:
        """A float weight as it is stored."""
        return tensor if self.dtype == "F32" or tensor.dtype not in FLOATS else replace(tensor, dtype=dtype)

    def _stored(self, weight: Weight) -> ir.Value:
        """The initializer of a weight: the one that is there by its name, or this one."""
        name = str(weight.value.name)
        if name not in self.weights:
            self.weights[name] = weight
            weight.value.shape, weight.value.type = ir.Shape(weight.shape), ir.TensorType(DTYPES[weight.dtype])
        return self.weights[name].value

    def gather(self, name: str, tensor: PlannedTensor, ids: ir.Value) -> ir.Value:
        """Rows of a weight, in the type that is computed in: they are cast, not the weight."""
        tensor = self._typed(tensor, self.dtype)
        rows = self.op("Gather", self._stored(Weight(ir.Value(name=name), tensor)), ids)
        return rows if tensor.dtype == self.dtype else self.op("Cast", rows, to=int(DTYPES[self.dtype]))

    def to_dtype(self, x: ir.Value) -> ir.Value:
        """float32 to the type of products."""
        return x if self.dtype == "F32" else self.op("Cast", x, to=int(DTYPES[self.dtype]))

    def to_float32(self, x: ir.Value) -> ir.Value:
        """The type of products to float32."""
        return x if self.dtype == "F32" else self.op("Cast", x, to=int(DTYPES["F32"]))

    def constant(self, array: Any, dtype: str = "I64") -> ir.Value:
        """A small constant, kept in the graph itself; equal ones are one."""
        data: np.ndarray = np.asarray(array, NUMPY[dtype])
        key = (dtype, data.shape, data.tobytes())
        if key not in self._constants:
            text = (
                np.array2string(data, separator=",", threshold=8).replace(" ", "")
                if data.size <= 8
                else str(data.shape)
            )
            name = self._unique(f"/const/{dtype.lower()}/{text}")
            self._constants[key] = ir.Value(
                name=name,
                shape=ir.Shape(data.shape),
                type=ir.TensorType(DTYPES[dtype]),
                const_value=ir.tensor(data, name=name),
            )
        return self._constants[key]

    def op(self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """Adds a node and returns its one output."""
        return self.ops(op_type, *inputs, outputs=1, domain=domain, **attributes)[0]

    def ops(
        self, op_type: str, *inputs: ir.Value | None, outputs: int, domain: str = "", **attributes: Any
    ) -> tuple[ir.Value, ...]:
        """Adds a node and returns all its outputs. Inputs that are None at the end are left out."""
        while inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        name = self._unique("/" + "/".join([*self._scope, op_type]))
        node = ir.node(op_type, list(inputs), attributes, domain=domain, num_outputs=outputs, name=name)
        self.nodes.append(node)
        for i, value in enumerate(node.outputs):
            value.name = f"{name}_output_{i}"
        return tuple(node.outputs)

    def index(self, x: ir.Value) -> ir.Value:
        """int64 as int32, for what many operators index by: TensorRT casts it for each of them."""
        return self.op("Cast", x, to=int(DTYPES["I32"]))

    def _unique(self, name: str) -> str:
        self._used[name] += 1
        return name if self._used[name] == 1 else f"{name}_{self._used[name] - 1}"

    def _imports(self) -> dict[str, int]:
        domains = [node.domain for node in self.nodes] + [name for f in self.functions for name in f.opset_imports]
        return {"": self.options.opset, **{name: 1 for name in domains if name}}

    def to_model(self, *, producer_version: str, metadata: dict[str, str]) -> ir.Model:
        """The finished model; the weights' tensors are to be set by whoever stores them."""
        used = {value for node in self.nodes for value in node.inputs}
        constants = [value for value in self._constants.values() if value in used]
        initializers = [*(weight.value for weight in self.weights.values()), *constants]
        graph = ir.Graph(
            self.inputs,
            self.outputs,
            nodes=self.nodes,
            initializers=initializers,
            opset_imports=self._imports(),
            name=self.name,
        )
        return ir.Model(
            graph,
            functions=self.functions,
            ir_version=IR_VERSIONS[self.options.opset],
            producer_name="matexport",
            producer_version=producer_version,
            metadata_props=metadata,
        )


class Body(Graph):
    """A graph without initializers: the body of a function. Its constants are nodes."""

    def constant(self, array: Any, dtype: str = "I64") -> ir.Value:
        data: np.ndarray = np.asarray(array, NUMPY[dtype])
        return self.op("Constant", value=ir.tensor(data))

    def to_function(self, domain: str, attributes: Mapping[str, Any]) -> ir.Function:
        """As a function of this name; `attributes` with their defaults, None for one that must be given."""
        graph = ir.Graph(self.inputs, self.outputs, nodes=self.nodes, opset_imports=self._imports(), name=self.name)
        declared = [
            ir.Attr(name, ir.AttributeType.UNDEFINED, None)
            if default is None
            else ir.convenience.convert_attribute(name, default)
            for name, default in attributes.items()
        ]
        return ir.Function(domain, self.name, graph=graph, attributes=declared)
