"""Every form of a language model in every ONNX Runtime since 1.20: `make onnxruntimes` installs the older ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import matexport as mx
from matexport.dims import Dims
from matexport.graph.stateful import FORMS
from matexport.slice_table import Row
from matexport_plugins import ort_library
from support import REPOSITORY

FOLDER = REPOSITORY / "build" / "onnxruntime"
VERSIONS = ["1.20.1", "1.23.2", "1.25.1", "1.28.0", onnxruntime.__version__]
ROW = Row("mixed", skipped=(1,), mamba=Dims(head=(32, 12)))
# in an interpreter that finds the other version first: a prefill of 7 tokens, one of which is padding, and the rest
CHILD = """
import json, sys
import numpy as np, onnxruntime
found = {}
for way, (model, library) in json.loads(sys.argv[1]).items():
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if library:
        options.register_custom_ops_library(library)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feeds = dict(np.load(sys.argv[2]))
    if "pixel_values" in feeds:
        found[way] = session.run(None, feeds)[0]
        continue
    ids, mask = feeds["input_ids"], feeds["attention_mask"]
    past = {i.name: np.zeros([len(ids), *i.shape[1:]], np.float32) for i in session.get_inputs()[2:]}
    pieces = []
    for begin, end in ((0, 7), (7, 8), (8, ids.shape[1])):
        logits, *present = session.run(None, {"input_ids": ids[:, begin:end], "attention_mask": mask[:, :end], **past})
        past = dict(zip(past, present))
        pieces.append(logits)
    found[way] = np.concatenate(pieces, 1)
np.savez(sys.argv[3], **found)
print(onnxruntime.__version__)
"""


def in_version(version: str, folder: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What each form gives there, without our library, and the form `custom` with it too."""
    path = FOLDER / version
    if version != onnxruntime.__version__ and not path.is_dir():
        pytest.skip(f"onnxruntime {version} is not installed in {path.relative_to(REPOSITORY)}: make onnxruntimes")
    jobs = {form: (str(folder / form / "model.onnx"), "") for form in FORMS}
    if library := ort_library():
        jobs["kernels"] = (jobs["custom"][0], str(library))
    np.savez(folder / "feeds.npz", **feeds)
    results = folder / f"{version}.npz"
    command = [sys.executable, "-c", CHILD, json.dumps(jobs), str(folder / "feeds.npz"), str(results)]
    environment = {**os.environ, "PYTHONPATH": str(path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == version
    return dict(np.load(results))


@pytest.fixture(scope="module")
def exported(language: Path, vision: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("versions")
    for kind, source in (("language", language), ("vision", vision)):
        for form in FORMS:
            mx.export_onnx(mx.plan(source, ROW), folder / kind / form, target="cpu", form=form)
    return folder


def check(found: dict[str, np.ndarray], want: np.ndarray, real: np.ndarray | None = None) -> None:
    assert len(found) == len(FORMS) + (ort_library() is not None)
    keep = slice(None) if real is None else real
    for way, got in found.items():
        assert np.abs(got[keep] - want[keep]).max() <= 1e-5 * np.abs(want[keep]).max(), way
    if "kernels" in found:  # other code has run; without a LinearAttention, all functions come down to the same
        assert not np.array_equal(found["kernels"], found["stock"])


@pytest.mark.parametrize("version", VERSIONS)
def test_language_models(exported: Path, language: Path, version: str) -> None:
    """Against the oracle, which sees no padding: a masked step in the second row's middle."""
    planned = mx.plan(language, ROW)
    ids = np.random.default_rng(0).integers(0, 101, (2, 12))
    mask = np.ones_like(ids)
    mask[1, 4] = 0
    forward = planned.family.load_oracle(planned.checkpoint, planned.plan.layers)
    want = forward({"input_ids": ids})["logits"].copy()
    want[1, mask[1] == 1] = forward({"input_ids": ids[1:, mask[1] == 1]})["logits"][0]
    found = in_version(version, exported / "language", {"input_ids": ids, "attention_mask": mask})
    check(found, want, mask == 1)


@pytest.mark.parametrize("version", VERSIONS)
def test_vision_models(exported: Path, vision: Path, version: str) -> None:
    planned = mx.plan(vision, ROW)
    inputs = planned.family.sample_inputs(planned.checkpoint.config, 3, 0)
    want = planned.family.load_oracle(planned.checkpoint, planned.plan.layers)(inputs)["logits"]
    check(in_version(version, exported / "vision", dict(inputs)), want)
