"""One library and one model in every ONNX Runtime since 1.20: `make onnxruntimes` installs the older ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from native_ops import ATTRIBUTES, CONV, INPUTS, SCAN, Op, error, graph_bytes, instruction_sets, library, part
from support import REPOSITORY

FOLDER = REPOSITORY / "build" / "onnxruntime"
VERSIONS = ["1.20.1", "1.23.2", "1.25.1", "1.28.0", onnxruntime.__version__]
# run in an interpreter that finds the other version first
CHILD = """
import json, os, sys
import numpy as np, onnxruntime
results = {}
for name, job in json.loads(sys.argv[1]).items():
    os.environ["MATEXPORT_ISA"] = job["isa"]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if job["library"]:
        options.register_custom_ops_library(job["library"])
    session = onnxruntime.InferenceSession(job["model"], options, providers=["CPUExecutionProvider"])
    for key, value in zip(("y", "final_state"), session.run(None, dict(np.load(job["inputs"])))):
        results[f"{name} {key}"] = value
np.savez(sys.argv[2], **results)
print(onnxruntime.__version__)
"""


def examples() -> dict[str, tuple[Op, dict[str, np.ndarray]]]:
    """Prefill with padding, and one step; without z, which the functions do not have."""
    found = {}
    for op in (SCAN, CONV):
        for length in (100, 1):
            inputs = part(INPUTS[op], 0, length, INPUTS[op]["state"])
            found[f"{op.name} {length}"] = op, {k: v for k, v in inputs.items() if k != "z"}
    return found


@pytest.mark.parametrize("version", VERSIONS)
def test_kernels_and_functions(version: str, tmp_path: Path) -> None:
    """Our kernels of every instruction set, and the functions in the same file without them."""
    path = FOLDER / version
    if version != onnxruntime.__version__ and not path.is_dir():
        pytest.skip(f"onnxruntime {version} is not installed in {path.relative_to(REPOSITORY)}: make onnxruntimes")
    jobs: dict[str, Any] = {}
    for name, (op, inputs) in examples().items():
        model, data = tmp_path / f"{name}.onnx", tmp_path / f"{name}.npz"
        model.write_bytes(graph_bytes(op, inputs, "custom", ATTRIBUTES[op]))
        np.savez(data, **inputs)
        job = {"model": str(model), "inputs": str(data)}
        jobs[f"{name} function"] = {**job, "isa": "", "library": ""}
        for isa in instruction_sets():
            jobs[f"{name} {isa}"] = {**job, "isa": isa, "library": str(library())}
    environment = {**os.environ, "PYTHONPATH": str(path)}
    command = [sys.executable, "-c", CHILD, json.dumps(jobs), str(tmp_path / "results.npz")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == version
    results = np.load(tmp_path / "results.npz")
    for name, (op, inputs) in examples().items():
        want, want_state = op.reference(**inputs, **ATTRIBUTES[op])
        ways = {way: results[f"{name} {way} y"] for way in ("function", *instruction_sets())}
        for way, y in ways.items():
            assert error(y * inputs["mask"][..., None], want) < 1e-5, (name, way)
            assert error(results[f"{name} {way} final_state"], want_state) < 1e-5, (name, way)
        if op is SCAN:  # other code has run
            assert not np.array_equal(ways["function"], ways["portable"])
