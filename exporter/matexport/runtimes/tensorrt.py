"""Engines in TensorRT: this version builds them and does not run them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from matexport.errors import MissingError


def refuse_engine(artefact: Path, manifest: dict[str, Any]) -> NoReturn:
    """Raises MissingError with what can be checked instead."""
    flavour = manifest.get("tensorrt", {})
    what = f"{flavour.get('flavour')} {flavour.get('version')} engines can be built here, but not run"
    raise MissingError(what, where=str(artefact), fix="verify the ONNX folder that it was built from")
