"""ONNX folders: `model.onnx`, its weights streamed into one file beside it, config, manifest.

Also one file instead of a folder; a graph put beside the checkpoint whose weights it uses; and the elastic bundle, one
weights file with a graph for every row.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from matexport.checkpoint import Checkpoint
from matexport.errors import CheckpointError, UsageError
from matexport.graph.builder import DTYPES, Graph, Weight
from matexport.graph.options import OPSET
from matexport.manifest import BUNDLE, FILE, describe_slice, describe_source, json_bytes, manifest_bytes
from matexport.onnx.genai import genai_files
from matexport.onnx.web import rename_states, web_config
from matexport.onnx.weights import Layout, lay_out, split, weight_blocks
from matexport.planning import Plan, whole
from matexport.staging import check_space, staged_folder
from matexport.targets import Target
from matexport.tensors import FLOATS
from matexport.version import __version__
from matexport.writer import COMPANIONS, Files, Progress, companions, write_blocks

MODEL = "model.onnx"
Places = Mapping[str, tuple[str, int]]  # weight -> the file beside the model, and the offset in it


def _silent(count: int) -> None:
    """Progress that nobody sees."""


def write_onnx(
    checkpoint: Checkpoint,
    plan: Plan,
    graphs: Graph | Mapping[str, Graph],
    output: Path,
    *,
    target: Target,
    force: bool = False,
    progress: Progress = _silent,
) -> None:
    """Writes the graph of a planned slice; weights go from the checkpoint to the file in blocks.

    The output is a folder, as the target wants it; or, if its name ends in `.onnx`, that file, with `.onnx_data` and
    the manifest `.onnx.json` beside it. A model in several graphs, by file name, is a folder; each has weights of its
    own beside it, so that it can be used without the others.

    Raises:
        UsageError: the target cannot be what is asked for; and see `staged_folder`.
        OutputError: see `staged_folder`.
        CheckpointError: the source ends early or changed during the run.
    """
    named = {MODEL: graphs} if isinstance(graphs, Graph) else {f"{name}.onnx": g for name, g in graphs.items()}
    if output.suffix != ".onnx":
        parts = {file: split(lay_out([graph]), target.max_file) for file, graph in named.items()}
        files = _files(plan, named, target, {file: len(found) for file, found in parts.items()})
        with staged_folder(output, force=force, inputs=[checkpoint.path]) as folder:
            inner = folder / target.folder
            inner.mkdir(exist_ok=True)
            written: Files = {}
            check_space(inner, sum(part.size for found in parts.values() for part in found))
            for file, graph in named.items():
                places: dict[str, tuple[str, int]] = {}
                for i, part in enumerate(parts[file]):
                    name = f"{file}_data" + (f"_{i}" if i else "")
                    written |= _write_weights(checkpoint, [plan], part, inner, name, progress)
                    places |= _places(part.offsets[0], name)
                put(inner, written, file, _model(graph, plan, places, inner))
            written = {str(Path(target.folder, name)): entry for name, entry in written.items()}
            for name, content in files.items():
                put(folder, written, name, content)
            for path in companions(checkpoint.path):
                put(folder, written, path.name, path.read_bytes())
            put(folder, written, FILE, manifest_bytes(_manifest(checkpoint, plan, named, target, written)))
        return
    _refuse_folders(target)
    if not isinstance(graphs, Graph):
        fix = "name a folder with -o"
        raise UsageError("a model in several graphs is no single file", where=str(output), fix=fix)
    graph, layout = graphs, lay_out([graphs])
    data = f"{output.name}_data"
    _refuse_existing(output, (data, f"{output.name}.json", output.name), force)
    aside = output.with_name(f".{output.name}.files")
    with _aside(aside, [checkpoint.path]) as folder:
        written = _write_weights(checkpoint, [plan], layout, folder, data, progress)
        put(folder, written, output.name, _model(graph, plan, _places(layout.offsets[0], data), folder))
        manifest = manifest_bytes(_manifest(checkpoint, plan, named, target, written))
        put(folder, written, f"{output.name}.json", manifest)
    _publish_files(aside, output, (data, f"{output.name}.json", output.name))


def model_without_weights(plan: Plan, graph: Graph) -> bytes:
    """The model file of a planned slice, whose weights are said to be in a file that is not there."""
    return _model(graph, plan, dict.fromkeys(graph.weights, (f"{MODEL}_data", 0)), Path())


def write_in_place(checkpoint: Checkpoint, plan: Plan, graph: Graph, *, target: Target, force: bool = False) -> Path:
    """Puts `model.onnx` and its manifest beside the checkpoint's own weights, which it uses; returns its path.

    Raises:
        UsageError: the plan is not the whole checkpoint as it is, or `model.onnx` is there (without `force`).
        CheckpointError: the weights are not in safetensors files of this folder.
    """
    _refuse_folders(target)
    output = checkpoint.path / MODEL
    places = {}
    for name, weight in graph.weights.items():
        tensor = checkpoint.tensors[weight.tensor.view.source]
        if (
            weight.transposed
            or weight.tensor.dtype != tensor.dtype
            or weight.tensor.view.ranges != whole(tensor).ranges
        ):
            fix = "write the slice first, then run this on the slice: matexport slice"
            raise UsageError("--in-place uses whole tensors as they are stored", where=name, fix=fix)
        if tensor.file.suffix != ".safetensors":
            fix = "leave out --in-place, or slice it first: matexport slice -s full"
            raise CheckpointError("onnxruntime cannot read weights in a pickle", where=str(tensor.file), fix=fix)
        if tensor.file.is_symlink():  # as in the Hub's cache
            what = "is a link, and onnxruntime takes no data from outside the model's folder"
            fix = "leave out --in-place, or copy the checkpoint, links followed (cp -rL)"
            raise CheckpointError(what, where=str(tensor.file), fix=fix)
        places[name] = (tensor.file.name, tensor.start)
    _refuse_existing(output, (f"{MODEL}.json", MODEL), force)
    checkpoint.check_unchanged()
    aside = output.with_name(f".{MODEL}.files")
    written: Files = {}
    with _aside(aside, []) as folder:
        put(folder, written, MODEL, _model(graph, plan, places, checkpoint.path))
        manifest = {**_manifest(checkpoint, plan, {MODEL: graph}, target, written), "in_place": True}
        put(folder, written, f"{MODEL}.json", manifest_bytes(manifest))
    _publish_files(aside, output, (f"{MODEL}.json", MODEL))
    return output


def write_bundle(
    checkpoint: Checkpoint,
    rows: Sequence[tuple[Plan, Graph]],
    output: Path,
    *,
    target: Target,
    force: bool = False,
    progress: Progress = _silent,
) -> dict[str, str]:
    """Writes one weights file and a graph for each row, whose weights are ranges of it; returns files by row.

    Each `ROW.onnx` has `ROW.onnx.json`, its manifest, and `ROW.config.json` beside it.

    Raises:
        UsageError: two rows would have the same file name; or see `staged_folder`.
        CheckpointError: see `write_onnx`.
    """
    _refuse_folders(target)
    data, names = f"{MODEL}_data", [slug(plan.name) for plan, _ in rows]
    for i, name in enumerate(names):
        if name in names[:i]:
            first = rows[names.index(name)][0].name
            what = f"rows {first!r} and {rows[i][0].name!r} would both be {name}.onnx"
            raise UsageError(what, where=str(output), fix="rename one of them in the table")
    layout = lay_out([graph for _, graph in rows])
    with staged_folder(output, force=force, inputs=[checkpoint.path]) as folder:
        written = _write_weights(checkpoint, [plan for plan, _ in rows], layout, folder, data, progress)
        for name, (plan, graph), offsets in zip(names, rows, layout.offsets, strict=True):
            own: Files = {}
            put(folder, own, f"{name}.onnx", _model(graph, plan, _places(offsets, data), folder))
            put(folder, own, f"{name}.config.json", _config(plan))
            manifest = {**_manifest(checkpoint, plan, {MODEL: graph}, target, own), "elastic": True}
            put(folder, own, f"{name}.onnx.json", manifest_bytes(manifest))
            written |= own
        for path in companions(checkpoint.path):
            put(folder, written, path.name, path.read_bytes())
        found = {plan.name: f"{name}.onnx" for name, (plan, _) in zip(names, rows, strict=True)}
        manifest = {
            "kind": BUNDLE,
            "matexport": __version__,
            "family": rows[0][0].family,
            "source": describe_source(checkpoint),
            "rows": found,
            "files": dict(sorted(written.items())),
        }
        put(folder, written, FILE, manifest_bytes(manifest))
    return found


def slug(name: str) -> str:
    """A row's name as the name of a file."""
    return re.sub(r"[^a-z0-9.]+", "-", name.casefold()).strip("-.") or "row"


# ---------------------------------------------------------------------------------------------- parts
def _write_weights(
    checkpoint: Checkpoint, plans: Sequence[Plan], layout: Layout, folder: Path, name: str, progress: Progress
) -> Files:
    checkpoint.check_unchanged()
    check_space(folder, layout.size)
    checkpoint.fetch({tensor.view.source for plan in plans for tensor in plan.tensors.values()}, COMPANIONS)
    written = {name: write_blocks(folder / name, weight_blocks(checkpoint, layout), progress)}
    checkpoint.check_unchanged()
    return written


def _places(offsets: Mapping[str, int], file: str) -> Places:
    return {name: (file, offset) for name, offset in offsets.items()}


def _model(graph: Graph, plan: Plan, places: Places, folder: Path) -> bytes:
    """The model file; `folder` is where the files with its weights are while it is made."""
    for name, weight in graph.weights.items():
        file, offset = places[name]
        dtype, shape = DTYPES[weight.dtype], ir.Shape(weight.shape)
        weight.value.const_value = ir.ExternalTensor(
            file, offset, weight.nbytes, dtype, shape=shape, name=name, base_dir=folder
        )
    model = graph.to_model(producer_version=__version__, metadata={"matexport.slice": plan.name})
    model = ShapeInferencePass(check_type=True, strict_mode=True, data_prop=True)(model).model
    return bytes(ir.to_proto(model).SerializeToString(deterministic=True))


def _config(plan: Plan) -> bytes:
    return json_bytes({key: value for key, value in plan.config.items() if key != "auto_map"})


def _files(plan: Plan, graphs: Mapping[str, Graph], target: Target, data_files: Mapping[str, int]) -> dict[str, bytes]:
    """The small files of a folder for this target, whose names the graph then has too."""
    *_, graph = graphs.values()  # the one with the states
    if target.name == "web":
        return {"config.json": json_bytes(web_config(plan, rename_states(graph), data_files))}
    return {"config.json": _config(plan)} | (genai_files(plan, graph, target.form) if target.name == "genai" else {})


def _refuse_folders(target: Target) -> None:
    """What a program takes as a folder of its own is no single file, and not many rows."""
    if target.name in ("genai", "web"):
        fix = "name a folder with -o, and one row; or use --target cpu"
        raise UsageError(f"target {target.name!r} is a folder with one model", fix=fix)


def _manifest(
    checkpoint: Checkpoint, plan: Plan, graphs: Mapping[str, Graph], target: Target, written: Files
) -> dict[str, Any]:
    """Of several graphs `weights` are those of all, and `graphs` says which of them each has."""
    graph, *others = graphs.values()
    weights = {name: _describe_weight(weight) for one in graphs.values() for name, weight in one.weights.items()}
    return {
        "kind": "onnx",
        **describe_slice(plan, checkpoint),
        "target": target.name,
        "form": target.form,
        **({"dtype": FLOATS[graph.dtype]} if graph.dtype != "F32" else {}),
        **({"ranges": dict(graph.options.ranges)} if graph.options.ranges else {}),
        **({"opset": graph.options.opset} if graph.options.opset != OPSET else {}),
        **({"quantize": graph.options.quantize} if graph.options.quantize else {}),
        **({"graphs": {file: list(one.weights) for file, one in graphs.items()}} if others else {}),
        "weights": weights,
        "files": dict(sorted(written.items())),
    }


def _describe_weight(weight: Weight) -> dict[str, Any]:
    encoding = weight.encoding
    quantised = {"encoding": [encoding.method, encoding.part]} if encoding else {}
    return {**weight.tensor.to_json(), "transposed": weight.transposed, **quantised}


def put(folder: Path, written: Files, name: str, data: bytes) -> None:
    """Writes one small file and notes its digest."""
    written[name] = write_blocks(folder / name, [data])


# ----------------------------------------------------------------------- files in a folder of others
def _refuse_existing(output: Path, names: Sequence[str], force: bool) -> None:
    for path in map(output.with_name, names):
        if path.is_dir() or (path.exists() and not force):
            fix = "name another file" if path.is_dir() else "name another file, or replace it with --force"
            raise UsageError("output exists", where=str(path), fix=fix)


def _aside(aside: Path, inputs: Sequence[Path]) -> Any:
    shutil.rmtree(aside, ignore_errors=True)
    return staged_folder(aside, inputs=inputs)


def _publish_files(aside: Path, output: Path, names: Sequence[str]) -> None:
    """Moves files to their place, in order, the model last; an older model goes first: it must not meet new weights."""
    output.unlink(missing_ok=True)
    for name in names:
        (aside / name).replace(output.with_name(name))
    aside.rmdir()
