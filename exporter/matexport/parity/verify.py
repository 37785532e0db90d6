"""Verifying an artefact against the checkpoint that it was made from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from matexport.checkpoint import Checkpoint, open_checkpoint
from matexport.dims import Dims
from matexport.errors import InputError
from matexport.families import Family, Forward, family_of, with_options
from matexport.families.inputs import checked_inputs
from matexport.families.rows import WHOLE
from matexport.graph.builder import Graph
from matexport.graph.encoding import CALIBRATED, METHODS
from matexport.graph.options import GraphOptions
from matexport.manifest import BUNDLE, describe_source, kept_tensors, manifest_path, read_manifest
from matexport.parity.comparison import Comparison, compare_outputs, compare_quantised, kind_of
from matexport.parity.engines import check_engine, check_golden, fitting_inputs
from matexport.parity.provenance import Stored, prove_files, prove_tensor
from matexport.parity.quality import quality
from matexport.parity.report import Report
from matexport.parity.stored import stored_source
from matexport.planning import Plan, PlannedTensor, whole
from matexport.runtimes.tensorrt import require_engine
from matexport.slice_table import FFN, Row
from matexport.targets import Target, target_named
from matexport.tensors import FLOATS
from matexport.version import __version__

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
        inputs: by name; random ones (fixed seed) by default. With `labels` (batch,) of images beside them, or of a
            language model, the report also says what the outputs are worth: accuracy or perplexity.

    Raises:
        InputError: the artefact cannot be read, or belongs to another kind of source.
        MissingError: this machine cannot run the artefact.
    """
    family = family_of(source)
    manifest = _manifest(artefact, row)
    if manifest["kind"] == BUNDLE:
        return _verify_bundle(artefact, manifest, source, inputs, progress)
    kind = manifest["kind"]
    if kind not in CHECKS:
        raise InputError(f"cannot verify an artefact of kind {kind!r}", where=str(artefact), fix="update matexport")
    record = _record(manifest, source, row)
    plan = family.plan_slice(source, row or _row_of(manifest, record, family, artefact), None)
    plan = with_options(plan, family, *_options_of(record, artefact))
    samples = family.sample_inputs(source.config, SAMPLES, SEED)
    if manifest["kind"] == "engine":
        require_engine(artefact, manifest)  # before the oracle is made
        samples = fitting_inputs(samples, manifest, str(artefact))
    given, labels = inputs is not None, _labels(inputs or {}, samples)
    inputs = samples if inputs is None else checked_inputs(inputs, samples, "--inputs")
    source.fetch(source.tensors)
    progress("the oracle")
    oracle = family.load_oracle(source, plan.layers, plan.dtype)
    want = oracle(inputs)
    progress(f"the {kind}")
    files = prove_files(artefact, manifest) if manifest_path(artefact).is_file() else []
    subject = Subject(artefact, manifest, record, source, family, plan, oracle, given, labels)
    if kind == "engine" and not all(comparison.passed for comparison in files):
        detail = "is not loaded: it is native code, and not what was built"
        found = [Comparison(artefact.name, kind, False, 0.0, detail=detail)]
        return Report(artefact.name, source.name, plan.name, (*found, *files), _described(given))
    try:
        found = CHECKS[kind](subject, inputs, want)
    except InputError as e:
        if all(comparison.passed for comparison in files):
            raise
        found = [Comparison(artefact.name, kind, False, 0.0, detail=f"{Path(e.where).name} cannot be read: {e.what}")]
    weights = _weight_bytes(subject)
    return Report(artefact.name, source.name, plan.name, (*found, *files), _described(given), weights)


def _verify_bundle(
    artefact: Path,
    manifest: dict[str, Any],
    source: Checkpoint,
    inputs: Mapping[str, np.ndarray] | None,
    progress: Callable[[str], None],
) -> Report:
    """Every row of an elastic bundle as an ONNX file of its own, then all files."""
    rows = manifest.get("rows")
    files = rows if isinstance(rows, dict) else {}
    if not files or not all(isinstance(f, str) and Path(f).name == f and f.endswith(".onnx") for f in files.values()):
        raise InputError("manifest names no rows", where=str(artefact), fix="write the bundle again")
    found: list[Comparison] = []
    for name, file in files.items():
        progress(f"row {name!r}")
        report = verify_artefact(artefact / file, source, inputs=inputs, progress=progress)
        found += [replace(c, name=f"{file}: {c.name}") for c in report.comparisons]
    found += prove_files(artefact, manifest)
    return Report(artefact.name, source.name, ", ".join(files), tuple(found), _described(inputs is not None))


def _described(given: bool) -> str:
    return "given" if given else f"random, seed {SEED}"


def _labels(inputs: Mapping[str, np.ndarray], samples: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """A user's labels, one whole number for each input, if they are given."""
    labels = inputs.get("labels")
    count = max((len(inputs[name]) for name in samples if name in inputs and inputs[name].ndim), default=0)
    if labels is not None and (labels.dtype.kind not in "iu" or labels.shape != (count,)):
        what = f"'labels' has type {labels.dtype} and shape {labels.shape}, whole numbers of shape ({count},) expected"
        raise InputError(what, where="--inputs", fix="give one label for each input, or none")
    return labels


def _manifest(artefact: Path, row: Row | None) -> dict[str, Any]:
    if row is not None and not manifest_path(artefact).is_file():
        return {"kind": "checkpoint", "files": {}}
    return read_manifest(artefact)


def _record(manifest: dict[str, Any], source: Checkpoint, row: Row | None) -> dict[str, Any]:
    """What the manifest says relative to `source`: its direct source, or the origin of that.

    Of another source it says nothing; a row then says what the artefact should be.
    """
    origin, direct = manifest.get("origin"), manifest.get("source")
    is_direct = isinstance(direct, dict) and direct.get("files") == describe_source(source)["files"]
    if isinstance(origin, dict) and not is_direct:
        return {**manifest, **origin}
    if "origin" in manifest and origin is None and not is_direct and row is None:
        name = direct.get("name") if isinstance(direct, dict) else "another checkpoint"
        fix = f"give {name!r} as --source: its weights were cast twice on the way"
        raise InputError("says nothing about this source", where="manifest", fix=fix)
    if row is not None and not is_direct and manifest["kind"] == "checkpoint":
        return {"kind": "checkpoint", "files": manifest["files"]}
    return manifest


def _row_of(manifest: dict[str, Any], described: dict[str, Any], family: Family, artefact: Path) -> Row:
    """The row that a manifest describes, as if from a table."""
    try:
        record = described["slice"]
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


def _options_of(record: dict[str, Any], artefact: Path) -> tuple[list[str], str | None]:
    """What a manifest says was done beside the row: options by name, and the dtype of a cast."""
    options, dtype = record.get("slice", {}).get("options", []), record.get("slice", {}).get("dtype")
    if not isinstance(options, list) or not (dtype is None or dtype in FLOATS):
        raise InputError("manifest cannot be read", where=str(artefact), fix="write the artefact again")
    return options, dtype


Outputs = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Subject:
    """What is verified: an artefact, what its manifest says relative to the source, and what it should be.

    Attributes:
        given: whether a user gave the inputs; `labels` are theirs.
    """

    artefact: Path
    manifest: dict[str, Any]
    record: dict[str, Any]
    source: Checkpoint
    family: Family
    plan: Plan
    oracle: Forward
    given: bool
    labels: np.ndarray | None


def _check_checkpoint(subject: Subject, inputs: Outputs, want: Outputs) -> list[Comparison]:
    plan, family = subject.plan, subject.family
    standalone = open_checkpoint(subject.artefact)
    recorded = kept_tensors(subject.record, "tensors", str(subject.artefact)) if "tensors" in subject.record else {}
    stored = {}
    for name, tensor in standalone.tensors.items():
        planned = plan.tensors.get(name)
        view = recorded[name].view if name in recorded else planned.view if planned and not recorded else whole(tensor)
        if view.shape != tensor.shape:
            view = whole(tensor)
        stored[name] = Stored(PlannedTensor(tensor.dtype, view), tensor.file, tensor.start)
    found = [*_prove(stored, plan.tensors, subject.source), *_check_config(subject, standalone)]
    if all(comparison.passed for comparison in found):  # else the model may not even load
        got = family.load_slice(standalone)(inputs)
        found += compare_outputs("checkpoint", got, want, family)
        stock = family.load_stock(standalone)
        if stock is not None:
            got = stock(inputs)
            found += compare_outputs("stock", got, {name: want[name] for name in want if name in got}, family)
    return found


def _check_config(subject: Subject, standalone: Checkpoint) -> list[Comparison]:
    """config.json says what the plan says, and code and notices are ours; a tokenizer may add its ids."""
    found = []
    for key, value in subject.plan.config.items():
        if not key.endswith("_token_id") and standalone.config.get(key) != value:
            detail = f"{key} is {standalone.config.get(key)!r}, {value!r} expected"
            found.append(Comparison("config.json", "config", False, 0.0, detail=detail))
    if subject.manifest.get("matexport") == __version__:
        for name, code in subject.family.extra_files(subject.plan).items():
            path = subject.artefact / name
            if not path.is_file() or path.read_bytes() != code:
                found.append(Comparison(name, "config", False, 0.0, detail="is not what this version writes"))
    return found or [Comparison("config.json", "config", True, 0.0)]


def _check_onnx(subject: Subject, inputs: Outputs, want: Outputs) -> list[Comparison]:
    from matexport.runtimes.ort import kernels, load_onnx, stored_weights

    artefact, record = subject.artefact, subject.record
    weights = kept_tensors(subject.manifest, "weights", str(artefact))
    target = target_named(str(subject.manifest.get("target")), "onnx", str(subject.manifest.get("form")))
    graphs = _planned_graphs(subject, target)
    quantize = subject.manifest.get("quantize")
    inner = artefact / target.folder
    files = [artefact] if artefact.is_file() else [inner / name for name in graphs]
    found = []
    for file, graph in zip(files, graphs.values(), strict=True):
        planned, stored = graph.weights, {}
        for name, (data, offset) in stored_weights(file).items():
            if name in weights and name in planned:
                # what is recorded relative to another source says nothing about this one; its bytes do
                view = planned[name].tensor.view if record is not subject.manifest else weights[name].view
                stored[name] = Stored(PlannedTensor(weights[name].dtype, view), data, offset, planned[name])
        proofs = _prove(stored, {name: weight.tensor for name, weight in planned.items()}, subject.source)
        found += proofs if len(files) == 1 else [replace(c, name=f"{file.name}: {c.name}") for c in proofs]
    # an elastic one has the channels of its convolution in another order; the loss of quantised ones is that of outputs
    left_out = "states." if quantize else "states.conv" if subject.manifest.get("elastic") else "no such name"
    want = {name: array for name, array in want.items() if left_out not in name}
    family, kind = subject.family, kind_of("onnx", subject.manifest)
    if quantize:
        kind, oracle = kind_of("onnx", {**subject.manifest, "quantize": None}), _stored_oracle(subject)
        assert oracle is not None
        stored_want = {name: array for name, array in oracle(inputs).items() if name in want}
    with_functions = any(graph.functions for graph in graphs.values()) and kernels() is not None
    for library in (True, False) if with_functions and target.form == "custom" else (True,):
        run = kind if library or kind != "onnx" else "functions"
        got = load_onnx(*files, library=library)(inputs)
        if quantize:  # right where inputs of products are not rounded, and if they are, by their rounding alone
            if quantize not in ("int8", *CALIBRATED):  # whose products are of integers, or of rounded numbers
                exact = load_onnx(*files, library=library, exact=True)(inputs)
                found += compare_outputs(run, exact, stored_want, family)
            found += compare_quantised(f"onnx {quantize}", got, stored_want, want, family)
        else:
            found += compare_outputs(run, got, want, family)
        if library and subject.given and got.keys() & want.keys() >= {"logits"}:
            worth, stated = quality(inputs, subject.labels, got["logits"], want["logits"]), "loss" if quantize else kind
            kinds = stated, f"{stated} {family.NAME}"
            found = [replace(c, quality=worth) if c.name == "logits" and c.kind in kinds else c for c in found]
    return found


def _stored_oracle(subject: Subject) -> Forward | None:
    """The oracle with the weights as a quantised artefact stores them; None for others."""
    family, plan = subject.family, subject.plan
    if subject.manifest.get("quantize") is None:
        return None
    weights = _quantised(subject).weights.values()
    source = stored_source(subject.source, family.plan_slice(subject.source, WHOLE, None), weights, plan.dtype)
    return family.load_oracle(source, plan.layers, None)


def _weight_bytes(subject: Subject) -> tuple[int, int] | None:
    """Bytes of a quantised artefact's weights, and of the same in float32; None for others."""
    if subject.manifest.get("quantize") is None:
        return None
    options = GraphOptions(str(subject.manifest.get("form")))
    plain = subject.family.build_graph(subject.plan.cast("F32"), options)
    sizes = [sum(weight.nbytes for weight in graph.weights.values()) for graph in (_quantised(subject), plain)]
    return sizes[0], sizes[1]


def _quantised(subject: Subject) -> Graph:
    """The graph of a quantised artefact, for its weights: what they are multiplied with makes no difference to them."""
    manifest, where = subject.manifest, str(subject.artefact)
    method, dtype = manifest.get("quantize"), _computed(manifest)
    if method not in METHODS or dtype is None:
        raise InputError("manifest cannot be read", where=where, fix="write the artefact again")
    any_range = defaultdict[str, float](lambda: 1.0)
    options = GraphOptions(str(manifest.get("form")), dtype, quantize=method, ranges=any_range)
    return subject.family.build_graph(subject.plan, options)


def _computed(manifest: Mapping[str, Any]) -> str | None:
    """The type of an artefact's products, None if there is no such type."""
    return {name: key for key, name in FLOATS.items()}.get(str(manifest.get("dtype", "float32")))


def _ranges(manifest: dict[str, Any], where: str) -> dict[str, float]:
    """What products of a calibrated artefact take, as it was measured."""
    try:
        return {str(name): float(value) for name, value in manifest["ranges"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise InputError(f"manifest cannot be read: {e!r}", where=where, fix="write the artefact again") from None


def _planned_graphs(subject: Subject, target: Target) -> dict[str, Graph]:
    """The graphs that a manifest says there are, by file. Raises InputError if it says what is none of ours."""
    family, manifest = subject.family, subject.manifest
    quantize, opset = manifest.get("quantize"), manifest.get("opset", family.OPSETS[0])
    computed = _computed(manifest)
    if not (quantize is None or quantize in METHODS) or opset not in family.OPSETS or computed is None:
        raise InputError("manifest cannot be read", where=str(subject.artefact), fix="write the artefact again")
    ranges = _ranges(manifest, str(subject.artefact)) if quantize in CALIBRATED else {}
    options = GraphOptions(target.form, computed, opset, manifest.get("elastic") is True, quantize, ranges)
    if "graphs" not in manifest or subject.artefact.is_file():
        return {"model.onnx": family.build_graph(subject.plan, options)}
    graphs = family.build_split(subject.plan, options)
    if not graphs:
        raise InputError("manifest cannot be read", where=str(subject.artefact), fix="write the artefact again")
    return {f"{name}.onnx": graph for name, graph in graphs.items()}


def _check_engine(subject: Subject, inputs: Outputs, want: Outputs) -> list[Comparison]:
    oracle = _stored_oracle(subject)
    stored = oracle(inputs) if oracle else None
    return check_engine(subject.artefact, subject.manifest, subject.family, inputs, want, stored)


def _check_kit(subject: Subject, inputs: Outputs, want: Outputs) -> list[Comparison]:
    """Its ONNX folder like any other, and its golden values."""
    folder, manifest = subject.artefact / "onnx", read_manifest(subject.artefact / "onnx")
    inner = replace(subject, artefact=folder, manifest=manifest, record=_record(manifest, subject.source, None))
    if manifest.get("slice") != subject.manifest.get("slice"):
        raise InputError("is of another slice than its ONNX folder", where=str(subject.artefact), fix="write it again")
    oracles = subject.oracle, _stored_oracle(subject)
    golden = check_golden(subject.artefact, subject.manifest, subject.family, *oracles, folder / "model.onnx")
    return _check_onnx(inner, inputs, want) + golden


def _prove(stored: Mapping[str, Stored], planned: Mapping[str, PlannedTensor], source: Checkpoint) -> list[Comparison]:
    found = [prove_tensor(name, entry, planned.get(name), source) for name, entry in stored.items()]
    missing = sorted(planned.keys() - stored.keys())
    return found + [Comparison(name, "provenance", False, 0.0, detail="the tensor is missing") for name in missing]


CHECKS = {"checkpoint": _check_checkpoint, "onnx": _check_onnx, "engine": _check_engine, "kit": _check_kit}
