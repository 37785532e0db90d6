"""What products take, measured: the float32 model runs in ONNX Runtime on a user's inputs."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from matexport.checkpoint import Checkpoint
from matexport.errors import InputError, UsageError
from matexport.families import Family
from matexport.graph.builder import Graph
from matexport.graph.options import GraphOptions
from matexport.onnx import write_onnx
from matexport.planning import Plan
from matexport.runtimes.ort import open_onnx
from matexport.targets import target_named

if TYPE_CHECKING:
    import numpy as np

ROWS = 8  # inputs that run at once


def measure_ranges(
    checkpoint: Checkpoint, plan: Plan, family: Family, inputs: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """The largest magnitude of what each matrix of a planned slice is multiplied with, by the matrix's name.

    Args:
        inputs: a batch of the model's inputs, by name: `pixel_values`, or `input_ids` of rows without padding.

    Raises:
        InputError: inputs that the model does not take, or with which it overflows.
        MissingError: onnxruntime is not installed.
        UsageError: the family's graph does not say what its matrices are multiplied with.
    """
    import numpy as np

    target = target_named("cpu", "onnx")
    graph = family.build_graph(plan.cast("F32"), GraphOptions(target.form))
    names = list(graph.products)
    if not names:
        raise UsageError(f"{family.NAME} cannot be calibrated", fix="use --quantize int8-weight or int4-weight")
    _observe(graph)
    found = np.zeros(len(names))
    with tempfile.TemporaryDirectory() as folder:
        write_onnx(checkpoint, plan.cast("F32"), graph, Path(folder, "onnx"), target=target)
        program = open_onnx(Path(folder, "onnx", "model.onnx"))
        count = min(map(len, inputs.values()))
        for start in range(0, count, ROWS):
            given = {name: array[start : start + ROWS] for name, array in inputs.items()}
            if "input_ids" in given:
                ids = np.asarray(given["input_ids"], np.int64)
                given = {**program.tokens(ids, np.ones_like(ids)), **program.zeros(len(ids))}
            found = np.maximum(found, [program.run(given)[f"range.{i}"] for i in range(len(names))])
    if not np.isfinite(found).all():
        name = names[int(np.flatnonzero(~np.isfinite(found))[0])]
        raise InputError(f"what {name!r} is multiplied with is not finite", where="--calibration", fix="check them")
    return dict(zip(names, found.tolist(), strict=True))


def _observe(graph: Graph) -> None:
    """Makes the largest magnitude of what each matrix takes an output."""
    for i, x in enumerate(graph.products.values()):
        graph.output(graph.op("ReduceMax", graph.op("Abs", x), keepdims=0), f"range.{i}", "F32", [])
