"""A stand-in for `tensorrt`, of which quickly-deployable plugins (QDP) can be registered and built without TensorRT.

Symbols are arithmetic on named sizes, to be evaluated later. Where TENSORRT_BINDINGS_DIR names the folder
`tensorrt_bindings` of an unpacked wheel `tensorrt-cu13-bindings`, its own Python is `tensorrt.plugin`; otherwise
`Declared`, which holds functions to the same rules: signatures, annotations, names, results.
"""

from __future__ import annotations

import enum
import importlib
import inspect
import os
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

BINDINGS = os.environ.get("TENSORRT_BINDINGS_DIR")


class DataType(enum.Enum):
    FLOAT, HALF, INT8, INT32, BOOL, INT64, BF16, FP8, INT4 = range(9)


class DimensionOperation(enum.Enum):
    SUM, PROD, MAX, MIN, SUB, EQUAL, LESS, FLOOR_DIV, CEIL_DIV = range(9)


COMPUTE: dict[DimensionOperation, Callable[[int, int], int]] = {
    DimensionOperation.SUM: lambda a, b: a + b, DimensionOperation.SUB: lambda a, b: a - b,
    DimensionOperation.PROD: lambda a, b: a * b, DimensionOperation.FLOOR_DIV: lambda a, b: a // b,
}  # fmt: skip


@dataclass
class IDimensionExpr:
    """A size: a function of named sizes."""

    value: Callable[[Mapping[str, int]], int]

    def is_constant(self) -> bool:
        return False


class IExprBuilder:
    def constant(self, number: int) -> IDimensionExpr:
        return IDimensionExpr(lambda sizes: number)

    def operation(self, kind: DimensionOperation, a: IDimensionExpr, b: IDimensionExpr) -> IDimensionExpr:
        return IDimensionExpr(lambda sizes: COMPUTE[kind](a.value(sizes), b.value(sizes)))


@dataclass
class Desc:
    """PluginTensorDesc and DynamicPluginTensorDesc in one."""

    type: Any = None
    dims: Any = ()
    format: Any = 0
    scale: float = 1.0

    @property
    def desc(self) -> Desc:
        return self


@dataclass
class Built:
    """What a builder has of one plugin: shapes of its outputs, its kernel, and how that is launched."""

    shapes: list[list[IDimensionExpr]]
    types: list[DataType]
    kernel: str
    ptx: str
    params: dict[str, IDimensionExpr]
    extra: list[IDimensionExpr]

    def at(self, **sizes: int) -> tuple[list[tuple[int, ...]], dict[str, int], list[int]]:
        """Shapes, launch parameters and integers for these sizes."""
        shapes = [tuple(size.value(sizes) for size in shape) for shape in self.shapes]
        return shapes, {k: v.value(sizes) for k, v in self.params.items()}, [v.value(sizes) for v in self.extra]


PARAMS = [f"{kind}_{axis}" for kind in ("grid", "block") for axis in "xyz"] + ["shared_mem"]


def core() -> Any:
    """The module `tensorrt`, as far as `tensorrt.plugin` needs it."""
    trt = types.ModuleType("tensorrt")
    names = (
        "IPluginV3",
        "IPluginV3QuickCore",
        "IPluginV3QuickBuild",
        "IPluginV3QuickAOTBuild",
        "IPluginV3QuickRuntime",
    )
    bases = {name: type(name, (), {}) for name in (*names, "IPluginCreatorV3Quick", "ITensor", "ISymExpr")}
    registry = types.SimpleNamespace(creators=[])
    registry.register_creator = lambda creator, namespace: registry.creators.append(creator)
    registry.get_creator = lambda name, version, namespace: registry.creators[-1]
    kinds = enum.Enum("PluginFieldType", "INT8 INT16 INT32 INT64 FLOAT16 FLOAT32 FLOAT64 CHAR UNKNOWN")
    trt.__dict__.update(
        bases, DataType=DataType, DimensionOperation=DimensionOperation, IDimensionExpr=IDimensionExpr,
        IExprBuilder=IExprBuilder, PluginTensorDesc=Desc, DynamicPluginTensorDesc=Desc, PluginFieldType=kinds,
        Logger=type("Logger", (), {"WARNING": 2, "log": lambda self, severity, text: None}),
        TensorFormat=enum.Enum("TensorFormat", "LINEAR CHW2 HWC8 CHW4 CHW16 CHW32 DHWC8 CDHW32 HWC DLA_LINEAR DLA_HWC4"
                               " HWC16 DHWC"),
        TensorRTPhase=enum.Enum("TensorRTPhase", "BUILD RUNTIME"), PluginField=lambda *a: a,
        PluginFieldCollection=list, get_plugin_registry=lambda: registry, DimsExprs=lambda n: [None] * n,
        Dims=type("Dims", (list,), {"MAX_DIMS": 8}), PluginArgType=enum.Enum("PluginArgType", "INT"),
        PluginArgDataType=enum.Enum("PluginArgDataType", "INT8 INT16 INT32"),
        QuickPluginCreationRequest=enum.Enum("QuickPluginCreationRequest", "STRICT_AOT STRICT_JIT"),
        float32=DataType.FLOAT, float16=DataType.HALF, bfloat16=DataType.BF16, int32=DataType.INT32, bool=DataType.BOOL,
    )  # fmt: skip
    return trt


@contextmanager
def tensorrt() -> Iterator[Any]:
    """`import tensorrt.plugin` works inside; yields that module."""
    trt = core()
    with mock.patch.dict(sys.modules):
        for name in [name for name in sys.modules if name.split(".")[0] == "tensorrt"]:
            del sys.modules[name]
        sys.modules["tensorrt"] = trt
        if BINDINGS:
            trt.__path__ = [str(Path(BINDINGS))]
            yield importlib.import_module("tensorrt.plugin")
        else:
            sys.modules["tensorrt.plugin"] = trt.plugin = Declared(trt)
            yield trt.plugin


def build(trtp: Any, name: str, inputs: Sequence[tuple[DataType, Sequence[str | int]]]) -> Built:
    """The calls that a builder makes of an AOT plugin; sizes that are names stay open."""
    make = IExprBuilder()
    exprs = [
        [make.constant(s) if isinstance(s, int) else IDimensionExpr(lambda sizes, s=s: sizes[s]) for s in shape]
        for _, shape in inputs
    ]
    if not BINDINGS:
        return trtp.build(name, [kind for kind, _ in inputs], exprs, make)
    trt, definition = sys.modules["tensorrt"], importlib.import_module("tensorrt.plugin._lib").QDP_REGISTRY[name]
    namespace, own = name.split("::")
    creator = importlib.import_module("tensorrt.plugin._lib")._TemplatePluginCreator(own, namespace, {})
    plugin = creator.create_plugin(own, namespace, [], None, trt.QuickPluginCreationRequest.STRICT_AOT)
    assert plugin.num_outputs == definition.num_outputs
    kinds = plugin.get_output_data_types([kind for kind, _ in inputs], [len(shape) for _, shape in inputs])
    shapes = plugin.get_output_shapes(exprs, [], make)
    descs = [Desc(kind, [-1] * len(shape)) for kind, shape in [*inputs, *zip(kinds, shapes, strict=True)]]
    plugin.get_supported_format_combinations(descs, len(inputs))
    plugin.set_tactic(0)
    params, setter = types.SimpleNamespace(), Extra()
    plugin.get_launch_params(exprs, descs, len(inputs), params, setter, make)
    kernel, ptx = plugin.get_kernel(descs[: len(inputs)], descs[len(inputs) :])
    found = {key: getattr(params, key).expr for key in PARAMS}
    extra = [setter.found[i].expr for i in range(setter.nbSymExprs)]
    return Built(shapes, kinds, kernel, ptx.decode(), found, extra)


class Extra:
    nbSymExprs = 0  # noqa: N815

    def __init__(self) -> None:
        self.found: dict[int, Any] = {}

    def __setitem__(self, i: int, value: Any) -> None:
        self.found[i] = value


# ------------------------------------------------------------------- what stands in for tensorrt.plugin
class SymInt32:
    """A symbol; it has to stand on the left of an operator, and is fake (None) before shapes are known."""

    builder: Any = None

    def __init__(self, value: Any = None) -> None:
        if isinstance(value, int):
            value = SymInt32.builder and SymInt32.builder.constant(value)
        self.expr = value.expr if isinstance(value, SymInt32) else value

    def _op(self, kind: DimensionOperation, other: Any) -> SymInt32:
        other = SymInt32(other) if isinstance(other, int) else other
        return SymInt32(self.expr and SymInt32.builder.operation(kind, self.expr, other.expr))

    def __add__(self, other: Any) -> SymInt32:
        return self._op(DimensionOperation.SUM, other)

    def __sub__(self, other: Any) -> SymInt32:
        return self._op(DimensionOperation.SUB, other)

    def __mul__(self, other: Any) -> SymInt32:
        return self._op(DimensionOperation.PROD, other)

    def __floordiv__(self, other: Any) -> SymInt32:
        return self._op(DimensionOperation.FLOOR_DIV, other)


@dataclass
class TensorDesc:
    shape_expr: Sequence[SymInt32] = ()
    dtype: Any = None


class SymIntExprs(list):
    def __init__(self, length: int) -> None:
        super().__init__([None] * length)


@dataclass
class KernelLaunchParams:
    values: dict[str, Any] = field(default_factory=lambda: {p: SymInt32(int(p != "shared_mem")) for p in PARAMS})

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "values":
            super().__setattr__(name, value)
        elif name in PARAMS:
            self.values[name] = SymInt32(value)
        else:
            raise AttributeError(name)


class Declared(types.ModuleType):
    """`tensorrt.plugin`, with the rules that it holds decorated functions to."""

    def __init__(self, trt: Any) -> None:
        super().__init__("tensorrt.plugin")
        self.trt, self.described, self.implemented = trt, {}, {}
        self.TensorDesc, self.SymInt32, self.SymIntExprs = TensorDesc, SymInt32, SymIntExprs
        self.KernelLaunchParams = KernelLaunchParams

    def from_shape_expr(self, shape: Sequence[Any], dtype: Any) -> TensorDesc:
        assert len(shape) <= 8
        return TensorDesc([s if isinstance(s, SymInt32) else SymInt32(s) for s in shape], dtype)

    def register(self, plugin_id: str) -> Callable[[Any], Any]:
        def decorate(function: Any) -> Any:
            namespace, name = plugin_id.split("::")
            assert "." not in plugin_id
            assert namespace not in ("", "trt", "tensorrt", "std")
            assert plugin_id not in self.described, f"already has a definition for {name!r}"
            signature = inspect.signature(function)
            for parameter in signature.parameters.values():
                assert parameter.kind == inspect.Parameter.POSITIONAL_OR_KEYWORD
                assert parameter.annotation is TensorDesc, "no attributes here: AOT plugins do not keep them"
                assert parameter.default is inspect.Parameter.empty
            assert typing.get_origin(signature.return_annotation) is tuple
            assert set(typing.get_args(signature.return_annotation)) == {TensorDesc}
            self.described[plugin_id] = function
            return function

        return decorate

    def aot_impl(self, plugin_id: str) -> Callable[[Any], Any]:
        def decorate(function: Any) -> Any:
            inputs = list(inspect.signature(self.described[plugin_id]).parameters)
            signature = inspect.signature(function)
            assert list(signature.parameters) == [*inputs, "outputs", "tactic"]
            result = typing.get_args(signature.return_annotation)
            assert [set(typing.get_args(kind)) for kind in result[:2]] == [{str, bytes}] * 2
            assert result[2:] == (KernelLaunchParams, SymIntExprs)
            self.implemented[plugin_id] = function
            return function

        return decorate

    def build(self, name: str, kinds: list[DataType], exprs: list[list[IDimensionExpr]], make: Any) -> Built:
        describe = self.described[name]
        promised = len(typing.get_args(inspect.signature(describe).return_annotation))
        SymInt32.builder = None  # types are asked for before shapes are known
        fakes = [TensorDesc([SymInt32() for _ in e], kind) for kind, e in zip(kinds, exprs, strict=True)]
        types_out = [desc.dtype for desc in describe(*fakes)]
        SymInt32.builder = make
        descs = [TensorDesc([SymInt32(s) for s in e], kind) for kind, e in zip(kinds, exprs, strict=True)]
        outputs = describe(*descs)
        assert len(outputs) == promised
        kernel, ptx, params, extra = self.implemented[name](*descs, list(outputs), 0)
        assert isinstance(params, KernelLaunchParams)
        assert isinstance(extra, SymIntExprs)
        assert all(isinstance(value, SymInt32) for value in extra)
        shapes = [[s.expr for s in desc.shape_expr] for desc in outputs]
        found = {key: value.expr for key, value in params.values.items()}
        return Built(shapes, types_out, kernel, ptx, found, [value.expr for value in extra])
