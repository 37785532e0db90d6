"""`trt --emit-ptx`: the kernels of a model compiled for GPUs that are not there, in processes where Triton compiles."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import matexport as mx
from matexport.errors import InputError
from matexport.manifest import file_problems, read_manifest
from matexport.tensorrt import CAPABILITIES
from matexport_plugins import aot
from support import DIGITS, Result, language_checkpoint, matexport_process


def compiled(*arguments: str | Path) -> Result:
    with mock.patch.dict(os.environ):
        os.environ.pop("TRITON_INTERPRET", None)
        return matexport_process("trt", "--emit-ptx", *arguments)


def test_the_kernels_of_a_language_model(tmp_path: Path) -> None:
    """Prefill and step of every node, by files that hold what they are said to hold."""
    source = language_checkpoint(tmp_path / "source", n_layer=2, ngroups=2)
    result = compiled("-m", source, "-o", tmp_path / "ptx", "--target", "rtx-ada")
    assert result.code == 0, result
    manifest = read_manifest(tmp_path / "ptx")
    assert (manifest["kind"], manifest["capabilities"]) == ("ptx", [89])
    assert not any(file_problems(tmp_path / "ptx", manifest).values())
    about: dict[str, Any] = json.loads((tmp_path / "ptx" / "sm_89" / "kernels.json").read_text())
    launched = {
        ("CausalConv1d", "prefill"): ["count_kernel", "conv_kernel"], ("Mamba2Scan", "step"): ["step_kernel"],
        ("CausalConv1d", "step"): ["count_kernel", "conv_kernel"],
        ("Mamba2Scan", "prefill"): ["sums_kernel", "scan_kernel"],
    }  # fmt: skip
    assert [node["op"] for node in about["nodes"]] == ["CausalConv1d", "Mamba2Scan"] * 2
    for node in about["nodes"]:
        for mode in ("prefill", "step"):
            assert [about["kernels"][name]["name"] for name in node[mode]] == launched[node["op"], mode]
    assert {name for node in about["nodes"] for mode in ("prefill", "step") for name in node[mode]} == set(
        about["kernels"]
    )
    for kernel in about["kernels"].values():
        ptx = (tmp_path / "ptx" / "sm_89" / kernel["file"]).read_text()
        assert f".entry {kernel['name']}(" in ptx
        assert ".target sm_89\n" in ptx
        assert len(aot.parameters(ptx)) == len(kernel["arguments"])
        assert not re.search(r"\.file|\.loc|/tmp|/home|plugins/", ptx)
        assert 0 < kernel["threads"] <= 1024
        assert kernel["shared"] <= 99 * 1024
        assert all(
            aot.evaluate(text, batch=3, length=100) >= 1 for text in (*kernel["grid"], *kernel["numbers"].values())
        )
    scan = next(k for k in about["kernels"].values() if k["name"] == "scan_kernel")
    assert [aot.evaluate(size, batch=3, length=100) for size in scan["outputs"]["final_ptr"]] == [3, 64, 8, 2]


def test_a_checkpoint_in_half_precision(tmp_path: Path) -> None:
    source = language_checkpoint(tmp_path / "source", n_layer=1)
    result = compiled("-m", source, "-o", tmp_path / "ptx", "--target", "rtx-ada", "--dtype", "float16")
    assert result.code == 0, result
    about = json.loads((tmp_path / "ptx" / "sm_89" / "kernels.json").read_text())
    arguments = [kernel["arguments"] for kernel in about["kernels"].values()]
    assert {found["x_ptr"] for found in arguments if "x_ptr" in found} == {"*fp16"}
    assert {found["state_ptr"] for found in arguments if "state_ptr" in found} == {"*fp32"}


def test_a_model_of_images_has_no_steps(tmp_path: Path) -> None:
    mx.export_onnx(DIGITS, tmp_path / "onnx", slice="eighth", target="cuda", dtype="bfloat16")
    result = compiled("-m", tmp_path / "onnx", "-o", tmp_path / "ptx", "--target", "rtx-ampere")
    assert result.code == 0, result
    about = json.loads((tmp_path / "ptx" / "sm_86" / "kernels.json").read_text())
    assert {tuple(node) for node in about["nodes"]} == {("node", "op", "prefill")}
    for kernel in about["kernels"].values():
        assert not {"state_ptr", "mask_ptr"} & set(kernel["arguments"])
        assert kernel["arguments"].get("x_ptr", "*bf16") == "*bf16"
    assert all("final_ptr" not in k["outputs"] for k in about["kernels"].values() if k["name"] == "scan_kernel")


def test_by_default_every_gpu_there_is_a_kernel_for() -> None:
    assert CAPABILITIES == (80, 86, 87, 89, 90, 100, 120)
    assert set(CAPABILITIES) <= set(aot.PTX_ISA)


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no PTX for compute capability 75"):
        mx.emit_ptx(DIGITS, tmp_path / "ptx", slice="eighth", capabilities=[75])
    wide = language_checkpoint(tmp_path / "wide", n_layer=1, d_state=300)
    result = compiled("-m", wide, "-o", tmp_path / "ptx", "--target", "rtx-ada")
    assert result.code == 4, result
    assert "hold states of N <= 256, not 300" in result.stderr
    assert not (tmp_path / "ptx").exists()
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "matexport.json").write_text('{"kind": "engine", "files": {}}')
    with pytest.raises(InputError, match="is of kind 'engine', not ONNX"):
        mx.emit_ptx(tmp_path / "engine", tmp_path / "ptx")
