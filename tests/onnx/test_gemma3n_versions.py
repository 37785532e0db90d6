"""Gemma 3n in every ONNX Runtime since 1.20, at opset 23 since 1.23: `make onnxruntimes` installs the older ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import Gemma3nForCausalLM

import matexport as mx
from gemma import text_config, write_gemma
from support import REPOSITORY

FOLDER = REPOSITORY / "build" / "onnxruntime"
VERSIONS = ["1.20.1", "1.23.2", "1.25.1", "1.28.0", onnxruntime.__version__]
WAYS = {
    "stock": {"form": "stock"},
    "contrib": {"form": "contrib"},
    "opset 23": {"form": "stock", "opset": 23},
    "float16": {"target": "cuda", "form": "contrib"},
    "int4-block": {"form": "contrib", "quantize": "int4-block"},
}
# in an interpreter that finds the other version first: a prompt, padded on the left in one row and on the right in
# another, and single tokens
CHILD = """
import json, sys
import numpy as np, onnxruntime
given, found = np.load(sys.argv[2]), {}
ids, mask, prompt = given["ids"], given["mask"], int(given["prompt"])
for way, model in json.loads(sys.argv[1]).items():
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    past = {i.name: np.zeros([len(ids), i.shape[1], 0, i.shape[3]], np.float16 if "float16" in i.type else np.float32)
            for i in session.get_inputs() if i.name.startswith("past")}
    pieces, begin = [], 0
    for end in range(prompt, ids.shape[1] + 1):
        places = np.maximum(mask[:, :end].cumsum(1) - 1, 0)[:, begin:]
        feed = {"input_ids": ids[:, begin:end], "attention_mask": mask[:, :end], "position_ids": places, **past}
        logits, *present = session.run(None, feed)
        past, begin = dict(zip(past, present)), end
        pieces.append(logits)
    found[way] = np.concatenate(pieces, 1)
np.savez(sys.argv[3], **found)
print(onnxruntime.__version__)
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("versions")
    config = text_config("sfssf", shared=2, hidden_size_per_layer_input=32)
    source = write_gemma(folder / "source", {"architectures": ["Gemma3nForCausalLM"], **config})
    for way, options in WAYS.items():
        mx.export_onnx(source, folder / way, **options)
    return folder


@torch.no_grad()
def truth(folder: Path, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """transformers in float64, each row without its padding; zeros where that is."""
    model = Gemma3nForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    rows = [model(input_ids=torch.from_numpy(row[m == 1][None])).logits[0] for row, m in zip(ids, mask, strict=True)]
    found = np.zeros((*ids.shape, rows[0].shape[-1]))
    for i, row in enumerate(rows):
        found[i, mask[i] == 1] = row.numpy()
    return found


@pytest.mark.parametrize("version", VERSIONS)
def test_every_form(exported: Path, tmp_path: Path, version: str) -> None:
    path = FOLDER / version
    if version != onnxruntime.__version__ and not path.is_dir():
        pytest.skip(f"onnxruntime {version} is not installed in {path.relative_to(REPOSITORY)}: make onnxruntimes")
    ids, mask = np.random.default_rng(0).integers(0, 97, (3, 16)), np.ones((3, 16), np.int64)
    mask[0, :3] = mask[1, 6:9] = 0
    np.savez(tmp_path / "given.npz", ids=ids, mask=mask, prompt=9)
    jobs = {way: str(exported / way / "model.onnx") for way in WAYS if way != "opset 23" or version != "1.20.1"}
    command = [sys.executable, "-c", CHILD, json.dumps(jobs), str(tmp_path / "given.npz"), str(tmp_path / "found.npz")]
    environment = {**os.environ, "PYTHONPATH": str(path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == version
    want, found = truth(exported / "source", ids, mask), dict(np.load(tmp_path / "found.npz"))
    assert set(found) == set(jobs)
    for way, got in found.items():
        error = np.abs((got - want)[mask == 1]).max() / np.abs(want).max()
        assert error <= {"float16": 32 * 2**-11, "int4-block": 0.5}.get(way, 1e-4), (way, error)
