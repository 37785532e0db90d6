"""TensorRT proper, by the same code as for TensorRT-RTX, and engines that are run: names, shapes, states, profiles.

The package is a small stand-in (tests/helpers/fake), which computes with ONNX Runtime: that TensorRT itself builds and
runs what it is given is NOT tested here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cuda_kernels
import matexport as mx
import matexport_plugins
from gemma import text_checkpoint
from matexport.engines import plan_engine
from matexport.errors import InputError, MissingError
from matexport.gpus import Gpu, find_gpus
from matexport.manifest import read_manifest
from matexport.runtimes import tensorrt as runtime
from matexport.tensorrt import build
from support import DIGITS, language_checkpoint, matexport

FAKE = Path(__file__).parents[1] / "helpers" / "fake"
H100 = Gpu("NVIDIA H100", 90)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[Gpu]:
    """A machine with TensorRT 10.16 and the GPUs in this list."""
    gpus = [H100]
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.syspath_prepend(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(FAKE))
    for module in (build, runtime):
        monkeypatch.setattr(module, "find_gpus", lambda: tuple(gpus))
    monkeypatch.setattr(runtime, "DEVICE", "cpu")
    return gpus


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "source"
    language_checkpoint(folder, n_layer=2, ngroups=2)
    (folder / "slices.csv").write_text("name,Mamba Dims\nhalf,32\n")
    return folder


@pytest.fixture
def engine(source: Path, gpu: list[Gpu], tmp_path: Path) -> Path:
    result = matexport("trt", "-m", source, "-s", "half", "-o", tmp_path / "engine", "--target", "tensorrt")
    assert result.code == 0, result
    return tmp_path / "engine"


def change(engine: Path, **entries: object) -> None:
    manifest = json.loads((engine / "matexport.json").read_text())
    (engine / "matexport.json").write_text(json.dumps({**manifest, **entries}))


def test_gemma_with_its_tables_beside(gpu: list[Gpu], tmp_path: Path) -> None:
    """The embeddings run in ONNX Runtime, and feed the engine; changed tables are no longer those that were built."""
    source, engine = text_checkpoint(tmp_path / "source", "sfs", shared=1), tmp_path / "engine"
    result = matexport("trt", "-m", source, "-o", engine, "--target", "tensorrt")
    assert result.code == 0, result
    result = matexport("verify", "-m", engine, "--source", source, "--format", "json")
    assert result.code == 0, result
    found = {c["name"] for c in result.json["comparisons"]}
    assert {"logits", "decode@1.logits", "decode@left.logits", "embed_tokens.onnx_data"} <= found
    table = engine / "embed_tokens.onnx_data"
    table.write_bytes(bytes(len(table.read_bytes())))
    assert matexport("verify", "-m", engine, "--source", source).code == 3


def test_a_language_model(engine: Path, source: Path) -> None:
    manifest = json.loads((engine / "matexport.json").read_text())
    assert manifest["tensorrt"] == {"flavour": "TensorRT", "version": "10.16.1.11"}
    assert (manifest["capabilities"], manifest["precisions"], manifest["tf32"]) == ([90], ["float32"], False)
    assert list(manifest["profiles"]) == ["prefill", "decode"]
    assert {"model.onnx", "model.onnx_data"} <= manifest["onnx"].keys()
    plan = json.loads((engine / "model.engine").read_text())
    assert (plan["strong"], plan["tf32"]) == (True, False)
    result = matexport("verify", "-m", engine, "--source", source, "--format", "json")
    assert result.code == 0, result
    found = {c["name"]: c for c in result.json["comparisons"]}
    states = {f"{step}{name}" for step in ("", "decode@18.") for name in ("logits", "states.conv", "states.scan")}
    assert states | {"decode@1.logits", "decode@36.states.scan", "model.engine"} <= found.keys()
    assert {found[name]["kind"] for name in states} == {"engine"}


def test_vision_from_an_onnx_folder(gpu: list[Gpu], tmp_path: Path) -> None:
    mx.export_onnx(DIGITS, tmp_path / "onnx", slice="eighth", target="portable")
    shapes = [f"--{kind}-shapes=pixel_values:{n}x3x8x8" for kind, n in (("min", 2), ("opt", 2), ("max", 3))]
    built = matexport("trt", "-m", tmp_path / "onnx", "-o", tmp_path / "e", "--target", "tensorrt", *shapes)
    assert built.code == 0, built
    assert matexport("verify", "-m", tmp_path / "e", "--source", DIGITS).code == 0  # with images as it takes them
    shown = matexport("inspect", "-m", tmp_path / "e")
    assert "runs_here: yes: NVIDIA H100 (9.0)" in shown.stdout
    np.savez(tmp_path / "many.npz", pixel_values=np.zeros((4, 3, 8, 8), np.float32))
    result = matexport("verify", "-m", tmp_path / "e", "--source", DIGITS, "--inputs", tmp_path / "many.npz")
    assert result.code == 4
    assert "no profile takes 'pixel_values' in shape 4x3x8x8; 'default' takes 2x3x8x8 to 3x3x8x8" in result.stderr


def test_of_a_slice_by_what_it_was_cut_from(gpu: list[Gpu], tmp_path: Path) -> None:
    """An engine and a kit of a standalone slice."""
    mx.plan(DIGITS, "eighth").write(tmp_path / "slice")
    for target in ("tensorrt", "h100"):
        mx.build_trt(tmp_path / "slice", tmp_path / target, target=target)
        for source in (DIGITS, tmp_path / "slice"):
            result = matexport("verify", "-m", tmp_path / target, "--source", source)
            assert result.code == 0, result


@pytest.mark.parametrize("output", ["logits", "present.1.recurrent_state"])
def test_an_engine_that_computes_something_else(
    engine: Path, source: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    monkeypatch.setenv("FAKE_TENSORRT_FAULT", f"{output}:1.001")
    result = matexport("verify", "-m", engine, "--source", source, "--format", "json")
    assert result.code == 3, result
    failed = {c["name"] for c in result.json["comparisons"] if not c["passed"]}
    assert ("logits" if output == "logits" else "states.scan") in failed


def test_inputs_are_chosen_so_that_every_profile_is_run(source: Path, gpu: list[Gpu], tmp_path: Path) -> None:
    """A mask of 100 tokens at least: a prefill of 100, and a step after it."""
    shapes = [f"--{kind}-shapes=attention_mask:1x{n}" for kind, n in (("min", 100), ("opt", 128), ("max", 4096))]
    built = matexport("trt", "-m", source, "-o", tmp_path / "e", "--target", "tensorrt", *shapes)
    assert built.code == 0, built
    result = matexport("verify", "-m", tmp_path / "e", "--source", source, "--format", "json")
    assert result.code == 0, result
    names = {c["name"] for c in result.json["comparisons"]}
    assert "decode@100.logits" in names
    assert "decode@50.logits" not in names


def test_a_profile_that_is_not_run_fails(engine: Path, source: Path, tmp_path: Path) -> None:
    """Two tokens of which the second cannot be a step of its own."""
    plan = json.loads((engine / "model.engine").read_text())
    plan["profiles"][1]["attention_mask"][0] = [1, 3]
    (engine / "model.engine").write_text(json.dumps(plan))
    change(engine, files={"model.engine": {"bytes": (engine / "model.engine").stat().st_size}})
    np.savez(tmp_path / "two.npz", input_ids=np.array([[1, 2]]))
    result = matexport("verify", "-m", engine, "--source", source, "--inputs", tmp_path / "two.npz")
    assert result.code == 3, result
    assert "| profile decode | engine |" in result.stdout
    assert "was not run: none of the inputs fits it" in result.stdout


def test_refusals_before_anything_is_loaded(
    engine: Path, source: Path, gpu: list[Gpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another GPU, none, another version, no package: each said, and the engine is not touched."""
    (engine / "model.engine").write_bytes(b"would crash")
    command = "verify", "-m", engine, "--source", source

    def refused(*words: str) -> None:
        result = matexport(*command)
        assert result.code == 5, result
        assert all(word in result.stderr for word in words), result.stderr
        shown = matexport("inspect", "-m", engine).stdout
        assert words[0] in shown
        assert "runs_here: no" in shown

    gpu[:] = [Gpu("NVIDIA RTX 4090", 89)]
    refused("for GPUs of compute capability 9.0, and this one is NVIDIA RTX 4090 (8.9)", "build it for this GPU")
    gpu.clear()
    refused("for GPUs of compute capability 9.0, and there is none here")
    gpu.append(H100)
    change(engine, tensorrt={"flavour": "TensorRT", "version": "11.1.0.106"})
    refused("TensorRT 11.1.0.106, and 10.16.1.11 is installed", "in no other")
    change(engine, tensorrt={"flavour": "TensorRT", "version": "10.16.1.11"})
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    refused("an engine of TensorRT 10.16.1.11, which is not installed", "install TensorRT 10.16.1.11")
    monkeypatch.delitem(sys.modules, "tensorrt")
    result = matexport(*command)
    assert result.code == 3  # it fits, but is not what was built: still nothing is loaded
    assert "is not loaded: it is native code" in result.stderr


def test_an_engine_of_tensorrt_rtx_is_refused_here(source: Path, tmp_path: Path) -> None:
    """With the real package: this machine has no GPU."""
    if find_gpus():
        pytest.skip("there is a GPU")
    mx.build_trt(source, tmp_path / "rtx", target="rtx-ada")
    result = matexport("verify", "-m", tmp_path / "rtx", "--source", source)
    assert result.code == 5
    assert "TensorRT-RTX 1.7" in result.stderr
    assert "for GPUs of compute capability 8.9, and there is none here" in result.stderr
    change(tmp_path / "rtx", tensorrt={"flavour": "TensorRT-RTX", "version": "1.6.1.120"})
    result = matexport("verify", "-m", tmp_path / "rtx", "--source", source)
    assert "pip install tensorrt-rtx==1.6.1.120" in result.stderr


def test_what_a_library_refuses(engine: Path, gpu: list[Gpu]) -> None:
    (engine / "model.engine").write_bytes(b"no engine")
    manifest = json.loads((engine / "matexport.json").read_text())
    with pytest.raises(InputError, match="cannot be loaded: Magic tag does not match"):
        runtime.open_engine(engine, manifest)
    odd: list[dict[str, object]] = [
        {"tensorrt": {"flavour": "toaster", "version": "1"}}, {"tensorrt": 3}, {"capabilities": "x"}, {"inputs": []},
        {"profiles": None},
    ]  # fmt: skip
    for entries in odd:
        with pytest.raises(InputError, match="manifest cannot be read"):
            runtime.require_engine(engine, {**manifest, **entries})


def test_other_names_or_profiles_than_the_manifest_says(engine: Path, gpu: list[Gpu]) -> None:
    manifest = json.loads((engine / "matexport.json").read_text())
    with pytest.raises(InputError, match="other inputs and outputs"):
        runtime.open_engine(engine, {**manifest, "inputs": {"x": {}}})
    with pytest.raises(InputError, match="other profiles"):
        runtime.open_engine(engine, {**manifest, "profiles": {"default": {}}})


def test_states_that_are_written_in_place(engine: Path, source: Path, gpu: list[Gpu]) -> None:
    """Input and output have one address; what was given is not touched."""
    manifest = json.loads((engine / "matexport.json").read_text())
    names = [name for name in manifest["outputs"] if name.endswith("state")]
    aliases = {name: name.replace("present", "past_key_values", 1) for name in names}
    program = runtime.open_engine(engine, manifest).program
    aliased = runtime.open_engine(engine, {**manifest, "aliases": aliases}).program
    ids, mask = np.array([[5, 3, 8]]), np.ones((1, 3), np.int64)
    given = {**program.tokens(ids, mask), **program.zeros(1)}
    want, got = program.run(given), aliased.run(given)
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array)
    assert not any(given[name].any() for name in aliases.values())
    addresses = runtime_addresses(aliased)
    assert all(addresses[output] == addresses[given] for output, given in aliases.items())
    assert len(set(addresses.values())) == len(addresses) - len(aliases)


def runtime_addresses(program: Any) -> dict[str, int]:
    """Of the last run."""
    found: dict[str, int] = program.run.__self__._context.addresses
    return found


def test_without_pytorch_on_cuda(engine: Path, gpu: list[Gpu], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "DEVICE", "cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(MissingError, match=r"matexport\[gpu\]"):
        runtime.open_engine(engine, json.loads((engine / "matexport.json").read_text()))


def test_the_timing_cache(source: Path, gpu: list[Gpu], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept between builds; one of another version, or damaged, is ignored with a word, and replaced."""
    cache = tmp_path / "timing.cache"

    def built(name: str) -> str:
        command = "trt", "-m", source, "-o", tmp_path / name, "--target", "tensorrt", "--timing-cache", cache
        result = matexport(*command)
        assert result.code == 0, result
        return result.stderr

    assert "timing cache" not in built("a") + built("b")
    assert json.loads(cache.read_text()) == ["10.16.1.11", 2]
    cache.write_text(json.dumps(["9.0", 5]))
    assert "note: timing cache timing.cache is of another version or GPU: it is ignored" in built("c")
    assert json.loads(cache.read_text()) == ["10.16.1.11", 1]
    cache.write_bytes(b"{")
    assert "is ignored" in built("d")
    for target, words in (("rtx", "TensorRT-RTX has no timing cache"), ("h100", "--timingCacheFile=FILE")):
        result = matexport("trt", "-m", source, "-o", tmp_path / target, "--target", target, "--timing-cache", cache)
        assert result.code == 2
        assert words in result.stderr


def test_the_builder_is_asked_for_the_same_in_tensorrt_11(
    source: Path, gpu: list[Gpu], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_TENSORRT_VERSION", "11.1.0.106")
    assert mx.build_trt(source, tmp_path / "e", target="tensorrt")["tensorrt"]["version"] == "11.1.0.106"


def test_the_plan_needs_no_gpu(source: Path, tmp_path: Path) -> None:
    """Its profiles are those that the engine gets; what is missing here is said."""
    planned = plan_engine(source, slice="half", target="rtx-ada")
    assert planned["missing"] is None
    built = mx.build_trt(source, tmp_path / "rtx", slice="half", target="rtx-ada")
    assert json.loads(json.dumps(planned["profiles"])) == json.loads(json.dumps(built["profiles"]))
    mx.export_onnx(source, tmp_path / "onnx", slice="half", target="portable")
    assert plan_engine(tmp_path / "onnx", target="rtx-ada")["profiles"] == planned["profiles"]
    command = "trt", "-m", source, "-s", "half", "--dry-run", "--target", "tensorrt", "--target", "h200"
    result = matexport(*command, "-o", tmp_path / "no")
    assert result.code == 0, result
    assert not (tmp_path / "no").exists()
    assert "input_ids: 1x1 to 8x2048, best 1x128" in result.stdout
    assert "cannot be built here: target 'tensorrt' needs" in result.stdout
    assert "h200: a kit for TensorRT, GPUs 9.0" in result.stdout
    assert matexport(*command, "--plugin", "cuda").code == 0
    assert matexport("trt", "-m", source).code == 2  # without it an output is needed


def test_gpus_are_found_by_their_driver(tmp_path: Path) -> None:
    """A driver in C, with one A100 and one Orin."""
    compiler = cuda_kernels.compiler()
    if not compiler:
        pytest.skip("there is no C++ compiler: the call of the driver was NOT tested")
    code = """
    #include <cstring>
    extern "C" {
    int cuInit(unsigned flags) { return FAILS; }
    int cuDeviceGetCount(int *n) { *n = 2; return 0; }
    int cuDeviceGet(int *device, int i) { *device = 40 + i; return 0; }
    int cuDeviceGetName(char *name, int size, int device) {
      if (size < 64) return 1;
      std::strcpy(name, device == 40 ? "NVIDIA A100" : "Orin");
      return 0;
    }
    int cuDeviceGetAttribute(int *value, int which, int device) {
      *value = which == 75 ? 8 : which == 76 ? (device == 40 ? 0 : 7) : -1;
      return 0;
    }
    }"""
    for fails, found in ((0, "NVIDIA A100 (8.0), Orin (8.7)"), (100, "")):
        library = tmp_path / f"libcuda{fails}.so"
        command = [str(compiler), "-shared", "-fPIC", f"-DFAILS={fails}", "-x", "c++", "-", "-o", str(library)]
        subprocess.run(command, input=code, text=True, check=True, env=dict(os.environ))
        assert ", ".join(map(str, find_gpus(str(library)))) == found
    assert find_gpus("libno-such-driver.so.1") == ()


# ------------------------------------------------------------------------------------------------- with plugins
@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Of the library of plugins the stand-in wants no more than its entrance; our ops it computes with ONNX Runtime."""
    if matexport_plugins.ort_library() is None:
        pytest.skip("there is no libmatexport_ort")
    with pytest.MonkeyPatch.context() as patch:
        if matexport_plugins.trt_library() is None:
            path = tmp_path_factory.mktemp("library") / "libmatexport_cuda.so"
            flags = ("-fno-exceptions",)
            cuda_kernels.compile_for_cpu(path, cuda_kernels.KERNELS, "native/trt_plugin.cc", flags=flags)
            patch.setattr(matexport_plugins, "trt_library", lambda: path)
        yield


WAYS = {
    "cuda": ["--plugin=cuda"], "embedded": ["--plugin=cuda", "--embed-plugin"],
    "in place": ["--plugin=cuda", "--in-place"], "triton": ["--plugin=triton"],
}  # fmt: skip


@pytest.mark.parametrize("way", list(WAYS))
def test_what_plugins_need_before_an_engine_is_loaded(
    way: str, source: Path, gpu: list[Gpu], library: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library is loaded, or allowed, or Python registers; new states are read where old ones were. Or it fails."""
    built = matexport("trt", "-m", source, "-s", "half", "-o", tmp_path / "e", "--target", "tensorrt", *WAYS[way])
    assert built.code == 0, built
    plan = json.loads((tmp_path / "e" / "model.engine").read_text())
    assert plan["plugins"]
    assert len(plan["aliased"]) == (4 if way == "in place" else 0)
    assert len(plan["embedded"]) == (way == "embedded")
    verify = ("verify", "-m", tmp_path / "e", "--source", source)
    with monkeypatch.context() as patch:  # in a process that does none of it
        patch.setattr(runtime._Loaded, "_load_plugins", lambda *a: None)
        with pytest.raises(InputError, match="Cannot find plugin: Mamba2Scan"):
            runtime.open_engine(tmp_path / "e", read_manifest(tmp_path / "e"))
    result = matexport(*verify)
    assert result.code == 0, result
    if way == "in place":
        change(tmp_path / "e", aliases={})
        assert matexport(*verify).code == 3  # the outputs that were bound are not what was written


def test_plugins_that_cannot_be_loaded(
    source: Path, gpu: list[Gpu], library: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = matexport("trt", "-m", source, "-s", "half", "-o", tmp_path / "e", "--target", "tensorrt", "--plugin=cuda")
    assert built.code == 0, built
    manifest = read_manifest(tmp_path / "e")
    (tmp_path / "e" / manifest["plugins"]["library"]).write_bytes(b"no library")
    with pytest.raises(InputError, match=r"'libmatexport_cuda.so', cannot be loaded"):
        runtime.open_engine(tmp_path / "e", manifest)
    manifest["plugins"]["library"] = "../libmatexport_cuda.so"  # of a manifest, only a name counts
    with pytest.raises(InputError, match=r"'libmatexport_cuda.so', cannot be loaded"):
        runtime.open_engine(tmp_path / "e", manifest)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(MissingError, match="its plugins are in Triton"):
        runtime.open_engine(tmp_path / "e", {**manifest, "plugins": {"kind": "triton", "embedded": False}})
