"""Fused engines: the ops as plugins, in CUDA and in Triton, built by TensorRT-RTX without a GPU. None was run."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

import cuda_kernels
import matexport as mx
import matexport_plugins
from matexport.errors import InputError
from matexport.tensorrt.build import model_for, run_builder
from matexport.tensorrt.fused import fused_model
from matexport.tensorrt.plugins import Plugins
from support import DIGITS, content, language_checkpoint, matexport

OPS = [{"name": name, "version": "1", "namespace": "ai.matexport"} for name in ("CausalConv1d", "Mamba2Scan")]
TARGETS = ("rtx", "rtx-ampere", "rtx-ada", "rtx-blackwell")


@pytest.fixture(scope="module", autouse=True)
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The library that nvcc made; where there is none, the same plugins with kernels that g++ made for the CPU."""
    found = matexport_plugins.trt_library()
    if found is None and not cuda_kernels.compiler():
        pytest.skip("there is no C++ compiler")
    if found is None:
        path = tmp_path_factory.mktemp("plugins") / "libmatexport_cuda.so"
        flags = ("-fno-exceptions", "-static-libstdc++", "-static-libgcc")
        found = cuda_kernels.compile_for_cpu(path, cuda_kernels.KERNELS, "native/trt_plugin.cc", flags=flags)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matexport_plugins, "trt_library", lambda: found)
        yield found


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return language_checkpoint(tmp_path_factory.mktemp("fused") / "source", n_layer=2, ngroups=2)


@pytest.fixture(scope="module")
def exported(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fused") / "onnx"
    mx.export_onnx(small, folder)
    return folder


def manifest_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "matexport.json").read_text())
    return found


@pytest.mark.parametrize("plugin", ["cuda", "triton"])
def test_vision_and_language_for_every_target(plugin: str, small: Path, tmp_path: Path, library: Path) -> None:
    for name, model in (("vision", ["-m", DIGITS, "-s", "half"]), ("language", ["-m", small])):
        options = [f"--target={target}" for target in TARGETS]
        result = matexport("trt", *model, "-o", tmp_path / name, "--plugin", plugin, *options)
        assert result.code == 0, result
        for target in TARGETS:
            manifest, files = manifest_of(tmp_path / name / target), content(tmp_path / name / target)
            beside = {library.name} if plugin == "cuda" else set()
            assert set(files) == {"matexport.json", "model.engine"} | beside
            assert set(manifest["files"]) == {"model.engine"} | beside
            assert manifest["form"] == "custom"
            assert manifest["plugins"]["ops"] == OPS
            assert manifest["plugins"]["kind"] == plugin
            assert not manifest["plugins"]["embedded"]
            assert b"Mamba2Scan" in files["model.engine"]
            assert b"ai.matexport" in files["model.engine"]
            assert manifest["plugins"]["load"] in result.stdout
            if name == "language":
                assert list(manifest["profiles"]) == ["default"]
                assert manifest["inputs"]["past_key_values.1.recurrent_state"]["shape"] == [-1, 64, 8, 2]
                assert manifest["outputs"]["present.1.conv_state"] == {"dtype": "float", "shape": [-1, 160, 3]}
                assert manifest["inputs"]["attention_mask"]["shape"] == [-1, -1]
    shown = matexport("inspect", "-m", tmp_path / "language" / "rtx")
    assert "name Mamba2Scan, version 1, namespace ai.matexport" in shown.stdout
    assert manifest["plugins"]["load"] in shown.stdout


def test_an_engine_with_the_library_inside_is_one_file(tmp_path: Path, library: Path) -> None:
    result = matexport("trt", "-m", DIGITS, "-s", "half", "-o", tmp_path / "e", "--plugin", "cuda", "--embed-plugin")
    assert result.code == 0, result
    manifest, files = manifest_of(tmp_path / "e"), content(tmp_path / "e")
    assert set(files) == {"matexport.json", "model.engine"}
    assert library.read_bytes() in files["model.engine"]
    about = manifest["plugins"]
    assert (about["embedded"], about["engine_host_code_allowed"]) == (True, True)
    assert about["library"] == library.name
    assert len(about["sha256"]) == 64
    assert "engine_host_code_allowed" in result.stdout


def test_states_in_place(small: Path, exported: Path, tmp_path: Path) -> None:
    """Aliased states are built with the preview feature, and refused without it: so the plugins were asked."""
    result = matexport("trt", "-m", exported, "-o", tmp_path / "e", "--plugin", "cuda", "--in-place")
    assert result.code == 0, result
    names = [f"{i}.{state}" for i in range(2) for state in ("conv_state", "recurrent_state")]
    assert manifest_of(tmp_path / "e")["aliases"] == {f"present.{n}": f"past_key_values.{n}" for n in names}
    model = onnx.load(exported / "model.onnx", load_external_data=False)
    fused_model(model, in_place=True)
    with pytest.raises(InputError, match="kALIASED_PLUGIN_IO_10_03 not enabled"):
        build(model, exported, tmp_path, in_place=False)
    result = matexport("trt", "-m", DIGITS, "-s", "half", "-o", tmp_path / "v", "--plugin", "cuda", "--in-place")
    assert result.code == 0, result  # there are no states from outside
    assert manifest_of(tmp_path / "v")["aliases"] == {}


def test_only_states_that_nothing_else_reads_are_written_over(exported: Path) -> None:
    model = onnx.load(exported / "model.onnx", load_external_data=False)
    model.graph.node.append(helper.make_node("Identity", ["past_key_values.0.conv_state"], ["before"]))
    model.graph.output.append(helper.make_tensor_value_info("before", onnx.TensorProto.FLOAT, None))
    _, aliases = fused_model(model, in_place=True)
    assert "present.0.conv_state" not in aliases
    assert len(aliases) == 3


def build(
    model: onnx.ModelProto, folder: Path, tmp_path: Path, *, libraries: bool = True, in_place: bool = False
) -> None:
    """Builds a model whose weights are in `folder`, of batch 1 and length 1."""
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    shapes = {
        value.name: [[d.dim_value or 1 for d in value.type.tensor_type.shape.dim]] * 3 for value in model.graph.input
    }
    found = [str(matexport_plugins.trt_library())] if libraries else []
    job = {
        "model": str(tmp_path / "m.onnx"), "weights": str(folder / "model.onnx"), "engine": str(tmp_path / "engine"),
        "profiles": [shapes], "capabilities": [89],
        "plugins": {"libraries": found, "python": False, "embed": False, "in_place": in_place},
    }  # fmt: skip
    run_builder(job, folder, "TensorRT-RTX")


def test_a_function_that_is_left_in_wins(exported: Path, tmp_path: Path) -> None:
    """The exported file has functions, with which plugins that are there are not asked; the fused one has none."""
    model = onnx.load(exported / "model.onnx", load_external_data=False)
    assert {f.name for f in model.functions} == {"LinearAttention", "CausalConv1d", "Mamba2Scan"}
    with pytest.raises(InputError, match="failed to load LinearAttention plugin"):  # which the function is made of
        build(model, exported, tmp_path)
    fused_model(model)
    assert not model.functions
    assert [entry.domain for entry in model.opset_import] == ["", "ai.matexport"]
    build(model, exported, tmp_path)
    assert b"ai.matexport" in (tmp_path / "engine").read_bytes()
    with pytest.raises(InputError, match="Plugin not found") as caught:
        build(model, exported, tmp_path, libraries=False)
    assert "build it with --plugin cuda or --plugin triton" in caught.value.fix


def test_the_fused_model_computes_the_same(small: Path, tmp_path: Path) -> None:
    """In ONNX Runtime, which has our ops as well: what is left out, zeros among it, was not needed."""
    library = matexport_plugins.ort_library()
    if library is None:
        pytest.skip("there is no libmatexport_ort")
    rng = np.random.default_rng(0)
    for model, row in ((DIGITS, "half"), (small, None)):
        folder = tmp_path / model.name
        mx.export_onnx(model, folder, slice=row)
        original = onnx.load(folder / "model.onnx")
        fused = onnx.load(folder / "model.onnx")
        fused_model(fused)
        nodes = [[n.op_type for n in m.graph.node] for m in (original, fused)]
        if model is DIGITS:
            assert nodes[0].count("Expand") > nodes[1].count("Expand")
            ours = [n for n in fused.graph.node if n.domain]
            assert {(n.op_type, len(n.input)) for n in ours} == {("CausalConv1d", 3), ("Mamba2Scan", 7)}  # no states
            assert {len(n.output) for n in ours if n.op_type == "Mamba2Scan"} == {1}
            assert all(a.i == 0 for n in ours for a in n.attribute if a.name == "final_state")
        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(str(library))
        inputs = {}
        for value in original.graph.input:
            shape = [d.dim_value or 2 for d in value.type.tensor_type.shape.dim]
            integers = value.type.tensor_type.elem_type == onnx.TensorProto.INT64
            inputs[value.name] = rng.integers(0, 2, shape) if integers else rng.standard_normal(shape, np.float32)
        results = [
            onnxruntime.InferenceSession(m.SerializeToString(), options).run(None, inputs) for m in (original, fused)
        ]
        assert len(results[0]) == len(original.graph.output)
        for want, got in zip(*results, strict=True):
            assert np.abs(want).max() > 0
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_states_that_are_not_zeros_stay(tmp_path: Path) -> None:
    mx.export_onnx(DIGITS, tmp_path / "onnx", slice="half")
    model = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False)
    [zero] = [t for t in model.graph.initializer if not t.external_data and t.dims == [] and t.data_type == 1
              and not numpy_helper.to_array(t).any()]  # fmt: skip
    zero.CopyFrom(numpy_helper.from_array(np.float32(0.5), zero.name))
    fused_model(model)
    assert {len(n.input) for n in model.graph.node if n.domain} == {4, 8}


def test_the_library_that_was_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matexport_plugins, "trt_library", lambda: None)
    result = matexport("trt", "-m", DIGITS, "-s", "half", "-o", tmp_path / "e", "--plugin", "cuda")
    assert result.code == 5
    assert "there was no nvcc when it was made" in result.stderr
    assert "MATEXPORT_CUDA=1" in result.stderr
    assert not (tmp_path / "e").exists()


def test_ptx_needs_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    result = matexport("trt", "-m", DIGITS, "-s", "half", "-o", tmp_path / "e", "--emit-ptx")
    assert result.code == 5
    assert "pip install triton" in result.stderr
    assert not (tmp_path / "e").exists()


def test_engines_for_triton_are_built_without_it() -> None:
    """What the builder asks of a plugin in Python is sizes and types: neither PyTorch nor Triton is imported."""
    code = (
        "import sys; import tensorrt_rtx as trt; sys.modules['torch'] = sys.modules['triton'] = None\n"
        "from matexport_plugins.tensorrt_plugins import register; register(trt)\n"
        "from matexport_plugins.mamba2_scan.tensorrt_plugin import Mamba2Scan\n"
        "print(Mamba2Scan().workspace({'x': (1, 2000, 64), 'A': (4,), 'B': (1, 2000, 16)}, 'float32'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 0


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--embed-plugin"], 2, "plugin 'none' goes into no engine"),
        (["--plugin=triton", "--embed-plugin"], 2, "use --plugin cuda"),
        (["--plugin=triton", "--in-place"], 2, "writes no state in place"),
        (["--plugin=mamba"], 2, "'mamba' is not one of"),
        ([], 4, "build it with --plugin cuda"),
        (["--emit-ptx", "--in-place"], 2, "--emit-ptx builds no engine"),
        (["--emit-ptx", "--calibration=x.npz"], 2, "--emit-ptx builds no engine"),
        (["--emit-ptx", "--target=tensorrt"], 2, "the GPU at hand"),
        (["--emit-ptx", "-s", "half"], 2, "one slice already"),
        (["--emit-ptx", "--dtype=float16"], 2, "an ONNX folder has its types already"),
    ],
)
def test_usage(exported: Path, tmp_path: Path, options: list[str], code: int, message: str) -> None:
    result = matexport("trt", "-m", exported, "-o", tmp_path / "out", *options)
    assert result.code == code, result
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_model_in_standard_operators_has_no_plugins(tmp_path: Path) -> None:
    mx.export_onnx(DIGITS, tmp_path / "onnx", slice="half", target="portable")
    result = matexport("trt", "-m", tmp_path / "onnx", "-o", tmp_path / "e", "--plugin", "cuda")
    assert result.code == 4
    assert "matexport onnx --target cpu" in result.stderr
    for options in (["--emit-ptx"],):
        result = matexport("trt", "-m", tmp_path / "onnx", "-o", tmp_path / "e", *options)
        assert result.code == 4
        assert "has none of our ops" in result.stderr
    with pytest.raises(InputError, match="no op that a plugin could have"):
        next(model_for(tmp_path / "onnx" / "model.onnx", Plugins("triton", None, False, False)).gen)


def test_a_library_that_was_changed_is_noticed(tmp_path: Path, library: Path) -> None:
    result = matexport("trt", "-m", DIGITS, "-s", "half", "-o", tmp_path / "e", "--plugin", "cuda")
    assert result.code == 0, result
    copied = tmp_path / "e" / library.name
    assert copied.read_bytes() == library.read_bytes()
    shutil.copyfile(copied, tmp_path / "copy")
    copied.write_bytes(b"other")
    from matexport.manifest import file_problems

    assert (
        file_problems(tmp_path / "e", manifest_of(tmp_path / "e"))[library.name] == "was changed after it was written"
    )
