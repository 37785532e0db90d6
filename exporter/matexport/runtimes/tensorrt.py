"""Engines in TensorRT, on the GPU of this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matexport.errors import MissingError

if TYPE_CHECKING:
    import numpy as np


def load_engine(
    artefact: Path, manifest: dict[str, Any]
) -> Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]:
    """Opens an engine. This version cannot run one: raises MissingError with what can be checked instead."""
    flavour = manifest.get("tensorrt", {})
    what = f"{flavour.get('flavour')} {flavour.get('version')} engines can be built here, but not run"
    raise MissingError(what, where=str(artefact), fix="verify the ONNX folder that it was built from")
