"""ONNX files in ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from matexport.errors import InputError, MissingError

if TYPE_CHECKING:
    import numpy as np


def load_onnx(file: Path, *, threads: int = 0) -> Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]:
    """Opens a model and returns a function from inputs by name to outputs by name.

    Args:
        threads: threads inside an operator; 0 leaves the choice to ONNX Runtime.
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
    try:
        session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as e:  # onnxruntime raises classes of its own, all derived from Exception only
        raise InputError(
            f"onnxruntime cannot load it: {e}", where=str(file), fix="write the ONNX folder again"
        ) from None
    names = [output.name for output in session.get_outputs()]

    def forward(inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        try:
            return dict(zip(names, session.run(names, dict(inputs)), strict=True))
        except Exception as e:
            fix = "write the ONNX folder again"
            raise InputError(f"onnxruntime cannot run it: {e}", where=str(file), fix=fix) from None

    return forward


def stored_weights(file: Path) -> dict[str, tuple[Path, int]]:
    """Where the external weights of a model lie: file and offset by name, in the model's own data file only.

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
        data = f"{file.name}_data"
        if place.get("location") == data and place.get("offset", "0").isdecimal() and (file.parent / data).is_file():
            found[initializer.name] = (file.parent / data, int(place.get("offset", "0")))
    return found
