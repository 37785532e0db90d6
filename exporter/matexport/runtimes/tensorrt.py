"""Engines in TensorRT and TensorRT-RTX, on a GPU: whether this machine can run one, and running it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matexport.errors import InputError, MissingError
from matexport.gpus import Gpu, dotted, find_gpus
from matexport.runtimes.program import Arrays, Program, Value
from matexport.targets import FLAVOURS

if TYPE_CHECKING:
    import numpy as np

DEVICE = "cuda"
TYPES = {  # of TensorRT, as PyTorch has them
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "INT32": "int32", "INT8": "int8",
    "UINT8": "uint8", "BOOL": "bool",
}  # fmt: skip


def require_engine(artefact: Path, manifest: Mapping[str, Any]) -> Gpu:
    """The GPU that runs an engine here; the engine itself is not touched. Raises MissingError, with the reason."""
    flavour, version, wanted = _built_by(artefact, manifest)
    where, of = str(artefact), f"an engine of {flavour} {version}"
    try:
        installed = str(importlib.import_module(FLAVOURS[flavour]).__version__)
    except ImportError:
        raise MissingError(f"is {of}, which is not installed", where=where, fix=_install(flavour, version)) from None
    if installed != version:
        what = f"is {of}, and {installed} is installed: an engine loads in the version that built it and in no other"
        raise MissingError(what, where=where, fix=f"build it again, or {_install(flavour, version)}")
    gpus, known = find_gpus(), " or ".join(map(dotted, wanted))
    if not gpus:
        what = f"is {of} for GPUs of compute capability {known}, and there is none here"
        raise MissingError(
            what,
            where=where,
            fix="verify it where such a GPU is; anywhere else, verify the ONNX folder that it was built from",
        )
    if gpus[0].capability not in wanted:
        what = f"is {of} for GPUs of compute capability {known}, and this one is {gpus[0]}"
        raise MissingError(what, where=where, fix="build it for this GPU: matexport trt")
    return gpus[0]


def _built_by(artefact: Path, manifest: Mapping[str, Any]) -> tuple[str, str, list[int]]:
    """Flavour, version and the compute capabilities that it is for. Raises InputError."""
    try:
        flavour, version = str(manifest["tensorrt"]["flavour"]), str(manifest["tensorrt"]["version"])
        capabilities = [int(n) for n in manifest["capabilities"]]
        known = flavour in FLAVOURS and all(
            isinstance(manifest[key], dict) for key in ("inputs", "outputs", "profiles")
        )
    except (KeyError, TypeError, ValueError):
        known = False
    if not known:
        raise InputError("manifest cannot be read", where=str(artefact), fix="build the engine again")
    return flavour, version, capabilities


def _install(flavour: str, version: str) -> str:
    return f"pip install tensorrt-rtx=={version}" if flavour == "TensorRT-RTX" else f"install TensorRT {version}"


@dataclass
class Engine:
    """An engine that is loaded, as a program; `used` are the profiles that were run so far."""

    program: Program
    profiles: Sequence[str]
    used: set[str] = field(default_factory=set)


def open_engine(artefact: Path, manifest: Mapping[str, Any]) -> Engine:
    """Loads an engine. It is native code: whoever calls this has compared its digest with the manifest.

    Raises:
        MissingError: see `require_engine`; or PyTorch with CUDA, for the buffers, is missing.
        InputError: the library refuses the engine, or it is not what the manifest says.
    """
    require_engine(artefact, manifest)
    try:
        import torch
    except ImportError:
        torch = None  # type: ignore[assignment]
    if torch is None or (DEVICE == "cuda" and not torch.cuda.is_available()):
        what = "engines are run with PyTorch's CUDA build, which is not installed"
        raise MissingError(what, where=str(artefact), fix="pip install 'matexport[gpu]'")
    flavour, _, _ = _built_by(artefact, manifest)
    loaded = _Loaded(importlib.import_module(FLAVOURS[flavour]), artefact, manifest)
    names = list(manifest["profiles"])
    engine = Engine(loaded.program(names), names)
    loaded.used = engine.used
    return engine


class _Loaded:
    """An engine and a context of it, which runs on buffers of PyTorch."""

    def __init__(self, trt: Any, artefact: Path, manifest: Mapping[str, Any]) -> None:
        self.where, self.used, self._messages = str(artefact), set[str](), list[str]()
        self._runtime = trt.Runtime(_log(trt, self._messages))
        self._load_plugins(trt, artefact, manifest.get("plugins") or {})
        self._engine = self._runtime.deserialize_cuda_engine((artefact / "model.engine").read_bytes())
        if self._engine is None:
            raise self._error("cannot be loaded")
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise self._error("cannot be run")
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        is_input = {name: self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        self.inputs, self.outputs = tuple(manifest["inputs"]), tuple(manifest["outputs"])
        self._aliases: dict[str, str] = manifest.get("aliases") or {}
        found = sorted(n for n in names if is_input[n]), sorted(n for n in names if not is_input[n])
        if found != (sorted(self.inputs), sorted(self.outputs)):
            raise InputError(
                "has other inputs and outputs than its manifest says", where=self.where, fix="build it again"
            )
        if self._engine.num_optimization_profiles != len(manifest["profiles"]):
            raise InputError("has other profiles than its manifest says", where=self.where, fix="build it again")

    def _load_plugins(self, trt: Any, artefact: Path, plugins: Mapping[str, Any]) -> None:
        """What an engine with plugins needs before it is loaded: see `load` in its manifest."""
        if plugins.get("embedded"):
            self._runtime.engine_host_code_allowed = True
        elif "library" in plugins:
            name = Path(str(plugins["library"])).name
            if trt.get_plugin_registry().load_library(str(artefact / name)) is None:
                fix = "build it again: matexport trt --plugin cuda"
                raise InputError(f"the library of its plugins, {name!r}, cannot be loaded", where=self.where, fix=fix)
        elif plugins:
            try:
                import triton  # noqa: F401

                from matexport_plugins.tensorrt_plugins import register
            except ImportError as e:
                fix = "pip install 'matexport[gpu]'"
                raise MissingError(f"its plugins are in Triton: {e}", where=self.where, fix=fix) from None
            register(trt)

    def program(self, profiles: Sequence[str]) -> Program:
        self._profiles = profiles
        import ml_dtypes
        import numpy as np

        values = {}
        for name in self.inputs:
            kind = TYPES[self._engine.get_tensor_dtype(name).name]
            shape = tuple(int(n) if n >= 0 else f"axis {i}" for i, n in enumerate(self._engine.get_tensor_shape(name)))
            values[name] = Value(np.dtype(getattr(ml_dtypes, kind, kind)), shape)
        return Program(values, self.outputs, self._run, lambda shapes: self._profile_of(shapes) is not None)

    def _profile_of(self, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        """The last profile that takes inputs of these shapes: that of one new token stands behind the general one."""
        for index in reversed(range(len(self._profiles))):
            ranges = {name: self._engine.get_tensor_profile_shape(name, index) for name in shapes}
            if all(_is_within(low, shapes[name], high) for name, (low, _, high) in ranges.items()):
                return index
        return None

    def _run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        import torch

        index = self._profile_of({name: array.shape for name, array in inputs.items()})
        if index is None:
            raise self._outside(inputs)
        stream = torch.cuda.Stream() if DEVICE == "cuda" else None
        handle = stream.cuda_stream if stream else 0
        buffers = {name: _to_torch(inputs[name]).to(DEVICE) for name in self.inputs}
        if stream:
            torch.cuda.synchronize()
        good = self._context.set_optimization_profile_async(index, handle)
        for name, tensor in buffers.items():
            good = good and self._context.set_input_shape(name, tuple(tensor.shape))
        if not good or self._context.infer_shapes():
            raise self._error("does not take these inputs")
        for name in self.outputs:
            kind = getattr(torch, TYPES[self._engine.get_tensor_dtype(name).name])
            buffers[name] = torch.empty(tuple(self._context.get_tensor_shape(name)), dtype=kind, device=DEVICE)
        for output, given in self._aliases.items():  # the new state is written where the old one is
            buffers[output] = buffers[given]
        held = {name: tensor if tensor.numel() else tensor.new_empty(1) for name, tensor in buffers.items()}
        for name, tensor in held.items():  # an address is wanted even of what is empty
            good = good and self._context.set_tensor_address(name, tensor.data_ptr())
        if not good or not self._context.execute_async_v3(handle):
            raise self._error("cannot be run")
        if stream:
            stream.synchronize()
        self.used.add(self._profiles[index])
        return {name: _to_numpy(buffers[name].cpu()) for name in self.outputs}

    def _error(self, what: str) -> InputError:
        reason = f": {self._messages[0]}" if self._messages else ""
        return InputError(f"{what}{reason}", where=self.where, fix="build it again on this machine: matexport trt")

    def _outside(self, inputs: Arrays) -> InputError:
        """No profile takes them: which input it is that the first profile does not take."""
        for name in self.inputs:
            low, _, high = self._engine.get_tensor_profile_shape(name, 0)
            if not _is_within(low, inputs[name].shape, high):
                got, least, most = ("x".join(map(str, sizes)) for sizes in (inputs[name].shape, low, high))
                what = f"no profile takes {name!r} in shape {got}; {self._profiles[0]!r} takes {least} to {most}"
                return InputError(what, where=self.where, fix="give such inputs, or build it with other shapes")
        return self._error("does not take these inputs")


def _is_within(low: Sequence[int], shape: Sequence[int], high: Sequence[int]) -> bool:
    return len(low) == len(shape) and all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))


def _log(trt: Any, messages: list[str]) -> Any:
    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity <= trt.ILogger.ERROR:
                messages.append(text.strip())

    return Log()


def _to_torch(array: np.ndarray) -> Any:
    import numpy as np
    import torch

    array = np.ascontiguousarray(array)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def _to_numpy(tensor: Any) -> np.ndarray:
    import ml_dtypes
    import torch

    if tensor.dtype == torch.bfloat16:
        found: np.ndarray = tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return found
    found = tensor.numpy()
    return found
