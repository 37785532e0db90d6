"""The public function that writes the kernels of a model by themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matexport.api import StrPath, is_onnx, plan
from matexport.errors import InputError
from matexport.manifest import describe_slice, read_manifest
from matexport.slice_table import Table
from matexport.tensorrt import CAPABILITIES, fused_model, write_ptx


def emit_ptx(
    model: StrPath,
    output: StrPath,
    *,
    slice: str | None = None,
    table: StrPath | Table | None = None,
    capabilities: Sequence[int] = CAPABILITIES,
    force: bool = False,
    progress: Callable[[int], None] = lambda capability: None,
) -> dict[str, Any]:
    """Writes the Triton kernels of a checkpoint, or of an ONNX folder of form `custom`, as PTX; returns the manifest.

    Args:
        capabilities: compute capabilities, 90 for 9.0.

    Raises:
        UsageError: a row for an ONNX folder, which is one slice already.
        See also `matexport.tensorrt.write_ptx`.
    """
    import onnx

    path = Path(model)
    if is_onnx(path, slice):
        manifest = read_manifest(path)
        if manifest["kind"] != "onnx":
            what = f"is of kind {manifest['kind']!r}, not ONNX"
            raise InputError(what, where=str(path), fix="give a checkpoint, or what matexport onnx wrote")
        described = {key: manifest[key] for key in ("matexport", "family", "slice", "source")}
        loaded = onnx.load(path if path.is_file() else path / "model.onnx", load_external_data=False)
        source = path
    else:
        from matexport.onnx import model_without_weights

        planned = plan(model, slice, table=table)
        cast = planned.plan.cast("F32")
        described, source = describe_slice(cast, planned.checkpoint), planned.checkpoint.path
        loaded = onnx.load_from_string(model_without_weights(cast, planned.family.build_graph(cast, "custom")))
    fused_model(loaded)
    return write_ptx(
        loaded, Path(output), capabilities=capabilities, described=described, where=str(model), force=force,
        inputs=[source], progress=progress,
    )  # fmt: skip
