"""Kits: what is in them, that it is proven, and what cannot be one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path, PurePosixPath

import numpy as np
import onnx
import pytest

import matexport as mx
import matexport_plugins
from kits import bash, shellcheck
from matexport.errors import InputError
from matexport.manifest import describe_file
from matexport.targets import KITS
from matexport.tensorrt.build import rtx_environment
from support import DIGITS, REPOSITORY, content, matexport


def test_verified(kit_source: Path, language_kit: Path, tmp_path: Path) -> None:
    """Anywhere: its ONNX folder and its golden values, by the oracle; also after it was built."""
    result = matexport("verify", "-m", language_kit, "--source", kit_source, "--format", "json")
    assert result.code == 0, result
    kinds = {c["name"]: c["kind"] for c in result.json["comparisons"]}
    assert {"logits", "golden: logits", "golden: states.conv", "golden: states.scan"} <= kinds.keys()
    assert {
        f"golden {p}: {n}" for p in ("prefill", "decode") for n in ("logits", "present.1.conv_state")
    } <= kinds.keys()
    assert {kinds["onnx/model.onnx"], kinds["golden/decode/out/logits.bin"], kinds["build.sh"]} == {"digest"}
    assert "provenance" in kinds.values()
    kit = Path(shutil.copytree(language_kit, tmp_path / "kit"))
    (kit / "model.engine").write_text("built")
    (kit / "results").mkdir()
    (kit / "notes.txt").write_text("not ours")
    result = matexport("verify", "-m", kit, "--source", kit_source, "--format", "json")
    assert [c["name"] for c in result.json["comparisons"] if not c["passed"]] == ["notes.txt"]


def test_golden_values_that_are_not_the_models(kit_source: Path, language_kit: Path, tmp_path: Path) -> None:
    """Wrong in the same way in files and manifest, so that digests agree: outputs of another model, or other states."""
    kit = Path(shutil.copytree(language_kit, tmp_path / "kit"))
    file = kit / "golden" / "decode" / "in" / "past_key_values.0.recurrent_state.bin"
    values = np.fromfile(file, np.float32)
    file.write_bytes((values * 1.01).astype(np.float32).tobytes())
    manifest = json.loads((kit / "matexport.json").read_text())
    manifest["files"][str(file.relative_to(kit))] = describe_file(file)
    (kit / "matexport.json").write_text(json.dumps(manifest))
    result = matexport("verify", "-m", kit, "--source", kit_source, "--format", "json")
    assert result.code == 3, result
    failed = {c["name"] for c in result.json["comparisons"] if not c["passed"]}
    assert "golden decode: logits" in failed
    assert not any(name.startswith("golden prefill") for name in failed)


def test_the_manifest(language_kit: Path) -> None:
    manifest = json.loads((language_kit / "matexport.json").read_text())
    assert (manifest["kind"], manifest["target"], manifest["capabilities"]) == ("kit", "jetson-thor", [110])
    assert (manifest["precisions"], manifest["tf32"], manifest["tolerance"]) == (["float32"], False, 1e-4)
    assert manifest["golden"]["prefill"]["inputs"]["input_ids"] == {"dtype": "int64", "shape": [2, 70]}
    assert manifest["golden"]["decode"]["inputs"]["attention_mask"] == {"dtype": "int64", "shape": [2, 71]}
    assert manifest["files"].keys() | {"matexport.json"} == content(language_kit).keys()
    shown = matexport("inspect", "-m", language_kit).stdout
    assert "kind: kit" in shown
    assert "run build.sh and verify.sh on the machine it is for (jetson-thor)" in shown
    assert "input_ids: 1x1 to 8x2048, best 1x128" in shown


def test_golden_values_keep_to_small_profiles(kit_source: Path, tmp_path: Path) -> None:
    shapes = {"input_ids": ((1, 3), (1, 4), (1, 5))}
    manifest = mx.build_trt(kit_source, tmp_path / "kit", target="a100", shapes=shapes)
    assert list(manifest["golden"]) == ["default"]
    assert manifest["golden"]["default"]["inputs"]["input_ids"]["shape"] == [1, 5]
    shapes["attention_mask"] = ((1, 9), (1, 9), (1, 9))
    with pytest.raises(InputError, match="from 1x9 to 1x9, and there is no golden value of it in 1x5"):
        mx.build_trt(kit_source, tmp_path / "no", target="a100", shapes=shapes)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("name", KITS)
def test_every_target(name: str, tmp_path: Path) -> None:
    result = matexport("trt", "-m", DIGITS, "-s", "eighth", "-o", tmp_path / name, "--target", name)
    assert result.code == 0, result
    assert "a kit, " in result.stdout
    assert content(tmp_path / name).keys() >= {"README.md", "build.sh", "verify.sh", "onnx/model.onnx"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--timing-cache", "t"], "--timingCacheFile=FILE"),
        (["--plugin", "triton"], "use --plugin cuda"),
        (["--plugin", "cuda", "--embed-plugin"], "--setPluginsToSerialize"),
        (["--plugin", "cuda", "--in-place"], "leave out --in-place"),
    ],
)
def test_what_a_kit_cannot_have(tmp_path: Path, options: list[str], message: str) -> None:
    result = matexport("trt", "-m", DIGITS, "-s", "eighth", "-o", tmp_path / "kit", "--target", "h100", *options)
    assert result.code == 2, result
    assert message in result.stderr
    assert not (tmp_path / "kit").exists()


def test_a_kit_of_one_file_is_refused(tmp_path: Path) -> None:
    mx.export_onnx(DIGITS, tmp_path / "one.onnx", slice="eighth", target="portable")
    result = matexport("trt", "-m", tmp_path / "one.onnx", "-o", tmp_path / "kit", "--target", "h100")
    assert result.code == 4
    assert "a kit takes a folder" in result.stderr


def test_a_kit_with_plugins(plugin_kit: Path, tmp_path: Path, tools: Path) -> None:
    """The model for the plugins beside the other one, whose golden values are proven; scripts that compile and load."""
    done = subprocess.run([shellcheck(), *plugin_kit.rglob("*.sh")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert {"plugin/build.sh", "plugin/native/trt_plugin.cc", "onnx/model.fused.onnx"} <= content(plugin_kit).keys()
    fused = onnx.load(plugin_kit / "onnx" / "model.fused.onnx", load_external_data=False)
    assert not fused.functions
    assert {node.op_type for node in fused.graph.node} >= {"Mamba2Scan", "CausalConv1d"}
    manifest = json.loads((plugin_kit / "matexport.json").read_text())
    assert manifest["plugins"]["ops"] == ["CausalConv1d", "Mamba2Scan"]
    kit = Path(shutil.copytree(plugin_kit, tmp_path / "kit"))
    missing = bash(kit / "plugin" / "build.sh", tools, NVCC="/nowhere/nvcc")
    assert missing.code == 5
    assert "NVCC=/path/to/nvcc" in missing.stderr
    compiler = tools / "nvcc"
    compiler.write_text('#!/bin/bash\nprintf "%s\n" "$@" >log\n[ -f "${@: -3:1}" ] && cp log "${!#}"\n')
    compiler.chmod(0o755)
    built = bash(kit / "build.sh", tools)
    assert built.code == 0, built
    assert "-arch=sm_87" in (kit / "plugin" / "libmatexport_trt.so").read_text()
    (kit / "plugin" / "log").unlink()
    assert bash(kit / "verify.sh", tools).code == 0
    text = (kit / "verify.sh").read_text()
    (kit / "verify.sh").write_text(text.replace("--dynamicPlugins=../../plugin/libmatexport_trt.so", "--iterations=1"))
    found = bash(kit / "verify.sh", tools)
    assert found.code == 1
    assert "Plugin not found" in found.stderr
    (kit / "verify.sh").write_text(text)
    result = matexport("verify", "-m", kit, "--source", DIGITS)
    assert result.code == 0, result
    assert "| golden: logits | onnx |" in result.stdout


def test_the_plugins_compile(plugin_kit: Path, tmp_path: Path) -> None:
    """With a real nvcc, from what is in the kit alone; TensorRT-RTX finds both plugins in the library."""
    if not shutil.which("nvcc"):
        pytest.skip("there is no nvcc: the sources in the kit were NOT compiled")
    kit = Path(shutil.copytree(plugin_kit / "plugin", tmp_path / "plugin"))
    done = subprocess.run([str(kit / "build.sh")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    code = (
        "import sys, tensorrt_rtx as trt\nregistry = trt.get_plugin_registry()\nregistry.load_library(sys.argv[1])\n"
        "print(sorted(c.name for c in registry.all_creators if c.plugin_namespace == 'ai.matexport'))"
    )
    library = kit / "libmatexport_trt.so"
    with rtx_environment() as environment:
        found = subprocess.run([sys.executable, "-c", code, library], env=environment, capture_output=True, text=True)
    assert found.stdout.strip() == "['CausalConv1d', 'Mamba2Scan']", found.stderr


def test_the_sources_of_the_plugins_are_in_the_wheel() -> None:
    excluded = tomllib.loads((REPOSITORY / "plugins" / "pyproject.toml").read_text())["tool"]["scikit-build"]["wheel"]
    patterns = [pattern.removeprefix("**/") for pattern in excluded["exclude"]]
    assert any(PurePosixPath("native/kernels.cc").match(pattern) for pattern in patterns)
    for name in matexport_plugins.trt_sources():
        assert not any(PurePosixPath(name).match(pattern) for pattern in patterns), name
