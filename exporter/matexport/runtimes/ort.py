"""ONNX files in ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matexport.errors import InputError, MissingError
from matexport.runtimes.program import Forward, Program, Value, chain, forward

if TYPE_CHECKING:
    import numpy as np


def kernels() -> Path | None:
    """The library of matexport-plugins' kernels, or None if it was not built."""
    import matexport_plugins

    return matexport_plugins.ort_library()


def load_onnx(*files: Path, **options: Any) -> Forward:
    """Opens a model and returns its function from inputs by name to outputs by name; see `open_onnx` and `forward`.

    A model in several graphs is given in the order in which they feed each other: embeddings, then the rest.
    """
    return forward(chain([open_onnx(file, **options) for file in files]))


def open_onnx(
    file: Path, *, threads: int = 0, library: bool = True, own_types: bool = False, exact: bool = False
) -> Program:
    """Opens a model.

    Args:
        threads: threads inside an operator; 0 leaves the choice to ONNX Runtime.
        library: whether to register the kernels of matexport-plugins, if they are there.
        own_types: inputs and outputs in bfloat16 are arrays of that type (of ml_dtypes) rather than of float32.
        exact: whether products with block-quantised weights take inputs as they are, where the model allows 8 bits.
    Raises:
        MissingError: onnxruntime is not installed.
        InputError: the file cannot be loaded.
    """
    try:
        import onnxruntime as ort
    except ImportError:
        raise MissingError("onnxruntime is not installed", fix="pip install 'matexport[ort]'") from None
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if library and (path := kernels()):
        options.register_custom_ops_library(str(path))
    try:
        model, halves = _runnable(file, exact)
        if model is not file:  # its weights are where it was
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(file.parent))
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as e:  # onnxruntime raises classes of its own, all derived from Exception only
        raise InputError(
            f"onnxruntime cannot load it: {e}", where=str(file), fix="write the ONNX folder again"
        ) from None
    outputs = tuple(output.name for output in session.get_outputs())

    types = {i.name: _dtype(i.type) for i in session.get_inputs()}
    half = _dtype("tensor(bfloat16)")

    def run(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            given = {name: array.astype(types.get(name, array.dtype), copy=False) for name, array in inputs.items()}
            found = dict(zip(outputs, session.run(outputs, given), strict=True))
            return found | {name: found[name].astype(half) for name in outputs if own_types and name in halves}
        except Exception as e:
            fix = "write the ONNX folder again"
            raise InputError(f"onnxruntime cannot run it: {e}", where=str(file), fix=fix) from None

    inputs = {
        i.name: Value(half if own_types and i.name in halves else types[i.name], tuple(i.shape))
        for i in session.get_inputs()
    }
    return Program(inputs, outputs, run)


def _runnable(file: Path, exact: bool) -> tuple[Path | bytes, set[str]]:
    """What ONNX Runtime's CPU is to run of a model: its file, or another model if that has types it has no kernels for.

    And the inputs and outputs that are bfloat16 in the file. With `exact`, without the attribute that lets products
    with quantised weights round their inputs.
    """
    import onnx

    from matexport.runtimes.lowered import without_bfloat16, without_float4

    model = onnx.load(file, load_external_data=False)
    values = (*model.graph.input, *model.graph.output)
    halves = {value.name for value in values if value.type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16}
    changed = any([without_float4(model, file.parent), without_bfloat16(model)])
    for node in model.graph.node if exact else ():
        kept = [attribute for attribute in node.attribute if attribute.name != "accuracy_level"]
        if len(kept) < len(node.attribute):
            changed = True
            del node.attribute[:]
            node.attribute.extend(kept)
    return (model.SerializeToString() if changed else file), halves


def _dtype(text: str) -> np.dtype[Any]:
    """The NumPy type of `tensor(float)` and the like."""
    import ml_dtypes
    import numpy as np

    name = text.removeprefix("tensor(").removesuffix(")")
    special = {"float": np.float32, "double": np.float64, "bfloat16": ml_dtypes.bfloat16}
    found: np.dtype[Any] = np.dtype(special.get(name, name))
    return found


def stored_weights(file: Path) -> dict[str, tuple[Path, int]]:
    """Where the external weights of a model lie: file and offset by name, in files of the model's own folder only.

    Raises:
        InputError: the model cannot be read.
    """
    import onnx

    try:
        initializers = onnx.load(file, load_external_data=False).graph.initializer
    except Exception as e:  # protobuf's errors, and the file system's
        raise InputError(f"is not an ONNX model: {e}", where=str(file), fix="write the ONNX folder again") from None
    found = {}
    for initializer in initializers:
        place = {entry.key: entry.value for entry in initializer.external_data}
        data, offset = place.get("location", ""), place.get("offset", "0")
        if data and Path(data).name == data and offset.isdecimal() and (file.parent / data).is_file():
            found[initializer.name] = (file.parent / data, int(offset))
    return found
