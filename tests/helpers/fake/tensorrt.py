"""The part of TensorRT's Python package that matexport uses, with ONNX Runtime in place of a GPU.

Names, arguments, order of calls and what is returned where something does not fit follow the package (python/src/infer
of NVIDIA/TensorRT 11.1). An engine is JSON: model, profiles and settings. Tensors are read and written at the addresses
that a context is given, in the memory of this process. From the environment: FAKE_TENSORRT_FAULT, `OUTPUT:FACTOR`.
"""

from __future__ import annotations

import base64
import ctypes
import enum
import json
import os
from typing import Any

import numpy as np
import onnx

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

    def parse_from_file(self, file: str) -> bool:
        try:
            opened = session(file)
        except Exception as e:
            self.errors.append(str(e))
            return False
        self.network.model = onnx.load(file).SerializeToString()  # weights included
        self.network.inputs = [Tensor(value) for value in opened.get_inputs()]
        self.network.outputs = [Tensor(value) for value in opened.get_outputs()]
        return True

    def get_error(self, index: int) -> Any:
        class Error:
            def __init__(self, text: str) -> None:
                self.desc = lambda: text

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
        return json.dumps({
            "version": __version__, "model": base64.b64encode(network.model).decode(), "strong": network.strong,
            "tf32": BuilderFlag.TF32 in config.flags, "profiles": [profile.shapes for profile in config.profiles],
        }).encode()  # fmt: skip


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        assert logger.ready
        self.logger, self.engine_host_code_allowed = logger, False

    def deserialize_cuda_engine(self, data: bytes) -> Engine | None:
        try:
            return Engine(json.loads(data), self.logger)
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
        self.found: dict[Any, dict[str, tuple[int, ...]]] = {}

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
        """Of outputs, by running the model on zeros: ONNX Runtime has no other way."""
        if self.infer_shapes():
            return self.engine.get_tensor_shape(name)
        key = tuple(self.shapes.items())
        if key not in self.found:
            zeros = {n: np.zeros(self.shapes[n], self._numpy(n)) for n in self.engine.inputs}
            self.found[key] = {n: array.shape for n, array in self._infer(zeros).items()}
        return self.found[key][name]

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
        for name, array in self._infer(given).items():
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
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
