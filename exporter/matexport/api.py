"""The public functions: what the command line does, in the lines a notebook would have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matexport.card import model_card
from matexport.checkpoint import Checkpoint, open_checkpoint
from matexport.errors import TableError, UsageError
from matexport.families import Family, family_of, table_of, with_options
from matexport.families.inputs import checked_inputs
from matexport.families.rows import WHOLE
from matexport.graph.options import GraphOptions
from matexport.planning import Plan
from matexport.slice_table import Row, Table, read_table
from matexport.targets import require_method, target_named
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
    ranges: Mapping[str, float] = {}
    if quantize in CALIBRATED:
        samples = family.sample_inputs(planned.checkpoint.config, 1, 0)
        inputs = checked_inputs(calibration or {}, samples, "--calibration")
        ranges = measure_ranges(planned.checkpoint, planned.plan, family, inputs)
    options = GraphOptions(chosen.form, computed, opset_of(family, opset), quantize=quantize, ranges=ranges)
    graphs = family.build_split(exported, options) if split_embeddings or chosen.split else {}
    if split_embeddings and not graphs:
        raise UsageError(f"{family.NAME} has no embeddings to split off", fix="leave out --split-embeddings")
    written = graphs or family.build_graph(exported, options)
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
    graph = planned.family.build_graph(planned.plan, GraphOptions(chosen.form))
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
    rows = [
        (one, family.build_graph(one, GraphOptions(chosen.form, computed, elastic=True))) for one, computed in plans
    ]
    return write_bundle(checkpoint, rows, Path(output), target=chosen, force=force, progress=progress)


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
    "PlannedSlice", "export_bundle", "export_in_place", "export_onnx", "load_table", "plan", "slice", "verify",
]  # fmt: skip
