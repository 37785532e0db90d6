"""Engines of language models: prefill and decode in one, states as inputs and outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support import language_checkpoint, matexport


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return language_checkpoint(tmp_path_factory.mktemp("trt") / "source", n_layer=2, ngroups=2)


@pytest.mark.parametrize(("row", "channels", "heads"), [(None, 160, 64), ("half", 96, 32)])
def test_prefill_and_decode(small: Path, tmp_path: Path, row: str | None, channels: int, heads: int) -> None:
    """What the builder took in, by its own account; and the names are in the file."""
    table = tmp_path / "rows.csv"
    table.write_text("name,Mamba Dims\nhalf,32\n")
    chosen = ["-c", table, "-s", row] if row else []
    result = matexport("trt", "-m", small, *chosen, "-o", tmp_path / "rtx", "--target", "rtx-ada")
    assert result.code == 0, result
    manifest = json.loads((tmp_path / "rtx" / "matexport.json").read_text())
    assert {layer["width"] for layer in manifest["slice"]["layers"]} == {64 if row is None else 32}
    states = {}
    for i in range(2):
        states[f"{i}.conv_state"] = [-1, channels, 3]
        states[f"{i}.recurrent_state"] = [-1, heads, 8, 2]
    assert {name: entry["shape"] for name, entry in manifest["inputs"].items()} == {
        "input_ids": [-1, -1], "attention_mask": [-1, -1],
        **{f"past_key_values.{name}": shape for name, shape in states.items()},
    }  # fmt: skip
    outputs = {name: entry["shape"] for name, entry in manifest["outputs"].items()}
    for name in outputs:
        if name.endswith("conv_state"):  # its three steps are cut at a length that is known at run time only
            assert outputs[name].pop() == -1
            outputs[name].append(3)
    assert outputs == {"logits": [-1, -1, 104], **{f"present.{name}": shape for name, shape in states.items()}}
    assert {entry["dtype"] for entry in manifest["outputs"].values()} == {"float"}
    profiles = manifest["profiles"]
    assert list(profiles) == ["default"]  # of TensorRT-RTX: for prompts and steps
    assert profiles["default"]["input_ids"] == {"min": [1, 1], "opt": [1, 128], "max": [8, 2048]}
    assert profiles["default"]["past_key_values.1.recurrent_state"]["max"] == [8, heads, 8, 2]
    engine = (tmp_path / "rtx" / "model.engine").read_bytes()
    assert all(name.encode() in engine for name in [*manifest["inputs"], *outputs])
    assert b"present.2.conv_state" not in engine
