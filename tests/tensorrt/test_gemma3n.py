"""Gemma 3n: an engine with a cache that starts empty and grows, and its kit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import gemma
import matexport as mx
from kits import bash


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gemma.text_checkpoint(tmp_path_factory.mktemp("gemma") / "source", types="sfsf", shared=2)


def test_an_engine(checkpoint: Path, tmp_path: Path) -> None:
    """TensorRT-RTX builds it: all tokens are those in the cache and the new ones, also where it is fastest."""
    profiles = mx.build_trt(checkpoint, tmp_path / "rtx", target="rtx-ada")["profiles"]
    inputs = ("input_ids", "past_key_values.0.key", "attention_mask")
    best = {name: [profile[i]["opt"] for i in inputs] for name, profile in profiles.items()}
    assert best == {
        "prefill": [(1, 128), (1, 2, 0, 16), (1, 128)], "decode": [(1, 1), (1, 2, 127, 16), (1, 128)]
    }  # fmt: skip
    assert {profile["past_key_values.0.key"]["min"][2] for profile in profiles.values()} == {0}


def test_a_kit(checkpoint: Path, tmp_path: Path, tools: Path) -> None:
    kit = tmp_path / "kit"
    manifest = json.loads(json.dumps(mx.build_trt(checkpoint, kit, target="b200")))
    assert manifest["golden"]["prefill"]["inputs"]["past_key_values.0.key"]["shape"] == [2, 2, 0, 16]
    assert manifest["golden"]["decode"]["inputs"]["past_key_values.0.key"]["shape"] == [2, 2, 70, 16]
    for script in ("build.sh", "verify.sh"):
        done = bash(kit / script, tools)
        assert done.code == 0, done
    assert mx.verify(kit, checkpoint).passed
