"""The public functions: what the command line does, in the lines a notebook would have."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matexport.card import model_card
from matexport.checkpoint import Checkpoint, open_checkpoint
from matexport.errors import TableError, UsageError
from matexport.families import Family, family_of, table_of, with_options
from matexport.families.inputs import checked_inputs
from matexport.families.rows import WHOLE
from matexport.manifest import manifest_path, read_manifest
from matexport.planning import Plan
from matexport.slice_table import Row, Table, read_table
from matexport.targets import require_method, target_named
from matexport.tensorrt import Profile, build_engine, choose_plugins, refuse_for_kits, require_builder, write_kit
from matexport.tensorrt.precision import METHODS, require_precision
from matexport.tensors import dtype_named
from matexport.tokenizer import special_ids, tokenizer_files
from matexport.writer import Progress, write_checkpoint

if TYPE_CHECKING:
    import numpy as np

    from matexport.parity.report import Report

StrPath = str | Path


def _silent(_: int) -> None:
    """No progress."""


@dataclass(frozen=True)
class PlannedSlice:
    """A planned slice together with the checkpoint that it is cut from."""

    checkpoint: Checkpoint
    family: Family
    row: Row
    plan: Plan

    def write(
        self,
        output: StrPath,
        *,
        max_shard_size: int | None = None,
        force: bool = False,
        strict: bool = False,
        digest: bool = True,
        resume: bool = True,
        tokenizer: StrPath | None = None,
        stream: bool = False,
        progress: Progress = _silent,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Writes the standalone checkpoint; see `matexport.writer.write_checkpoint` for arguments and errors.

        Args:
            tokenizer: a folder whose tokenizer files go along, and whose special ids go into config.json.
            stream: read the weights of a repository on the Hub over HTTP, rather than download their files.
        """
        plan = self.plan
        files = self.family.extra_files(plan)
        if tokenizer is not None:
            files |= tokenizer_files(Path(tokenizer))
            plan = replace(plan, config={**plan.config, **special_ids(Path(tokenizer))})
        files["README.md"] = model_card(plan, self.row, self.checkpoint, self.family.card(plan)).encode()
        checkpoint = replace(self.checkpoint, streams=stream)
        write_checkpoint(
            checkpoint, plan, Path(output), files=files, max_shard_size=max_shard_size, force=force,
            strict=strict, digest=digest, resume=resume, progress=progress, warn=warn,
        )  # fmt: skip


def load_table(path: StrPath) -> Table:
    """Reads a slice table. Raises TableError."""
    return read_table(path)


def plan(
    model: StrPath,
    slice: str | Row | None = None,
    *,
    table: StrPath | Table | None = None,
    options: Sequence[str] = (),
    dtype: str | None = None,
    repair: bool = False,
    allow_pickle: bool = False,
) -> PlannedSlice:
    """Plans a slice of a checkpoint without reading a weight.

    Args:
        model: the checkpoint's folder, or ORG/NAME[@REVISION] on the Hub.
        slice: a row, or its name, `#number` or a unique part of its name; None is the whole model.
        table: a slice table; by default `slices.csv` beside the checkpoint, else the packaged one.
        options: of the family, by name: `text_only`, `drop_dead_kv`.
        dtype: cast float weights to `float32`, `float16` or `bfloat16`.
        repair: `slice` is what the checkpoint was cut with by a tool that left its config.json wrong; the plan is
            the whole checkpoint, put right.
        allow_pickle: also read `pytorch_model.bin`; nothing in it is run.

    Raises:
        CheckpointError, TableError: what is wrong, where, and the fix.
        UsageError: an option that the family does not have, or an unknown dtype.
        MissingError: the Hub cannot be reached, or the repository is not open to this user.
    """
    checkpoint = open_checkpoint(model, allow_pickle=allow_pickle)
    family = family_of(checkpoint)
    chosen, known = choose_table(checkpoint, family, table)
    if isinstance(slice, str):
        slice = need_table(chosen, checkpoint).find(slice)
    row = slice or WHOLE
    if repair:
        checkpoint, row = family.repair(checkpoint, slice), replace(WHOLE, name=row.name)
    planned = with_options(family.plan_slice(checkpoint, row, known), family, options, dtype_named(dtype))
    return PlannedSlice(checkpoint, family, row, planned)


def choose_table(
    checkpoint: Checkpoint, family: Family, table: StrPath | Table | None
) -> tuple[Table | None, Table | None]:
    """The table to take rows from, and the model's own one, which knows the trained widths.

    A table that is given counts even where the model's own one cannot be read.
    """
    try:
        known = table_of(checkpoint, family)
    except TableError:
        if table is None:
            raise
        known = None
    if table is None:
        return known, known
    return (table if isinstance(table, Table) else read_table(table)), known


def need_table(table: Table | None, checkpoint: Checkpoint) -> Table:
    """The table. Raises TableError if there is none for the model."""
    if table is None:
        fix = "give a slice table with -c, or put slices.csv beside the checkpoint"
        raise TableError("no slice table is packaged for this model", where=str(checkpoint.path), fix=fix)
    return table


def slice(
    model: StrPath, name: str, output: StrPath, *, table: StrPath | Table | None = None, **options: Any
) -> PlannedSlice:
    """Plans the row `name` of a model and writes it; see `plan` and `PlannedSlice.write`."""
    chosen = {key: options.pop(key) for key in ("options", "dtype", "repair", "allow_pickle") if key in options}
    planned = plan(model, name, table=table, **chosen)
    planned.write(output, **options)
    return planned


def export_onnx(
    model: StrPath | PlannedSlice,
    output: StrPath,
    *,
    slice: str | None = None,
    table: StrPath | Table | None = None,
    target: str = "cpu",
    form: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    calibration: Mapping[str, np.ndarray] | None = None,
    opset: int | None = None,
    split_embeddings: bool = False,
    force: bool = False,
    progress: Progress = _silent,
) -> None:
    """Writes ONNX: a folder with `model.onnx`, or one file (and its weights beside it) if `output` ends in .onnx.

    Args:
        dtype: what weights are stored as, `float32` (the default), `float16` or `bfloat16`; computed is in float32. For
            target `cuda` also what products are computed in, by default float16.
        quantize: how projections and embeddings are stored: `int8`, `int8-block` or `int4-block`; for target `cuda`
            also projections as `int8-weight`, `int4-weight`, `fp8` or `nvfp4` (see `matexport.graph.encoding`).
        calibration: with `fp8`, a batch of inputs by name: what products take is measured on it.
        opset: of ai.onnx; 21 by default.
        split_embeddings: a graph of their own for embeddings, `embed_tokens.onnx`, in front of
            `decoder_model_merged.onnx`; some targets have it so anyway.

    Raises:
        UsageError: the target cannot run the form, the form cannot be quantised so, the family has no such opset or no
            embeddings to split off, or the output cannot be used.
        CheckpointError, TableError: see `plan`.
    """
    from matexport.calibration import measure_ranges
    from matexport.graph.encoding import CALIBRATED
    from matexport.onnx import write_onnx
    from matexport.onnx.options import opset_of, stored_as

    chosen = target_named(target, "onnx", form)
    if isinstance(model, PlannedSlice) and (slice is not None or table is not None):
        raise UsageError("a planned slice is one row already", fix="leave out slice and table")
    planned = model if isinstance(model, PlannedSlice) else plan(model, slice, table=table)
    require_method(chosen, quantize, calibration is not None)
    exported, computed = stored_as(planned.plan, chosen, dtype)
    family = planned.family
    opset = opset or (23 if quantize == "nvfp4" else None)  # the first that has e2m1
    options: dict[str, Any] = {"quantize": quantize, "dtype": computed, "opset": opset_of(family, opset)}
    if quantize in CALIBRATED:
        samples = family.sample_inputs(planned.checkpoint.config, 1, 0)
        inputs = checked_inputs(calibration or {}, samples, "--calibration")
        options["ranges"] = measure_ranges(planned.checkpoint, planned.plan, family, inputs)
    graphs = family.build_split(exported, chosen.form, **options) if split_embeddings or chosen.split else {}
    if split_embeddings and not graphs:
        raise UsageError(f"{family.NAME} has no embeddings to split off", fix="leave out --split-embeddings")
    written = graphs or family.build_graph(exported, chosen.form, **options)
    write_onnx(planned.checkpoint, exported, written, Path(output), target=chosen, force=force, progress=progress)


def export_in_place(
    model: StrPath | PlannedSlice, *, target: str = "cpu", form: str | None = None, force: bool = False
) -> Path:
    """Puts `model.onnx` beside the weights of a standalone checkpoint, which it uses; returns its path.

    Raises:
        UsageError, CheckpointError: see `matexport.onnx.write_in_place`.
    """
    from matexport.onnx import write_in_place

    chosen = target_named(target, "onnx", form)
    if chosen.typed:
        what = f"target {target!r} stores weights in its own type"
        raise UsageError(what, fix="leave out --in-place, or use --target cpu")
    planned = model if isinstance(model, PlannedSlice) else plan(model)
    graph = planned.family.build_graph(planned.plan, chosen.form)
    return write_in_place(planned.checkpoint, planned.plan, graph, target=chosen, force=force)


def export_bundle(
    planned: Sequence[PlannedSlice],
    output: StrPath,
    *,
    target: str = "cpu",
    form: str | None = None,
    dtype: str | None = None,
    force: bool = False,
    progress: Progress = _silent,
) -> dict[str, str]:
    """Writes an elastic bundle of several rows of one checkpoint: one weights file, a graph a row.

    Returns:
        The file of each row, by its name.
    Raises:
        UsageError, CheckpointError: see `matexport.onnx.write_bundle`.
    """
    from matexport.onnx import write_bundle
    from matexport.onnx.options import stored_as

    chosen = target_named(target, "onnx", form)
    if len({each.checkpoint.path for each in planned}) != 1:
        raise UsageError("the rows of a bundle are of one checkpoint", fix="plan all of them from the same model")
    plans = [stored_as(each.plan, chosen, dtype) for each in planned]
    family, checkpoint = planned[0].family, planned[0].checkpoint
    rows = [(one, family.build_graph(one, chosen.form, elastic=True, dtype=computed)) for one, computed in plans]
    return write_bundle(checkpoint, rows, Path(output), target=chosen, force=force, progress=progress)


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
    if is_onnx(path, slice):
        if dtype or quantize or calibration is not None:
            fix = "leave out --dtype, --quantize and --calibration; or give the checkpoint"
            raise UsageError("an ONNX folder has its types already", where=str(path), fix=fix)
        return build(path, Path(output))
    planned, form = plan(model, slice, table=table), "stock" if plugin == "none" else "custom"
    # large tables stay outside of an engine
    split = chosen.kind == "engine" and form == "stock" and bool(planned.family.build_split(planned.plan, form))
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


def is_onnx(path: Path, slice: str | None) -> bool:
    """Whether an ONNX folder or file is there rather than a checkpoint. Raises UsageError if a row is named too."""
    if not manifest_path(path).is_file() or read_manifest(path)["kind"] == "checkpoint":
        return False
    if slice is not None:
        raise UsageError("an ONNX folder is one slice already", where=str(path), fix="leave out -s")
    return True


def verify(
    artefact: StrPath,
    source: StrPath,
    *,
    slice: str | None = None,
    table: StrPath | Table | None = None,
    inputs: Mapping[str, np.ndarray] | None = None,
    allow_pickle: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """Compares an artefact with its source; see `matexport.parity.verify.verify_artefact`."""
    from matexport.parity.verify import verify_artefact

    planned = plan(source, slice, table=table, allow_pickle=allow_pickle) if slice else None
    checkpoint = planned.checkpoint if planned else open_checkpoint(source, allow_pickle=allow_pickle)
    row = planned.row if planned else None
    return verify_artefact(Path(artefact), checkpoint, row=row, inputs=inputs, progress=progress)


__all__ = [
    "PlannedSlice", "build_trt", "export_bundle", "export_in_place", "export_onnx", "load_table", "plan",
    "slice", "verify",
]  # fmt: skip
