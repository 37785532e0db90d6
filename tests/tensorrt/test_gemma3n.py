"""Gemma 3n: engines of the decoder, with a cache that starts empty and grows and the tables beside them; its kit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import gemma
import matexport as mx
from kits import bash
from matexport.targets import TARGETS
from support import matexport

RTX = [name for name, target in TARGETS.items() if target.flavour == "TensorRT-RTX"]
TABLE = "model.embed_tokens_per_layer.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gemma.text_checkpoint(tmp_path_factory.mktemp("gemma") / "source", types="sfsf", shared=2)


def test_an_engine(checkpoint: Path, tmp_path: Path) -> None:
    """TensorRT-RTX builds it, with one profile for prompts and steps: a cache may hold all tokens but one."""
    profiles = mx.build_trt(checkpoint, tmp_path / "rtx", target="rtx-ada")["profiles"]
    assert list(profiles) == ["default"]
    found = {name: profiles["default"][name] for name in ("position_ids", "past_key_values.0.key", "attention_mask")}
    assert found == {
        "position_ids": {"min": (1, 1), "opt": (1, 128), "max": (8, 2048)},
        "past_key_values.0.key": {"min": (1, 2, 0, 16), "opt": (1, 2, 0, 16), "max": (8, 2, 32767, 16)},
        "attention_mask": {"min": (1, 1), "opt": (1, 128), "max": (8, 32768)},
    }


def test_a_kit(checkpoint: Path, tmp_path: Path, tools: Path) -> None:
    kit = tmp_path / "kit"
    manifest = json.loads(json.dumps(mx.build_trt(checkpoint, kit, target="b200")))
    assert manifest["golden"]["prefill"]["inputs"]["past_key_values.0.key"]["shape"] == [2, 2, 0, 16]
    assert manifest["golden"]["decode"]["inputs"]["past_key_values.0.key"]["shape"] == [2, 2, 70, 16]
    for script in ("build.sh", "verify.sh"):
        done = bash(kit / script, tools)
        assert done.code == 0, done
    assert mx.verify(kit, checkpoint).passed


# ------------------------------------------------------------------------------------ two graphs
@pytest.fixture(scope="module", params=["float16", "bfloat16"])
def exported(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / request.param
    options = {"target": "cuda", "form": "stock", "dtype": request.param, "split_embeddings": True}
    mx.export_onnx(checkpoint, folder, **options)
    return folder


@pytest.mark.parametrize("target", RTX)
def test_the_decoder_is_built(exported: Path, tmp_path: Path, target: str) -> None:
    result = matexport("trt", "-m", exported, "-o", tmp_path / "out", "--target", target)
    assert result.code == 0, result
    manifest = json.loads((tmp_path / "out" / "matexport.json").read_text())
    assert manifest["precisions"] == ["float32", exported.name]
    assert manifest["capabilities"] == list(TARGETS[target].capabilities)
    assert manifest["before"] == ["embed_tokens.onnx"]
    assert {"model.engine", "embed_tokens.onnx", "embed_tokens.onnx_data"} == manifest["files"].keys()
    caches = {f"past_key_values.{i}.{kind}" for i in range(2) for kind in ("key", "value")}
    assert manifest["inputs"].keys() - caches == {"inputs_embeds", "per_layer_inputs", "attention_mask", "position_ids"}
    assert list(manifest["profiles"]) == ["default"]


def test_a_checkpoint_too_and_the_tables_are_outside(checkpoint: Path, tmp_path: Path) -> None:
    """By way of two graphs: the engine has the layers, the folder has what they start from."""
    result = matexport("trt", "-m", checkpoint, "-o", tmp_path / "out")
    assert result.code == 0, result
    graph = onnx.load(tmp_path / "out" / "embed_tokens.onnx").graph
    table = next(i for i in graph.initializer if i.name == TABLE)
    data = onnx.numpy_helper.to_array(table).tobytes()
    assert len(data) > 5000
    assert data[:64] not in (tmp_path / "out" / "model.engine").read_bytes()
    mx.export_onnx(checkpoint, tmp_path / "one", target="portable")
    mx.build_trt(tmp_path / "one", tmp_path / "whole")
    assert data[:64] in (tmp_path / "whole" / "model.engine").read_bytes()  # of one graph it would be inside


@pytest.mark.parametrize("quantize", ["int4", "fp8"])
def test_in_fewer_bits(checkpoint: Path, tmp_path: Path, quantize: str) -> None:
    """The decoder again: its ONNX folder is verified, and by way of it an engine is built."""
    ids = np.random.default_rng(0).integers(0, 97, (2, 20))
    given: dict[str, Any] = {"calibration": {"input_ids": ids}} if quantize == "fp8" else {}
    options = {"target": "cuda", "form": "stock", "dtype": "bfloat16", "split_embeddings": True, **given}
    mx.export_onnx(checkpoint, tmp_path / "onnx", quantize={"int4": "int4-weight"}.get(quantize, quantize), **options)
    report = mx.verify(tmp_path / "onnx", checkpoint)
    assert report.passed, report.to_markdown()
    engine = {"target": "rtx-ada", "dtype": "bfloat16", "quantize": quantize, **given}
    manifest = mx.build_trt(checkpoint, tmp_path / "out", **engine)
    assert manifest["before"] == ["embed_tokens.onnx"]


def test_what_is_refused(exported: Path, checkpoint: Path, tmp_path: Path) -> None:
    result = matexport("trt", "-m", exported, "-o", tmp_path / "kit", "--target", "h100")
    assert result.code == 4
    assert "a kit is of one" in result.stderr
    web = tmp_path / "web"
    mx.export_onnx(checkpoint, web, target="web", form="stock")
    result = matexport("trt", "-m", web, "-o", tmp_path / "out")
    assert result.code == 4
    assert "has no 'decoder_model_merged.onnx'" in result.stderr
    assert not (tmp_path / "out").exists()
