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
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))

    return forward
