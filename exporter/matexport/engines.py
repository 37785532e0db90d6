"""The public functions of engines: build one, or its kit; say what would be built; write kernels by themselves."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matexport.api import StrPath, export_onnx, plan
from matexport.errors import InputError, MissingError, UsageError
from matexport.graph.options import GraphOptions
from matexport.manifest import describe_slice, manifest_path, read_manifest
from matexport.slice_table import Table
from matexport.targets import require_method, target_named
from matexport.tensorrt import (
    CAPABILITIES,
    Profile,
    build_engine,
    choose_plugins,
    fused_model,
    open_source,
    profiles,
    profiles_json,
    refuse_for_kits,
    require_builder,
    write_kit,
    write_ptx,
)
from matexport.tensorrt.precision import METHODS, require_precision
from matexport.tensors import dtype_named

if TYPE_CHECKING:
    import numpy as np


def build_trt(
    model: StrPath,
    output: StrPath,
    *,
    slice: str | None = None,
    table: StrPath | Table | None = None,
    target: str = "rtx",
    shapes: Mapping[str, Profile] | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    calibration: Mapping[str, np.ndarray] | None = None,
    plugin: str = "none",
    embed_plugin: bool = False,
    in_place: bool = False,
    timing_cache: StrPath | None = None,
    force: bool = False,
    warn: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Builds an engine, or writes the kit of one, and returns the manifest.

    Of an ONNX folder, or of a checkpoint by way of ONNX. Which of both it is, the target says.

    Args:
        dtype: what products are computed in: `float32` (the default), `float16` or `bfloat16`.
        quantize: how projections are stored: `int8` or `int4`; `fp8` or `nvfp4` where the target has them.
        calibration: with `fp8`, a batch of inputs by name.
        plugin: what has the ops: `none`, `cuda` or `triton`.
        embed_plugin: put the library into the engine, rather than beside it.
        in_place: write new states over old ones; both are then to be bound to the same memory.
        timing_cache: for target `tensorrt`: a file of timings, shared by builds.

    Raises:
        UsageError: a row or a precision for an ONNX folder, which has its own; a precision that the target has not.
        See also `matexport.tensorrt.build_engine`, `choose_plugins`, `write_kit` and `export_onnx`.
    """
    chosen, path = target_named(target, ("engine", "kit")), Path(model)
    if quantize is not None and quantize not in METHODS:
        raise UsageError(f"engines cannot be quantised {quantize!r}", fix=f"one of {', '.join(METHODS)}")
    method = METHODS[quantize] if quantize else None
    require_precision(chosen, method)
    options: dict[str, Any] = {"target": chosen, "shapes": shapes or {}, "force": force}
    build: Callable[..., dict[str, Any]]
    if chosen.kind == "kit":
        refuse_for_kits(plugin, embed=embed_plugin, in_place=in_place, timing_cache=timing_cache is not None)
        build = partial(write_kit, plugin=plugin, tolerance=_tolerance, **options)
    else:
        plugins = choose_plugins(plugin, embed=embed_plugin, in_place=in_place)
        gpu = require_builder(chosen)  # before the export, not after
        if gpu:
            require_precision(replace(chosen, capabilities=(gpu.capability,)), method)
        cache = None if timing_cache is None else Path(timing_cache)
        build = partial(build_engine, plugins=plugins, timing_cache=cache, warn=warn, **options)
    if _is_onnx(path, slice):
        if dtype or quantize or calibration is not None:
            fix = "leave out --dtype, --quantize and --calibration; or give the checkpoint"
            raise UsageError("an ONNX folder has its types already", where=str(path), fix=fix)
        return build(path, Path(output))
    planned, form = plan(model, slice, table=table), "stock" if plugin == "none" else "custom"
    # large tables stay outside of an engine
    split = (
        chosen.kind == "engine" and plugin == "none" and bool(planned.family.build_split(planned.plan, GraphOptions()))
    )
    export: Callable[..., None]
    if method or (dtype_named(dtype) or "F32") != "F32":
        typed: dict[str, Any] = {"dtype": dtype or "float32", "quantize": method, "calibration": calibration}
        require_method(target_named("cuda", "onnx", form), method, calibration is not None)
        export = partial(export_onnx, planned, target="cuda", form=form, split_embeddings=split, **typed)
    else:
        require_method(target_named("portable", "onnx"), None, calibration is not None)
        kind = "portable" if form == "stock" else "cpu"
        export = partial(export_onnx, planned, target=kind, split_embeddings=split)
    if chosen.kind == "kit":
        return build(export, Path(output), inputs=[planned.checkpoint.path])
    with tempfile.TemporaryDirectory() as folder:
        export(Path(folder, "onnx"))
        return build(Path(folder, "onnx"), Path(output), inputs=[planned.checkpoint.path])


def _tolerance(manifest: Mapping[str, Any]) -> float:
    """How much outputs of an engine may differ from golden values, which come from the same ONNX file."""
    from matexport.graph.encoding import CALIBRATED
    from matexport.parity.comparison import TOLERANCES, kind_of

    # both are in fp32, so that the errors of both count
    both = TOLERANCES.get(f"fp32 {manifest['family']}", 0.0)
    method = manifest.get("quantize")
    rounded = TOLERANCES[f"golden {method}"] if method in CALIBRATED else 0.0
    return max(TOLERANCES[kind_of("engine", {**manifest, "quantize": None})], rounded, both)


def plan_engine(
    model: StrPath,
    *,
    slice: str | None = None,
    table: StrPath | Table | None = None,
    target: str = "rtx",
    shapes: Mapping[str, Profile] | None = None,
    plugin: str = "none",
) -> dict[str, Any]:
    """The plan of an engine or a kit: the model, the GPUs, the profiles, and what is missing here to build it.

    Needs neither TensorRT nor a GPU, and reads no weights of a checkpoint.

    Raises:
        See `matexport.build_trt`.
    """
    chosen, path = target_named(target, ("engine", "kit")), Path(model)
    if _is_onnx(path, slice):
        source = open_source(path, chosen, shapes or {}, plugin)
        described, found = source.manifest["slice"], source.profiles
    else:
        planned = plan(model, slice, table=table)
        options = GraphOptions("stock" if plugin == "none" else "custom")
        split = planned.family.build_split(planned.plan, options) if chosen.kind == "engine" else {}
        graph = [*split.values()][-1] if split else planned.family.build_graph(planned.plan, options)
        inputs = {
            str(value.name): tuple(n if isinstance(n, int) else str(n) for n in value.shape or ())
            for value in graph.inputs
        }
        described = {"name": planned.plan.name, "parameters": planned.plan.parameters}
        found = profiles(inputs, shapes or {}, str(model), chosen.flavour)
    try:
        if chosen.kind == "engine":
            require_builder(chosen)
        missing = None
    except MissingError as e:
        missing = e.what
    return {
        "target": chosen.name,
        "kind": chosen.kind,
        "slice": described["name"],
        "parameters": described["parameters"],
        "flavour": chosen.flavour,
        "capabilities": list(chosen.capabilities),
        "plugin": plugin,
        "profiles": profiles_json(found),
        "missing": missing,
    }


def emit_ptx(
    model: StrPath,
    output: StrPath,
    *,
    slice: str | None = None,
    table: StrPath | Table | None = None,
    dtype: str | None = None,
    capabilities: Sequence[int] = CAPABILITIES,
    force: bool = False,
    progress: Callable[[int], None] = lambda capability: None,
) -> dict[str, Any]:
    """Writes the Triton kernels of a checkpoint, or of an ONNX folder of form `custom`, as PTX; returns the manifest.

    Args:
        dtype: what products of a checkpoint are computed in: `float32` (the default), `float16` or `bfloat16`; then so
            is what the kernels read and write along the sequence.
        capabilities: compute capabilities, 90 for 9.0.

    Raises:
        UsageError: a row or a type for an ONNX folder, which is one slice already; an unknown type.
        See also `matexport.tensorrt.write_ptx`.
    """
    import onnx

    path = Path(model)
    if _is_onnx(path, slice):
        if dtype:
            fix = "leave out --dtype, or give the checkpoint"
            raise UsageError("an ONNX folder has its types already", where=str(path), fix=fix)
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
        cast, options = planned.plan.cast("F32"), GraphOptions("custom", dtype_named(dtype) or "F32")
        described, source = describe_slice(cast, planned.checkpoint), planned.checkpoint.path
        loaded = onnx.load_from_string(model_without_weights(cast, planned.family.build_graph(cast, options)))
    fused_model(loaded)
    return write_ptx(
        loaded, Path(output), capabilities=capabilities, described=described, where=str(model), force=force,
        inputs=[source], progress=progress,
    )  # fmt: skip


def _is_onnx(path: Path, slice: str | None) -> bool:
    """Whether an ONNX folder or file is there rather than a checkpoint. Raises UsageError if a row is named too."""
    if not manifest_path(path).is_file() or read_manifest(path)["kind"] == "checkpoint":
        return False
    if slice is not None:
        raise UsageError("an ONNX folder is one slice already", where=str(path), fix="leave out -s")
    return True
