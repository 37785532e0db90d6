"""The TensorRT plugins: driven by TensorRT-RTX's builder without a GPU, and by our harness without TensorRT.

The library under test is compiled by g++, with the kernels for the CPU; the one that nvcc makes, where there is one,
has the same plugins. Whether TensorRT runs an engine with them on a GPU is NOT tested here.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

import cuda_kernels
import matexport_plugins
from matexport.errors import InputError
from matexport.tensorrt import build as builder
from matexport.tensorrt.build import rtx_environment
from native_ops import CONV, SCAN, Op, model_bytes

pytestmark = pytest.mark.skipif(not cuda_kernels.compiler(), reason="there is no C++ compiler")
CHILD = Path(__file__).parents[1] / "helpers" / "rtx_plugins.py"
NATIVE = cuda_kernels.SOURCES / "native"
SHAPES: dict[Op, dict[str, tuple[Any, ...]]] = {
    SCAN: {"x": ("b", "t", 96), "dt_raw": ("b", "t", 4), "A": (4,), "B": ("b", "t", 32), "C": ("b", "t", 32), "D": (4,),
           "dt_bias": (4,), "state": ("b", 4, 16, 24), "mask": ("b", "t"), "z": ("b", "t", 96)},
    CONV: {"x": ("b", "t", 24), "weight": (24, 1, 4), "bias": (24,), "state": ("b", 24, 3), "mask": ("b", "t")},
}  # fmt: skip
TYPES = {"FLOAT": TensorProto.FLOAT, "HALF": TensorProto.FLOAT16, "BF16": TensorProto.BFLOAT16}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("plugin") / "libplugins.so"
    flags = ("-fno-exceptions", "-static-libstdc++", "-static-libgcc")
    return cuda_kernels.compile_for_cpu(target, cuda_kernels.KERNELS, "native/trt_plugin.cc", flags=flags)


def write_model(path: Path, op: Op, present: Sequence[str], kind: str = "FLOAT", **attributes: Any) -> dict[str, Any]:
    """A model of one node with dynamic batch and length, its empty inputs left out; returns the job of a build."""
    model = onnx.load_from_string(model_bytes(op, tuple(present), **attributes))
    kept = [name for name in model.graph.node[0].input if name]  # TensorRT's parser refuses empty ones
    model.graph.node[0].ClearField("input")
    model.graph.node[0].input.extend(kept)
    shapes = {name: SHAPES[op][name] for name in present}
    for value in model.graph.input:
        element = TYPES[kind] if value.name in cuda_kernels.ROUNDED else value.type.tensor_type.elem_type
        value.CopyFrom(helper.make_tensor_value_info(value.name, element, shapes[value.name]))
    model.graph.output[0].type.tensor_type.elem_type = TYPES[kind]
    onnx.save(model, path)
    profiles = {
        name: [[{"b": b, "t": t}.get(size, size) for size in shape] for b, t in ((1, 1), (2, 100), (4, 2000))]
        for name, shape in shapes.items()
        if "b" in shape
    }
    return {"model": str(path), "profiles": profiles}


def run_child(job: dict[str, Any], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(CHILD), json.dumps(job)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def build(library: Path, job: dict[str, Any], **options: Any) -> dict[str, Any]:
    with rtx_environment() as environment:
        done = run_child({**job, "plugins": [str(library)], **options}, environment)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("kind", list(TYPES))
@pytest.mark.parametrize(
    ("op", "optional"),
    [(SCAN, ("state", "mask", "z")), (SCAN, ("state",)), (SCAN, ("mask",)), (SCAN, ("z",)), (SCAN, ()),
     (CONV, ("state", "mask")), (CONV, ("mask",)), (CONV, ())],
    ids=lambda v: getattr(v, "name", "+".join(v) if isinstance(v, tuple) else str(v)),
)  # fmt: skip
def test_engines_are_built(library: Path, tmp_path: Path, op: Op, optional: tuple[str, ...], kind: str) -> None:
    """With whatever optional inputs, in every type, with dynamic batch and length; the shapes are the plugin's."""
    present = [name for name in op.inputs if name in optional or name not in ("state", "mask", "z")]
    attributes: dict[str, Any] = {"groups": 2, "dt_limit": [0.0, 0.5]} if op is SCAN else {}
    job = write_model(tmp_path / "m.onnx", op, present, kind, **attributes)
    result = build(library, job)
    assert result["bytes"], result["messages"]
    assert result["messages"] == []
    assert result["creators"] == [["CausalConv1d", "1", "ai.matexport"], ["Mamba2Scan", "1", "ai.matexport"]]
    state = [-1, 4, 16, 24] if op is SCAN else [-1, 24, 3]
    assert result["outputs"] == {"y": [kind, [-1, -1, 96 if op is SCAN else 24]], "final_state": ["FLOAT", state]}


def test_for_every_target_with_the_library_inside(library: Path, tmp_path: Path) -> None:
    job = write_model(tmp_path / "m.onnx", SCAN, SCAN.inputs, "HALF", groups=2)
    assert build(library, job, targets=[80, 86, 89, 120, 121])["bytes"]
    plain, embedded = tmp_path / "plain", tmp_path / "embedded"
    assert build(library, job, engine=str(plain))["bytes"]
    assert build(library, job, engine=str(embedded), embed=True)["bytes"]
    assert embedded.stat().st_size - plain.stat().st_size > library.stat().st_size
    assert library.read_bytes() in embedded.read_bytes()


def test_the_state_in_place_needs_a_preview_feature(library: Path, tmp_path: Path) -> None:
    for op in (SCAN, CONV):
        attributes = {"groups": 2} if op is SCAN else {}
        job = write_model(tmp_path / "m.onnx", op, op.inputs, in_place=1, **attributes)
        assert build(library, job, aliased=True)["bytes"]
        refused = build(library, job)
        assert refused["bytes"] is None
        assert "kALIASED_PLUGIN_IO_10_03 not enabled" in refused["messages"][0]


def test_attributes_that_make_no_sense_are_refused(library: Path, tmp_path: Path) -> None:
    for attributes in ({"groups": 0}, {"dt_limit": [1.0, 0.0]}):
        assert build(library, write_model(tmp_path / "m.onnx", SCAN, SCAN.inputs, **attributes))["bytes"] is None


def test_types_that_do_not_fit_are_refused(library: Path, tmp_path: Path) -> None:
    """A state in float16, in a network that is strongly typed."""
    job = write_model(tmp_path / "m.onnx", SCAN, SCAN.inputs, groups=2)
    model = onnx.load(tmp_path / "m.onnx")
    state = next(value for value in model.graph.input if value.name == "state")
    state.type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.save(model, tmp_path / "m.onnx")
    assert build(library, job)["bytes"] is None


def test_an_empty_input_is_refused_by_the_parser(library: Path, tmp_path: Path) -> None:
    """So models for TensorRT leave them out; the plugin tells optional inputs apart by type and rank."""
    present = [name for name in SCAN.inputs if name != "state"]
    job = write_model(tmp_path / "m.onnx", SCAN, present, groups=2)
    model = onnx.load(tmp_path / "m.onnx")
    model.graph.node[0].input.insert(7, "")
    onnx.save(model, tmp_path / "m.onnx")
    refused = build(library, job)
    assert refused["bytes"] is None
    assert any("(input) != nullptr" in message for message in refused["messages"])


def test_a_function_of_the_model_beats_the_plugin(library: Path, tmp_path: Path) -> None:
    """So models for the plugin must not carry the functions that form `custom` has."""
    inputs = SCAN.inputs[:8]
    job = write_model(tmp_path / "m.onnx", SCAN, inputs, groups=2)
    model = onnx.load(tmp_path / "m.onnx")
    nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Identity", ["state"], ["s"])]
    opsets = [helper.make_opsetid("", 21)]
    model.functions.append(
        helper.make_function("ai.matexport", "Mamba2Scan", inputs, ["y", "s"], nodes, opsets, attributes=["groups"])
    )
    onnx.save(model, tmp_path / "m.onnx")
    plugin = write_model(tmp_path / "p.onnx", SCAN, inputs, groups=2, in_place=1)
    assert build(library, plugin)["bytes"] is None  # the plugin is there: it wants the preview feature
    model.graph.node[0].attribute.append(helper.make_attribute("in_place", 1))
    onnx.save(model, tmp_path / "m.onnx")
    assert build(library, job)["bytes"]  # it was not asked


def test_without_its_symlink_the_library_aborts(library: Path, tmp_path: Path) -> None:
    job = write_model(tmp_path / "m.onnx", CONV, CONV.inputs) | {"plugins": [str(library)]}
    environment = {k: v for k, v in os.environ.items() if k != "LD_LIBRARY_PATH"}
    assert run_child(job, environment).returncode == -6


def test_that_abort_is_a_message(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The builder's process dies, ours does not; with the link, the same job gives an engine."""

    @contextlib.contextmanager
    def without() -> Iterator[dict[str, str]]:
        yield {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"}

    plugins = {"libraries": [str(library)], "python": False, "embed": False, "in_place": False}
    job = write_model(tmp_path / "m.onnx", CONV, CONV.inputs)
    job |= {"plugins": plugins, "capabilities": [86], "engine": str(tmp_path / "engine"), "profiles": [job["profiles"]]}
    with monkeypatch.context() as patched:
        patched.setattr(builder, "rtx_environment", without)
        with pytest.raises(InputError, match="the builder died with SIGABRT"):
            builder.run_builder(job, tmp_path, "TensorRT-RTX")
    assert not (tmp_path / "engine").exists()
    builder.run_builder(job, tmp_path, "TensorRT-RTX")
    assert (tmp_path / "engine").exists()


def test_without_the_plugin_the_reason_is_said(library: Path, tmp_path: Path) -> None:
    with rtx_environment() as environment:
        job = write_model(tmp_path / "m.onnx", CONV, CONV.inputs) | {"plugins": []}
        done = run_child(job, environment)
    assert any("Plugin not found" in m for m in json.loads(done.stdout.splitlines()[-1])["messages"])


def test_the_library_of_nvcc_is_driven_too(tmp_path: Path) -> None:
    cuda = matexport_plugins.trt_library()
    if cuda is None:
        pytest.skip("there is no nvcc: libmatexport_cuda was NOT built and NOT tested")
    job = write_model(tmp_path / "m.onnx", SCAN, SCAN.inputs, "BF16", groups=2)
    result = build(cuda, job, embed=True)
    assert result["bytes"] > cuda.stat().st_size


def compile_harness(target: Path, *flags: str) -> Path:
    command = [
        str(cuda_kernels.compiler()),
        "-std=c++17",
        "-O1",
        *flags,
        str(NATIVE / "trt_harness.cc"),
        "-o",
        str(target),
    ]
    done = subprocess.run([*command, "-ldl"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def lives(harness: Path, library: Path) -> list[str]:
    done = subprocess.run([str(harness), str(library)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout.splitlines()


def test_a_whole_life_without_tensorrt(library: Path, tmp_path: Path) -> None:
    said = lives(compile_harness(tmp_path / "harness", "-Wall", "-Wextra", "-Werror"), library)
    assert len(said) == 15
    lived = {f"{op}{how}" for op in ("Mamba2Scan", "CausalConv1d") for how in ("", ", state in place")}
    assert set(said) == {f"{name}: one life, right results" for name in (*lived, "Mamba2Scan, without the state")}


def test_the_harness_can_fail(tmp_path: Path) -> None:
    """A plugin whose state is never found, so that it is not aliased."""
    source = (NATIVE / "trt_plugin.cc").read_text()
    broken = source.replace("state_ = i;", "state_ = -1;")
    assert broken != source
    (tmp_path / "trt_plugin.cc").write_text(broken)
    library = cuda_kernels.compile_for_cpu(
        tmp_path / "lib.so", cuda_kernels.KERNELS, tmp_path / "trt_plugin.cc", flags=(f"-I{NATIVE}",)
    )
    harness = compile_harness(tmp_path / "harness")
    done = subprocess.run([str(harness), str(library)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "getAliasedInput(1)" in done.stdout


def vtables(source: str, folder: Path, *flags: str) -> dict[str, list[str]]:
    """The virtual functions of TensorRT's interfaces, in order, as g++ lays them out."""
    folder.mkdir()
    (folder / "plugin.cc").write_text(source)
    command = [
        str(cuda_kernels.compiler()),
        "-std=c++17",
        "-fsyntax-only",
        "-w",
        "-fdump-lang-class",
        f"-I{NATIVE}",
        *flags,
    ]
    subprocess.run([*command, "plugin.cc"], cwd=folder, check=True, capture_output=True)
    found = {}
    for block in re.split(r"\n\n", next(folder.glob("*.class")).read_text()):
        if block.startswith("Vtable for {anonymous}::"):
            name = block.split("\n", 1)[0]
            found[name] = re.findall(r"^\d+ +.*$", block, re.M)
    return found


def test_our_header_agrees_with_nvidias(library: Path, tmp_path: Path) -> None:
    """The same source laid out by both; then the harness with NVIDIA's headers drives the plugins with ours."""
    folder = os.environ.get("TENSORRT_INCLUDE_DIR")
    if not folder:
        pytest.skip("TENSORRT_INCLUDE_DIR is not set: trt_abi.h was NOT compared with NVIDIA's headers")
    cuda = os.environ.get("CUDA_INCLUDE_DIR", "/usr/local/cuda/include")
    flags = ("-DMATEXPORT_TRT_HEADERS", f"-I{folder}", f"-I{cuda}")
    source = (NATIVE / "trt_plugin.cc").read_text()
    if "g++" in str(cuda_kernels.compiler()) or "c++" in str(cuda_kernels.compiler()):
        ours, theirs = vtables(source, tmp_path / "ours"), vtables(source, tmp_path / "theirs", *flags)
        assert len(ours) == 4
        assert ours == theirs
    assert len(lives(compile_harness(tmp_path / "harness", "-w", *flags), library)) == 15
