"""An ONNX folder: `model.onnx`, its weights streamed into one file beside it, config, manifest."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from matexport.checkpoint import Checkpoint
from matexport.errors import UsageError
from matexport.graph.builder import DTYPES, Graph, Weight
from matexport.manifest import FILE, describe_slice, json_bytes, manifest_bytes
from matexport.planning import Plan
from matexport.staging import check_space, staged_folder
from matexport.streaming import Pool, stream, stream_transposed
from matexport.targets import Target
from matexport.tensors import numpy_dtype
from matexport.version import __version__
from matexport.writer import AHEAD, COMPANIONS, Files, Progress, companions, write_blocks

ALIGN, ALIGN_LARGE, LARGE = 64, 4096, 1 << 16  # large weights start on a page, so that they can be mapped


def write_onnx(
    checkpoint: Checkpoint,
    plan: Plan,
    graph: Graph,
    output: Path,
    *,
    target: Target,
    force: bool = False,
    progress: Progress = lambda n: None,
) -> None:
    """Writes the graph of a planned slice; weights go from the checkpoint to the file in blocks.

    The output is a folder; or, if its name ends in `.onnx`, that file, with `.onnx_data` and the manifest
    `.onnx.json` beside it.

    Raises:
        UsageError, OutputError: see `staged_folder`.
        CheckpointError: the source ends early or changed during the run.
    """
    if output.suffix != ".onnx":
        with staged_folder(output, force=force, inputs=[checkpoint.path]) as folder:
            written = _write_model(checkpoint, plan, graph, folder, "model.onnx", progress)
            put(folder, written, "config.json", json_bytes({k: v for k, v in plan.config.items() if k != "auto_map"}))
            for path in companions(checkpoint.path):
                put(folder, written, path.name, path.read_bytes())
            put(folder, written, FILE, manifest_bytes(_manifest(checkpoint, plan, graph, target, written)))
        return
    names = (f"{output.name}_data", f"{output.name}.json", output.name)  # in the order of publishing: the model last
    for path in map(output.with_name, names):
        if path.is_dir() or (path.exists() and not force):
            fix = "name another file" if path.is_dir() else "name another file, or replace it with --force"
            raise UsageError("output exists", where=str(path), fix=fix)
    aside = output.with_name(f".{output.name}.files")
    shutil.rmtree(aside, ignore_errors=True)
    with staged_folder(aside, inputs=[checkpoint.path]) as folder:
        written = _write_model(checkpoint, plan, graph, folder, output.name, progress)
        put(folder, written, f"{output.name}.json", manifest_bytes(_manifest(checkpoint, plan, graph, target, written)))
    output.unlink(missing_ok=True)
    for name in names:
        (aside / name).replace(output.with_name(name))
    aside.rmdir()


def _write_model(
    checkpoint: Checkpoint, plan: Plan, graph: Graph, folder: Path, name: str, progress: Progress
) -> Files:
    """Writes the model file `name` and its weights; returns what was written."""
    offsets, size = _place(graph)
    checkpoint.check_unchanged()
    check_space(folder, size)
    checkpoint.fetch((tensor.view.source for tensor in plan.tensors.values()), COMPANIONS)
    data = f"{name}_data"
    weights = list(graph.weights.values())
    written = {data: write_blocks(folder / data, _weight_blocks(checkpoint, weights, offsets), progress)}
    for weight in weights:
        weight.value.const_value = ir.ExternalTensor(
            data,
            offsets[str(weight.value.name)],
            weight.tensor.nbytes,
            DTYPES[weight.tensor.dtype],
            shape=ir.Shape(weight.shape),
            name=str(weight.value.name),
            base_dir=folder,
        )
    model = graph.to_model(producer_version=__version__, metadata={"matexport.slice": plan.name})
    model = ShapeInferencePass(check_type=True, strict_mode=True, data_prop=True)(model).model
    put(folder, written, name, ir.to_proto(model).SerializeToString(deterministic=True))
    checkpoint.check_unchanged()
    return written


def _manifest(checkpoint: Checkpoint, plan: Plan, graph: Graph, target: Target, written: Files) -> dict[str, Any]:
    weights = {name: {**w.tensor.to_json(), "transposed": w.transposed} for name, w in graph.weights.items()}
    return {
        "kind": "onnx",
        **describe_slice(plan, checkpoint),
        "target": target.name,
        "form": target.form,
        "weights": weights,
        "files": dict(sorted(written.items())),
    }


def put(folder: Path, written: Files, name: str, data: bytes) -> None:
    """Writes one small file and notes its digest."""
    written[name] = write_blocks(folder / name, [data])


def _place(graph: Graph) -> tuple[dict[str, int], int]:
    """The offset of every weight in the weights file, and the file's size."""
    offsets: dict[str, int] = {}
    end = 0
    for name, weight in graph.weights.items():
        align = ALIGN_LARGE if weight.tensor.nbytes >= LARGE else ALIGN
        offsets[name] = -(-end // align) * align
        end = offsets[name] + weight.tensor.nbytes
    return offsets, end


def _weight_blocks(checkpoint: Checkpoint, weights: list[Weight], offsets: dict[str, int]) -> Iterator[Any]:
    position, pool = 0, Pool(AHEAD + 1)
    for weight in weights:
        offset = offsets[str(weight.value.name)]
        if offset > position:
            yield bytes(offset - position)
        view, dtype = weight.tensor.view, numpy_dtype(weight.tensor.dtype)
        for block in stream_transposed(checkpoint, view) if weight.transposed else stream(checkpoint, view, pool=pool):
            yield block.astype(dtype, copy=False).view(np.uint8)
        position = offset + weight.tensor.nbytes
