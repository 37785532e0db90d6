"""Verifying an artefact against the checkpoint that it was made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from matexport.checkpoint import Checkpoint, open_checkpoint
from matexport.dims import Dims
from matexport.errors import InputError
from matexport.families import Family, family_of
from matexport.manifest import kept_tensors, manifest_path, read_manifest
from matexport.parity.comparison import Comparison, compare
from matexport.parity.provenance import Stored, prove_files, prove_tensor
from matexport.parity.report import Report
from matexport.planning import Plan, PlannedTensor, whole
from matexport.slice_table import FFN, Row
from matexport.targets import target_named

SAMPLES, SEED = 8, 0


def verify_artefact(
    artefact: Path,
    source: Checkpoint,
    *,
    row: Row | None = None,
    inputs: Mapping[str, np.ndarray] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """Proves that an artefact is a slice of `source` and computes what `source` computes with the slice applied.

    The weights must be views of the source's, bit for bit; a checkpoint must give bit for bit the
    oracle's outputs, another artefact within the tolerance of its kind.

    Args:
        row: the slice, for a checkpoint without a manifest.
        inputs: by name; random ones (fixed seed) by default.

    Raises:
        InputError: the artefact cannot be read, or belongs to another kind of source.
        MissingError: this machine cannot run the artefact.
    """
    family = family_of(source)
    manifest = _manifest(artefact, row)
    plan = family.plan_slice(source, row or _row_of(manifest, family, artefact), None)
    samples = family.sample_inputs(source.config, SAMPLES, SEED)
    inputs = samples if inputs is None else _checked(inputs, samples)
    progress("the oracle")
    want = family.load_oracle(source, plan.layers)(inputs)
    kind = manifest["kind"]
    check = {"checkpoint": _check_checkpoint, "onnx": _check_onnx, "engine": _check_engine}.get(kind)
    if check is None:
        raise InputError(f"cannot verify an artefact of kind {kind!r}", where=str(artefact), fix="update matexport")
    progress(f"the {kind}")
    files = prove_files(manifest_path(artefact).parent, manifest)
    try:
        found = check(artefact, manifest, source, family, plan, inputs, want)
    except InputError as e:
        if all(comparison.passed for comparison in files):
            raise
        found = [Comparison(artefact.name, kind, False, 0.0, detail=f"{Path(e.where).name} cannot be read: {e.what}")]
    return Report(artefact.name, source.path.resolve().name, plan.name, (*found, *files))


def _checked(inputs: Mapping[str, np.ndarray], samples: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A user's inputs, if they have the names, types and shapes (but for the first axis) of our own."""
    for name, sample in samples.items():
        if name not in inputs:
            fix = f"the inputs are {', '.join(samples)}"
            raise InputError(f"input {name!r} is missing", where="--inputs", fix=fix)
        array = inputs[name]
        if array.shape[1:] != sample.shape[1:] or not array.shape or not array.shape[0]:
            what = f"input {name!r} has shape {array.shape}, (any, {', '.join(map(str, sample.shape[1:]))}) expected"
            raise InputError(what, where="--inputs", fix="give a batch of the model's own inputs")
    return {name: np.ascontiguousarray(inputs[name], sample.dtype) for name, sample in samples.items()}


def _manifest(artefact: Path, row: Row | None) -> dict[str, Any]:
    if row is not None and not manifest_path(artefact).is_file():
        return {"kind": "checkpoint", "files": {}}
    return read_manifest(artefact)


def _row_of(manifest: dict[str, Any], family: Family, artefact: Path) -> Row:
    """The row that a manifest describes, as if from a table."""
    try:
        record = manifest["slice"]
        widths = Dims(head=tuple(int(layer["width"]) for layer in record["layers"]))
        skipped = tuple(map(int, record["skipped"]))
        name, family_name = str(record["name"]), manifest["family"]
    except (KeyError, TypeError, ValueError) as e:
        raise InputError(
            f"manifest cannot be read: {e!r}", where=str(artefact), fix="write the artefact again"
        ) from None
    if family_name != family.NAME:
        what = f"is of family {family_name!r}, its source of {family.NAME!r}"
        raise InputError(what, where=str(artefact), fix="give the checkpoint that it was made from with --source")
    is_ffn = family.COLUMN == FFN
    return Row(name, skipped, ffn=widths if is_ffn else None, mamba=None if is_ffn else widths, where=str(artefact))


Outputs = Mapping[str, np.ndarray]


def _check_checkpoint(
    artefact: Path,
    manifest: dict[str, Any],
    source: Checkpoint,
    family: Family,
    plan: Plan,
    inputs: Outputs,
    want: Outputs,
) -> list[Comparison]:
    standalone = open_checkpoint(artefact)
    recorded = kept_tensors(manifest, "tensors", str(artefact)) if "tensors" in manifest else {}
    stored = {}
    for name, tensor in standalone.tensors.items():
        planned = plan.tensors.get(name)
        view = recorded[name].view if name in recorded else planned.view if planned and not recorded else whole(tensor)
        if view.shape != tensor.shape:
            view = whole(tensor)
        stored[name] = Stored(PlannedTensor(tensor.dtype, view), tensor.file, tensor.start)
    found = _prove(stored, plan.tensors, source)
    if all(comparison.passed for comparison in found):  # else the model may not even load
        got = family.load_slice(standalone)(inputs)
        found += _compare_outputs("checkpoint", got, want)
        stock = family.load_stock(standalone)
        if stock is not None:
            found += _compare_outputs("stock", stock(inputs), want)
    return found


def _compare_outputs(kind: str, got: Outputs, want: Outputs) -> list[Comparison]:
    """Every output with the oracle's, and what was decoded step by step with what was computed at once."""
    found = [compare(name, kind, got[name], want[name]) for name in want]
    steps = [name for name in want if name.startswith("decode.")]
    return found + [compare(name, "decode", got[name], want[name.removeprefix("decode.")]) for name in steps]


def _check_onnx(
    artefact: Path,
    manifest: dict[str, Any],
    source: Checkpoint,
    family: Family,
    plan: Plan,
    inputs: Outputs,
    want: Outputs,
) -> list[Comparison]:
    import onnx

    from matexport.runtimes.ort import load_onnx

    file = artefact if artefact.is_file() else artefact / "model.onnx"
    recorded = kept_tensors(manifest, "weights", str(artefact))
    model = onnx.load(file, load_external_data=False)
    stored = {}
    for initializer in model.graph.initializer:
        entries = {entry.key: entry.value for entry in initializer.external_data}
        if entries and initializer.name in recorded:
            transposed = bool(manifest["weights"][initializer.name].get("transposed"))
            data = file.parent / Path(entries["location"]).name
            stored[initializer.name] = Stored(recorded[initializer.name], data, int(entries["offset"]), transposed)
    planned = plan.cast(target_named(manifest.get("target", ""), "onnx").dtype).tensors
    found = _prove(stored, {name: tensor for name, tensor in planned.items() if name in recorded}, source)
    got = load_onnx(file)(inputs)
    return found + _compare_outputs("onnx", got, want)


def _check_engine(
    artefact: Path,
    manifest: dict[str, Any],
    source: Checkpoint,
    family: Family,
    plan: Plan,
    inputs: Outputs,
    want: Outputs,
) -> list[Comparison]:
    from matexport.runtimes.tensorrt import load_engine

    got = load_engine(artefact, manifest)(inputs)
    return _compare_outputs("onnx", got, want)


def _prove(stored: Mapping[str, Stored], planned: Mapping[str, PlannedTensor], source: Checkpoint) -> list[Comparison]:
    found = [prove_tensor(name, entry, planned.get(name), source) for name, entry in stored.items()]
    missing = sorted(planned.keys() - stored.keys())
    return found + [Comparison(name, "provenance", False, 0.0, detail="the tensor is missing") for name in missing]
