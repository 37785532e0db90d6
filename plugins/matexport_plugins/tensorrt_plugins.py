"""Both ops as TensorRT plugins that launch the Triton kernels: IPluginV3 in Python, for TensorRT and TensorRT-RTX.

    import tensorrt_rtx as trt  # or: import tensorrt as trt
    from matexport_plugins.tensorrt_plugins import register

    register(trt)  # before an engine with these plugins is built or loaded

Name, version and namespace are those of the plugins in CUDA (`matexport_plugins.trt_library()`): register one or the
other. Inputs, outputs and attributes are the ops' own; optional inputs that a node leaves out are told apart by type
and rank. Here the state cannot be written in place. An engine with them needs Python, PyTorch and Triton where it runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from matexport_plugins.causal_conv1d.tensorrt_plugin import CausalConv1d
from matexport_plugins.mamba2_scan.tensorrt_plugin import Mamba2Scan

if TYPE_CHECKING:
    import torch

NAMESPACE, VERSION = "ai.matexport", "1"
TYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "BOOL": "bool"}  # TensorRT's names and torch's
_creators: dict[Any, list[Any]] = {}  # by module; a registry does not own what Python made

Shape = Sequence[int]


class Op(Protocol):
    """What a plugin has to know of its op. Types are torch's, by name."""

    name: str
    required: int

    @property
    def outputs(self) -> int:
        """How many."""

    @classmethod
    def defaults(cls) -> dict[str, np.ndarray]:
        """The attributes and their values where a node has none; also their types."""

    @classmethod
    def from_fields(cls, fields: Mapping[str, np.ndarray]) -> Op:
        """Raises ValueError for attributes that make no sense."""

    def fields(self) -> dict[str, np.ndarray]: ...

    def names(self, types: Sequence[str], ranks: Sequence[int]) -> list[str]:
        """What each input is."""

    def takes(self, name: str, kind: str, x: str) -> bool:
        """Whether an input or output may have this type where x has that one."""

    def shapes(self, inputs: Sequence[Any], make: Any) -> list[list[Any]]:
        """Of the outputs; `make` computes with sizes, `make.divide(a, b)` and `make.subtract(a, b)`."""

    def workspace(self, shapes: Mapping[str, Shape], x: str) -> int:
        """Elements of float32 for inputs of these shapes; it grows with batch and length."""

    def run(self, tensors: Mapping[str, torch.Tensor], outputs: Sequence[torch.Tensor], workspace: Any) -> None: ...


def register(trt: Any) -> None:
    """Registers the plugins with a module. Once is enough; again does nothing.

    Args:
        trt: the module `tensorrt` or `tensorrt_rtx`.

    Raises:
        ValueError: other plugins have these names already: those in CUDA.
    """
    if trt in _creators:
        return
    registry = trt.get_plugin_registry()
    taken = {(c.name, c.plugin_version, c.plugin_namespace) for c in registry.all_creators}
    for op in (Mamba2Scan, CausalConv1d):
        if (op.name, VERSION, NAMESPACE) in taken:
            raise ValueError(f"{op.name} is registered already, by the CUDA library: load one or the other")
    plugin, creator = plugin_class(trt), creator_class(trt)
    _creators[trt] = [creator(op, plugin) for op in (Mamba2Scan, CausalConv1d)]
    for made in _creators[trt]:
        registry.register_creator(made, NAMESPACE)


def type_name(kind: Any) -> str:
    """A DataType as torch calls it; one that the ops do not have as TensorRT does."""
    return TYPES.get(kind.name, str(kind.name))


class Arithmetic:
    """Sizes that TensorRT knows when shapes are known."""

    def __init__(self, trt: Any, builder: Any) -> None:
        self.operations, self.builder = trt.DimensionOperation, builder

    def divide(self, a: Any, b: Any) -> Any:
        return self._operation(self.operations.FLOOR_DIV, a, b)

    def subtract(self, a: Any, b: Any) -> Any:
        return self._operation(self.operations.SUB, a, b)

    def _operation(self, kind: Any, *sizes: Any) -> Any:
        a, b = (self.builder.constant(size) if isinstance(size, int) else size for size in sizes)
        return self.builder.operation(kind, a, b)


def plugin_class(trt: Any) -> Any:
    """The class of both plugins; its bases are the module's."""

    class Plugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):  # type: ignore[misc]
        def __init__(self, op: Op) -> None:
            for base in Plugin.__bases__:
                base.__init__(self)
            self.op, self.num_outputs = op, op.outputs
            self.plugin_name, self.plugin_namespace, self.plugin_version = op.name, NAMESPACE, VERSION
            self.saved = Fields(trt, op.fields())

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            return Plugin(self.op)

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def get_fields_to_serialize(self) -> Any:
            return self.saved.collection

        def get_output_data_types(self, types: Sequence[Any]) -> list[Any]:
            return [types[0], trt.DataType.FLOAT][: self.op.outputs]

        def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any) -> list[Any]:
            if len(inputs) < self.op.required:
                raise ValueError(f"{self.op.name} has {len(inputs)} inputs and needs {self.op.required}")
            return [trt.DimsExprs(shape) for shape in self.op.shapes(inputs, Arithmetic(trt, builder))]

        def supports_format_combination(self, at: int, tensors: Sequence[Any], count: int) -> bool:
            kinds, ranks, _ = described([each.desc for each in tensors[:count]])
            names = [*self.op.names(kinds, ranks), "y", "final_state"]
            desc = tensors[at].desc
            linear = desc.format == trt.TensorFormat.LINEAR
            return linear and self.op.takes(names[at], type_name(desc.type), kinds[0])

        def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            pass

        def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
            kinds, ranks, _ = described([each.desc for each in inputs])
            largest = dict(zip(self.op.names(kinds, ranks), (tuple(each.max) for each in inputs), strict=True))
            return 4 * self.op.workspace(largest, kinds[0])

        def set_tactic(self, tactic: int) -> None:
            pass

        def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            pass

        def enqueue(
            self, input_desc: Sequence[Any], output_desc: Sequence[Any], inputs: Sequence[int], outputs: Sequence[int],
            workspace: int, stream: int,
        ) -> None:  # fmt: skip
            enqueue(self.op, input_desc, output_desc, inputs, outputs, workspace, stream)

    return Plugin


def creator_class(trt: Any) -> Any:
    """The class of their creators."""

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        def __init__(self, op: type[Op], plugin: Any) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.op, self.plugin = op, plugin
            self.name, self.plugin_namespace, self.plugin_version = op.name, NAMESPACE, VERSION
            self.known = Fields(trt, {k: v[:0] for k, v in op.defaults().items()})
            self.field_names = self.known.collection

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            given = {field.name: np.asarray(field.data) for field in fields}
            return self.plugin(self.op.from_fields({k: v for k, v in given.items() if v.size}))

    return Creator


class Fields:
    """A PluginFieldCollection of numbers, and what it points to: TensorRT keeps none of it alive."""

    def __init__(self, trt: Any, numbers: Mapping[str, np.ndarray]) -> None:
        kinds = {"int32": trt.PluginFieldType.INT32, "float32": trt.PluginFieldType.FLOAT32}
        self.numbers = dict(numbers)
        self.fields = [trt.PluginField(k, v, kinds[v.dtype.name]) for k, v in self.numbers.items()]
        self.collection = trt.PluginFieldCollection(self.fields)


def described(descs: Sequence[Any]) -> tuple[list[str], list[int], list[tuple[int, ...]]]:
    """Types, ranks and shapes."""
    shapes = [tuple(desc.dims) for desc in descs]
    return [type_name(desc.type) for desc in descs], [len(shape) for shape in shapes], shapes


# --------------------------------------------------------------------------------------------- running
def enqueue(
    op: Op, input_desc: Sequence[Any], output_desc: Sequence[Any], inputs: Sequence[int], outputs: Sequence[int],
    workspace: int, stream: int,
) -> None:  # fmt: skip
    """Launches the kernels on a CUDA stream, on memory at these addresses; without a GPU, where Triton interprets, on
    the host's memory. Allocates nothing, so that a CUDA graph can capture it once the kernels were compiled."""
    import torch

    from matexport_plugins.mamba2_scan.triton_op import INTERPRETED

    device = torch.device("cpu") if INTERPRETED else torch.device("cuda", torch.cuda.current_device())
    kinds, ranks, shapes = described(input_desc)
    names = op.names(kinds, ranks)
    places = zip(names, inputs, shapes, kinds, strict=True)
    tensors = {name: tensor_at(address, shape, kind, device) for name, address, shape, kind in places}
    kinds_out, _, shapes_out = described(output_desc)
    results = [
        tensor_at(address, shape, kind, device)
        for address, shape, kind in zip(outputs, shapes_out, kinds_out, strict=True)
    ]
    size = op.workspace(dict(zip(names, shapes, strict=True)), kinds[0])
    memory = tensor_at(workspace, (size,), "float32", device)
    stream_of: Any = torch.cuda.ExternalStream
    with contextlib.nullcontext() if INTERPRETED else torch.cuda.stream(stream_of(stream, device)):
        op.run(tensors, results, memory)


class CudaMemory:
    """Memory on a GPU, in the way that torch takes it over without a copy."""

    def __init__(self, address: int, shape: Shape, code: str) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False), "shape": tuple(shape), "typestr": code, "strides": None, "version": 3
        }  # fmt: skip


def tensor_at(address: int, shape: Shape, kind: str, device: torch.device) -> torch.Tensor:
    """A dense tensor over memory that somebody else owns; an empty one may have any address."""
    import torch

    dtype: torch.dtype = getattr(torch, kind)
    if math.prod(shape) == 0:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    if device.type == "cuda":
        code = {"float32": "<f4", "float16": "<f2", "bfloat16": "<i2", "bool": "|b1"}[kind]  # numpy has no bfloat16
        return torch.as_tensor(CudaMemory(address, shape, code), device=device).view(dtype)
    memory = (ctypes.c_uint8 * (math.prod(shape) * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(tuple(shape))
