"""What outputs are worth: accuracy where inputs have labels, perplexity of tokens, in the report of `verify`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import matexport as mx
from matexport.parity.quality import quality
from support import DIGITS, REPOSITORY, matexport

RANDOM = np.random.default_rng(5)


@pytest.fixture(scope="module")
def heldout() -> dict[str, np.ndarray]:
    """The held-out digits, which the packaged table has the accuracy on of every row."""
    sys.path.insert(0, str(REPOSITORY / "examples" / "digits"))
    try:
        from data import load_split
    finally:
        sys.path.pop(0)
    images, labels = load_split("heldout")
    return {"pixel_values": images, "labels": labels}


def test_perplexity_is_that_of_torch() -> None:
    ids = RANDOM.integers(0, 11, (3, 20))
    want, got = (RANDOM.standard_normal((3, 20, 11)) * scale for scale in (1, 30))
    found = quality({"input_ids": ids}, None, got, want)
    assert found is not None
    for value, logits in ((found.source, want), (found.artefact, got)):
        losses = torch.nn.functional.cross_entropy(
            torch.from_numpy(logits[:, :-1].reshape(-1, 11)), torch.from_numpy(ids[:, 1:].reshape(-1))
        )
        assert value == pytest.approx(float(losses.exp()), rel=1e-12)
    shifted = quality({"input_ids": np.roll(ids, 1, 1)}, None, got, want)
    assert shifted is not None
    assert shifted.source != found.source


def test_accuracy_is_the_share_of_largest_logits() -> None:
    labels = np.array([2, 0, 1, 1])
    want = np.eye(3)[labels]
    got = np.eye(3)[[2, 0, 1, 0]]
    found = quality({"pixel_values": np.zeros((4, 1))}, labels, got, want)
    assert found is not None
    assert (found.metric, found.source, found.artefact) == ("accuracy", 1.0, 0.75)


@pytest.mark.parametrize(
    ("inputs", "labels", "shape"),
    [
        ({"pixel_values": np.zeros((4, 1))}, None, (4, 3)),  # images without labels
        ({"input_ids": np.zeros((4, 1), int)}, None, (4, 1, 3)),  # nothing comes after one token
    ],
)
def test_no_figure_where_inputs_do_not_tell(inputs: Any, labels: Any, shape: tuple[int, ...]) -> None:
    assert quality(inputs, labels, np.zeros(shape), np.zeros(shape)) is None


def test_outputs_of_another_shape_have_no_figure() -> None:
    assert quality({"pixel_values": np.zeros((4, 1))}, np.zeros(4, int), np.zeros((4, 3)), np.zeros((4, 2))) is None


def test_verify_gives_the_accuracy_of_the_table(heldout: dict[str, np.ndarray], tmp_path: Path) -> None:
    """Of a trained model, in fewer bits: the source's figure is the packaged table's, measured by another program."""
    mx.export_onnx(mx.plan(DIGITS, "half"), tmp_path / "half", quantize="int8")
    np.savez(tmp_path / "heldout.npz", **heldout)
    outcome = matexport(
        "verify", "-m", tmp_path / "half", "--source", DIGITS, "--inputs", tmp_path / "heldout.npz", "--format", "json"
    )
    assert outcome.code == 0, outcome.stderr
    (found,) = [c["quality"] for c in outcome.json["comparisons"] if "quality" in c]
    row = mx.load_table(REPOSITORY / "slices" / "matmamba-digits.csv").find("half")
    assert found["metric"] == "accuracy"
    assert f"{100 * found['source']:.2f}%" == row.metrics["Held-out accuracy"]
    assert abs(found["artefact"] - found["source"]) < 0.02
    report = mx.verify(tmp_path / "half", DIGITS, inputs={**heldout, "labels": (heldout["labels"] + 1) % 10})
    (wrong,) = [c.quality for c in report.comparisons if c.quality]
    assert wrong.source < 0.05


def test_verify_gives_the_perplexity_of_tokens(language: Path, tmp_path: Path) -> None:
    mx.export_onnx(mx.plan(language), tmp_path / "int4", quantize="int4-block")
    ids = RANDOM.integers(0, 101, (2, 30))
    report = mx.verify(tmp_path / "int4", language, inputs={"input_ids": ids})
    (found,) = [c.quality for c in report.comparisons if c.quality]
    planned = mx.plan(language)
    logits = planned.family.load_oracle(planned.checkpoint, planned.plan.layers)({"input_ids": ids})["logits"]
    rows = torch.log_softmax(torch.from_numpy(np.asarray(logits, np.float64)), -1)[:, :-1]
    chosen = rows.gather(-1, torch.from_numpy(ids[:, 1:, None]))[..., 0]
    assert found.metric == "perplexity"
    assert found.source == pytest.approx(float((-chosen.mean()).exp()), rel=1e-6)
    assert found.artefact != found.source
    assert "perplexity" in report.to_markdown()


@pytest.mark.parametrize("labels", [np.zeros(3, int), np.zeros(4, np.float32), np.zeros((4, 1), int)])
def test_labels_that_do_not_fit_are_refused(vision: Path, labels: np.ndarray, tmp_path: Path) -> None:
    mx.export_onnx(mx.plan(vision), tmp_path / "vision")
    inputs = {"pixel_values": RANDOM.standard_normal((4, 3, 12, 12), dtype=np.float32), "labels": labels}
    np.savez(tmp_path / "inputs.npz", **inputs)
    outcome = matexport("verify", "-m", tmp_path / "vision", "--source", vision, "--inputs", tmp_path / "inputs.npz")
    assert outcome.code == 4
    assert "'labels'" in outcome.stderr
