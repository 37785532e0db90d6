"""The part of TensorRT's Python package that matexport uses, with ONNX Runtime in place of a GPU.

Names, arguments, order of calls and what is returned where something does not fit follow the package (python/src/infer
of NVIDIA/TensorRT 11.1). An engine is JSON: model, profiles and settings. Tensors are read and written at the addresses
that a context is given, in the memory of this process. From the environment: FAKE_TENSORRT_FAULT, `OUTPUT:FACTOR`.
Plugins are there once a library, or Python, has brought them; what they compute, our ops for ONNX Runtime compute.
"""

from __future__ import annotations

import base64
import ctypes
import enum
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import external_data_helper

import matexport_plugins

__version__ = os.environ.get("FAKE_TENSORRT_VERSION", "10.16.1.11")


class DataType(enum.Enum):
    FLOAT, HALF, INT8, INT32, BOOL, UINT8, FP8, BF16, INT64 = range(9)


NUMPY = {
    DataType.FLOAT: np.float32, DataType.HALF: np.float16, DataType.INT64: np.int64, DataType.INT32: np.int32,
    DataType.BOOL: np.bool_,
}  # fmt: skip
ONNX = {"tensor(float)": DataType.FLOAT, "tensor(float16)": DataType.HALF, "tensor(int64)": DataType.INT64}


class NetworkDefinitionCreationFlag(enum.IntEnum):
    EXPLICIT_BATCH, STRONGLY_TYPED = 0, 1


class BuilderFlag(enum.IntEnum):
    TF32 = 7


class TensorIOMode(enum.Enum):
    NONE, INPUT, OUTPUT = range(3)


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self) -> None:
        self.ready = True  # a class derived from it must call this

    def log(self, severity: int, text: str) -> None:
        raise NotImplementedError


class Tensor:
    def __init__(self, value: Any) -> None:
        self.name, self.dtype = value.name, ONNX[value.type]
        self.shape = tuple(n if isinstance(n, int) else -1 for n in value.shape)


NAMESPACE = "ai.matexport"


class PreviewFeature(enum.Enum):
    ALIASED_PLUGIN_IO_10_03 = 1


class IPluginV3:
    pass


class IPluginV3OneCore:
    pass


class IPluginV3OneBuild:
    pass


class IPluginV3OneRuntime:
    pass


class IPluginCreatorV3One:
    pass


class PluginFieldType(enum.Enum):
    INT32, FLOAT32 = 1, 2


def PluginField(name: str, data: Any, kind: PluginFieldType) -> Any:  # noqa: N802
    return name, data, kind


def PluginFieldCollection(fields: list[Any]) -> list[Any]:  # noqa: N802
    return fields


class Creator:
    def __init__(self, name: str) -> None:
        self.name, self.plugin_version, self.plugin_namespace = name, "1", NAMESPACE


class Registry:
    def __init__(self) -> None:
        self.all_creators = list[Any]()

    def load_library(self, path: str) -> Any:
        try:
            ctypes.CDLL(path).getCreators  # noqa: B018
        except (OSError, AttributeError):
            return None
        self.all_creators += [Creator("Mamba2Scan"), Creator("CausalConv1d")]
        return self

    def register_creator(self, creator: Any, namespace: str) -> bool:
        assert creator.plugin_namespace == namespace
        self.all_creators.append(creator)
        return True


registry = Registry()


def get_plugin_registry() -> Registry:
    return registry


def plugins_are_known() -> bool:
    return {"Mamba2Scan", "CausalConv1d"} <= {creator.name for creator in registry.all_creators}


class Network:
    def __init__(self, strong: bool) -> None:
        self.strong, self.model, self.inputs, self.outputs = strong, b"", list[Tensor](), list[Tensor]()

    num_inputs = property(lambda self: len(self.inputs))
    num_outputs = property(lambda self: len(self.outputs))

    def get_input(self, index: int) -> Tensor:
        return self.inputs[index]

    def get_output(self, index: int) -> Tensor:
        return self.outputs[index]


class OnnxParser:
    def __init__(self, network: Network, logger: ILogger) -> None:
        self.network, self.errors = network, list[str]()

    num_errors = property(lambda self: len(self.errors))

    def parse(self, model: bytes, path: str) -> bool:
        """Weights lie beside the file at `path`."""
        loaded = onnx.load_from_string(model)
        if any(node.domain == NAMESPACE for node in loaded.graph.node) and not plugins_are_known():
            self.errors.append("Plugin not found, are the plugin name, version, and namespace correct?")
            return False
        try:
            external_data_helper.load_external_data_for_model(loaded, str(Path(path).parent))
            self.network.model = loaded.SerializeToString()
            opened = session(self.network.model)
        except Exception as e:
            self.errors.append(str(e))
            return False
        self.network.inputs = [Tensor(value) for value in opened.get_inputs()]
        self.network.outputs = [Tensor(value) for value in opened.get_outputs()]
        return True

    def get_error(self, index: int) -> Any:
        class Error:
            def __init__(self, text: str) -> None:
                self.desc, self.node_operator, self.node_name = (lambda: text), (lambda: ""), (lambda: "")

        return Error(self.errors[index])


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[tuple[int, ...]]] = {}

    def set_shape(self, name: str, low: tuple[int, ...], best: tuple[int, ...], high: tuple[int, ...]) -> None:
        self.shapes[name] = [low, best, high]


class TimingCache:
    def __init__(self, version: str, count: int) -> None:
        self.version, self.count = version, count

    def serialize(self) -> bytes:
        return json.dumps([self.version, self.count]).encode()


class BuilderConfig:
    def __init__(self, logger: ILogger) -> None:
        self.logger, self.flags, self.profiles = logger, {BuilderFlag.TF32}, list[Profile]()
        self.cache: TimingCache | None = None
        self.plugins_to_serialize, self.preview = list[str](), set[Any]()

    def set_preview_feature(self, feature: Any, on: bool) -> None:
        (self.preview.add if on else self.preview.discard)(feature)

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def clear_flag(self, flag: BuilderFlag) -> None:
        self.flags.discard(flag)

    def create_timing_cache(self, blob: bytes) -> TimingCache | None:
        if not blob:
            return TimingCache(__version__, 0)
        try:
            return TimingCache(*json.loads(blob))
        except ValueError:
            self.logger.log(ILogger.ERROR, "the timing cache cannot be read")
            return None

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        if cache.version != __version__ and not ignore_mismatch:
            self.logger.log(ILogger.ERROR, "the timing cache is of another version")
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> TimingCache:
        assert self.cache
        return self.cache


class Builder:
    def __init__(self, logger: ILogger) -> None:
        assert logger.ready
        self.logger = logger

    def create_network(self, flags: int) -> Network:
        return Network(bool(flags & 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED))

    def create_builder_config(self) -> BuilderConfig:
        return BuilderConfig(self.logger)

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: Network, config: BuilderConfig) -> bytes | None:
        for tensor in network.inputs:
            for profile in config.profiles:
                if -1 in tensor.shape and tensor.name not in profile.shapes:
                    self.logger.log(ILogger.ERROR, f"{tensor.name} has no shape in a profile")
                    return None
        if config.cache:
            config.cache.count += 1
        nodes = onnx.load_from_string(network.model).graph.node
        aliased = [(n.output[1], i) for n in nodes for a in n.attribute if a.name == "in_place"
                   for i in n.input if i.startswith("past")]  # fmt: skip
        if aliased and PreviewFeature.ALIASED_PLUGIN_IO_10_03 not in config.preview:
            self.logger.log(ILogger.ERROR, "Aliased I/O, but PreviewFeature::kALIASED_PLUGIN_IO_10_03 not enabled")
            return None
        return json.dumps({
            "version": __version__, "model": base64.b64encode(network.model).decode(), "strong": network.strong,
            "tf32": BuilderFlag.TF32 in config.flags, "profiles": [profile.shapes for profile in config.profiles],
            "plugins": any(node.domain == NAMESPACE for node in nodes), "embedded": config.plugins_to_serialize,
            "aliased": aliased,
        }).encode()  # fmt: skip


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        assert logger.ready
        self.logger, self.engine_host_code_allowed = logger, False

    def deserialize_cuda_engine(self, data: bytes) -> Engine | None:
        try:
            plan = json.loads(data)
            if plan["plugins"] and not plugins_are_known() and not (plan["embedded"] and self.engine_host_code_allowed):
                self.logger.log(ILogger.ERROR, "Cannot find plugin: Mamba2Scan, version: 1, namespace: ai.matexport.")
                return None
            return Engine(plan, self.logger)
        except ValueError:
            self.logger.log(ILogger.ERROR, "Magic tag does not match")
            return None


class Engine:
    def __init__(self, plan: dict[str, Any], logger: ILogger) -> None:
        self.plan, self.logger, self.session = plan, logger, session(base64.b64decode(plan["model"]))
        values = [*self.session.get_inputs(), *self.session.get_outputs()]
        self.tensors = {value.name: Tensor(value) for value in values}
        self.inputs = [value.name for value in self.session.get_inputs()]

    num_io_tensors = property(lambda self: len(self.tensors))
    num_optimization_profiles = property(lambda self: len(self.plan["profiles"]))

    def get_tensor_name(self, index: int) -> str:
        return sorted(self.tensors)[index]  # any order

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return self.tensors[name].dtype

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self.plan["profiles"][index][name]]

    def create_execution_context(self) -> Context:
        return Context(self)


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.profile = engine, 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile, self.shapes, self.addresses = index, {}, {}
        return index < self.engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.get_tensor_profile_shape(name, self.profile)
        if not all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
            self.engine.logger.log(ILogger.ERROR, f"{name} in {shape} is outside of profile {self.profile}")
            return False
        self.shapes[name] = shape
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self.engine.inputs if name not in self.shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """Of outputs, by the names of their axes."""
        if name in self.shapes:
            return self.shapes[name]
        sizes = {}
        for value in self.engine.session.get_inputs():
            sizes |= dict(zip(value.shape, self.shapes.get(value.name, ()), strict=False))
        [shape] = [value.shape for value in self.engine.session.get_outputs() if value.name == name]
        return tuple(n if isinstance(n, int) else sizes.get(n, -1) for n in shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return address != 0

    def execute_async_v3(self, stream_handle: int) -> bool:
        if self.infer_shapes() or self.addresses.keys() != self.engine.tensors.keys():
            self.engine.logger.log(ILogger.ERROR, "not all shapes and addresses are set")
            return False
        given = {}
        for name in self.engine.inputs:
            given[name] = np.zeros(self.shapes[name], self._numpy(name))
            ctypes.memmove(given[name].ctypes.data, self.addresses[name], given[name].nbytes)
        fault, _, factor = os.environ.get("FAKE_TENSORRT_FAULT", "").partition(":")
        aliased = dict(self.engine.plan["aliased"])
        for name, array in self._infer(given).items():
            if name in aliased and self.addresses[name] != self.addresses[aliased[name]]:
                continue  # written over the state, and what was bound to the output stays as it was
            if name == fault:
                array = (array * float(factor)).astype(array.dtype)
            ctypes.memmove(self.addresses[name], array.ctypes.data, array.nbytes)
        return True

    def _numpy(self, name: str) -> Any:
        return NUMPY[self.engine.get_tensor_dtype(name)]

    def _infer(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = [value.name for value in self.engine.session.get_outputs()]
        arrays = map(np.ascontiguousarray, self.engine.session.run(names, inputs))
        return dict(zip(names, arrays, strict=True))


def session(model: str | bytes) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    library = matexport_plugins.ort_library()
    if library is not None:
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
