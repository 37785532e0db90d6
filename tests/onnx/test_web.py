"""`--target web`: names, files and config.json; what runs it is in tests/web."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

import matexport as mx
from gemma import text_checkpoint
from matexport.errors import UsageError
from matexport.targets import TARGETS
from support import content, language_checkpoint, matexport


def test_names_and_files(tmp_path: Path) -> None:
    source = language_checkpoint(tmp_path / "source", dt_limit=[0.0, math.inf])
    (source / "tokenizer.json").write_text("{}")
    assert matexport("onnx", "-m", source, "-o", tmp_path / "out", "--target", "web").code == 0
    files = ["config.json", "matexport.json", "onnx/model.onnx", "onnx/model.onnx_data", "tokenizer.json"]
    assert sorted(content(tmp_path / "out")) == files
    config = json.loads((tmp_path / "out" / "config.json").read_text(), parse_constant=pytest.fail)  # as a browser
    assert config["layers_block_type"] == ["mamba"] * 3 + ["attention"]
    assert config["transformers.js_config"]["use_external_data_format"] == {"model.onnx": 1}
    graph = onnx.load(tmp_path / "out" / "onnx" / "model.onnx", load_external_data=False).graph
    states = [f"past_{kind}.{layer}" for layer in range(3) for kind in ("conv", "ssm")]
    counts = [f"past_key_values.3.{name}" for name in ("key", "value")]
    assert [i.name for i in graph.input] == ["input_ids", "attention_mask", *states, *counts]
    renamed = [name.replace("past_key_values", "past").replace("past", "present") for name in states + counts]
    assert [o.name for o in graph.output] == ["logits", *renamed]
    assert {i.type.tensor_type.shape.dim[0].dim_param for i in graph.input} == {"batch_size"}
    assert matexport("verify", "-m", tmp_path / "out", "--source", source).code == 0
    assert matexport("onnx", "-m", source, "-o", tmp_path / "out", "--target", "web", "--force").code == 0


def test_files_in_its_folder_that_are_not_ours(language: Path, tmp_path: Path) -> None:
    command = ["onnx", "-m", language, "-o", tmp_path / "out", "--target", "web"]
    assert matexport(*command).code == 0
    (tmp_path / "out" / "onnx" / "notes.txt").write_text("precious")
    result = matexport("verify", "-m", tmp_path / "out", "--source", language)
    assert result.code == 3
    assert "onnx/notes.txt" in result.stderr
    result = matexport(*command, "--force")
    assert result.code == 2
    assert "onnx/notes.txt" in result.stderr
    assert (tmp_path / "out" / "onnx" / "notes.txt").read_text() == "precious"


def test_vision_models_keep_their_names(vision: Path, tmp_path: Path) -> None:
    mx.export_onnx(mx.plan(vision), tmp_path / "out", target="web")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "matmamba_vision"
    report = mx.verify(tmp_path / "out", vision)
    assert report.passed, report.to_markdown()


def test_gemma_in_two_graphs(tmp_path: Path) -> None:
    """Keys and values of the layers that have their own, under the one symbol that transformers.js knows."""
    source = text_checkpoint(tmp_path / "source")
    assert matexport("onnx", "-m", source, "-o", tmp_path / "out", "--target", "web").code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text(), parse_constant=pytest.fail)
    assert (config["model_type"], config["text_config"]["model_type"]) == ("gemma3n", "gemma3n_text")
    names = ("embed_tokens.onnx", "decoder_model_merged.onnx")
    assert config["transformers.js_config"]["use_external_data_format"] == dict.fromkeys(names, 1)
    first, second = (onnx.load(tmp_path / "out/onnx" / n, load_external_data=False).graph for n in names)
    assert [o.name for o in first.output] == ["inputs_embeds", "per_layer_inputs"]
    past = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in second.input}
    past = {name: shape for name, shape in past.items() if name.startswith("past_")}
    assert list(past) == [f"past_key_values.{i}.{kind}" for i in range(6) for kind in ("key", "value")]
    assert {tuple(shape) for shape in past.values()} == {("batch_size", 2, "past_sequence", 16)}
    assert matexport("verify", "-m", tmp_path / "out", "--source", source).code == 0


def test_files_are_full_of_what_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quantised weight counts as what it takes, not as what it was."""
    source = text_checkpoint(tmp_path / "source", hidden_size_per_layer_input=32)
    monkeypatch.setitem(TARGETS, "web", replace(TARGETS["web"], max_file=30_000))
    with pytest.raises(UsageError, match="--quantize int4-block"):  # the table has 114 kB in float32
        mx.export_onnx(mx.plan(source), tmp_path / "out", target="web")
    mx.export_onnx(mx.plan(source), tmp_path / "out", target="web", quantize="int4-block")
    sizes = [path.stat().st_size for path in (tmp_path / "out" / "onnx").glob("*.onnx_data*")]
    assert len(sizes) > 5
    assert max(sizes) <= 30_000


def test_what_it_cannot_be(language: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = matexport("onnx", "-m", language, "-o", tmp_path / "out", "--target", "web", "--form", "custom")
    assert result.code == 2
    assert "cannot run form 'custom'" in result.stderr
    monkeypatch.setitem(TARGETS, "web", replace(TARGETS["web"], max_file=10_000))
    with pytest.raises(UsageError, match="one weight has") as caught:
        mx.export_onnx(mx.plan(language), tmp_path / "out", target="web")
    assert "--dtype float16" in str(caught.value)
    assert not list(tmp_path.iterdir())
