"""matexport_cuda: the ops for ONNX Runtime with CUDA, and the library that nvcc makes, on a machine without a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import cuda_kernels
import matexport_plugins
from native_ops import ATTRIBUTES, CONV, INPUTS, SCAN, Op, error, model_bytes, scan_inputs, session

needs_compiler = pytest.mark.skipif(not cuda_kernels.compiler(), reason="there is no C++ compiler")
both_ops = pytest.mark.parametrize("op", [SCAN, CONV], ids=lambda op: op.name)
ELEMENTS = {torch.float32: onnx.TensorProto.FLOAT, torch.float16: onnx.TensorProto.FLOAT16,
            torch.bfloat16: onnx.TensorProto.BFLOAT16}  # fmt: skip

REGISTER = """
#include "cuda_ort.h"
using namespace matexport;
MATEXPORT_EXPORT ort::Status RegisterCustomOps(void *options, const ort::ApiBase *base) {
  const ort::Api api(base->get_api(ort::kApiVersion));
  static void *domain = nullptr;
  if (!domain) {
    api.create_domain("ai.matexport", &domain);
    for (const ort::CustomOp &op : kCudaOpTable)
      if (ort::Status s = api.add_op(domain, &op)) return s;
  }
  return api.add_domain(options, domain);
}
"""


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CUDA ops of ONNX Runtime, said to be the CPU provider's, with kernels compiled for the CPU."""
    folder = tmp_path_factory.mktemp("ort")
    (folder / "register.cc").write_text(REGISTER)
    flags = ('-DMATEXPORT_PROVIDER="CPUExecutionProvider"', f"-I{cuda_kernels.SOURCES / 'native'}",
             "-fno-threadsafe-statics")  # fmt: skip
    sources = (cuda_kernels.KERNELS, "native/cuda_ort.cc", folder / "register.cc")
    return cuda_kernels.compile_for_cpu(folder / "libops.so", *sources, flags=flags)


def typed_model(op: Op, dtype: torch.dtype, present: tuple[str, ...], **attributes: Any) -> bytes:
    model = onnx.load_from_string(model_bytes(op, present, **attributes))
    for value in [*(v for v in model.graph.input if v.name in cuda_kernels.ROUNDED), model.graph.output[0]]:
        value.type.tensor_type.elem_type = ELEMENTS[dtype]
    return model.SerializeToString()


def with_library(model: bytes, library: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@needs_compiler
@both_ops
@pytest.mark.parametrize("dtype", list(ELEMENTS), ids=str)
@pytest.mark.parametrize("optional", [True, False])
def test_every_type_in_onnxruntime(on_cpu: Path, op: Op, dtype: torch.dtype, optional: bool) -> None:
    given = {k: v for k, v in INPUTS[op].items() if optional or k not in ("state", "mask", "z")}
    rounded = cuda_kernels.rounded({k: torch.from_numpy(v) for k, v in given.items()}, dtype)
    binding = (runner := with_library(typed_model(op, dtype, tuple(given), **ATTRIBUTES[op]), on_cpu)).io_binding()
    for name, value in rounded.items():
        element = ELEMENTS.get(value.dtype, onnx.TensorProto.BOOL)
        binding.bind_input(name, "cpu", 0, element, tuple(value.shape), value.data_ptr())
    y = torch.full(given["x"].shape, torch.nan, dtype=dtype)
    want, want_state = op.reference(
        **{k: v if v.dtype == torch.bool else v.double().numpy() for k, v in rounded.items()}, **ATTRIBUTES[op]
    )
    state = torch.full(want_state.shape, torch.nan)
    for name, value in (("y", y), ("final_state", state)):
        binding.bind_output(name, "cpu", 0, ELEMENTS[value.dtype], tuple(value.shape), value.data_ptr())
    runner.run_with_iobinding(binding)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert error(y.double().numpy(), want) < tolerance
    assert error(state.double().numpy(), want_state) < tolerance


@needs_compiler
def test_a_workspace_is_made_where_it_is_needed(on_cpu: Path) -> None:
    """A long sequence of few heads, and a state too long for the chunked kernel that nobody asks for."""
    for case, outputs in (({"length": 1100, "N": 16}, ("y", "final_state")), ({"length": 30, "N": 200}, ("y",))):
        inputs = scan_inputs(3, batch=1, heads=2, P=24, groups=1, **case)
        y = with_library(model_bytes(SCAN, tuple(inputs), outputs), on_cpu).run(["y"], inputs)[0]
        assert error(y, SCAN.reference(**inputs)[0]) < 1e-5


BAD_INPUTS = [
    (SCAN, "dt_raw", (2, 100, 3), "axis 2 of dt_raw is 3, and 4 would fit"),
    (SCAN, "B", (2, 100, 31), "last axis of B \\(31\\) is not divisible by the 2 groups"),
    (SCAN, "C", (2, 99, 32), "axis 1 of C is 99, and 100"),
    (SCAN, "A", (3,), "A has 3 heads"),
    (SCAN, "x", (2, 9600), "x has 2 axes and needs 3"),
    (SCAN, "x", (2, 0, 96), "length must be at least 1"),
    (SCAN, "state", (2, 4, 24, 16), "axis 2 of state is 24, and 16"),
    (SCAN, "mask", (2, 1), "axis 1 of mask is 1, and 100"),
    (CONV, "weight", (24, 1, 5), "axis 2 of state is 3, and 4"),
    (CONV, "weight", (24, 1, 257), "257 taps"),
    (CONV, "bias", (23,), "axis 0 of bias is 23, and 24"),
]


@needs_compiler
@pytest.mark.parametrize(("op", "name", "shape", "message"), BAD_INPUTS, ids=lambda v: getattr(v, "name", str(v)))
def test_shapes_that_do_not_fit_are_refused(
    on_cpu: Path, op: Op, name: str, shape: tuple[int, ...], message: str
) -> None:
    inputs = INPUTS[op] | {name: np.zeros(shape, INPUTS[op][name].dtype)}
    with pytest.raises(Exception, match=f"{op.name}: .*{message}"):
        with_library(model_bytes(op, tuple(inputs), **ATTRIBUTES[op]), on_cpu).run(None, inputs)


@needs_compiler
@pytest.mark.parametrize("attributes", [{"groups": 0}, {"dt_limit": [1.0, 0.0]}, {"dt_limit": [0.0]}], ids=str)
def test_attributes_that_make_no_sense_are_refused(on_cpu: Path, attributes: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=f"Mamba2Scan: {next(iter(attributes))} must"):
        with_library(model_bytes(SCAN, tuple(INPUTS[SCAN]), **attributes), on_cpu)


def cuda_library() -> Path:
    """The library that nvcc made. Only where it cannot have been made are its tests left out."""
    path = matexport_plugins.ort_library(cuda=True)
    absent = os.environ.get("MATEXPORT_CUDA") == "0" or os.environ.get("MATEXPORT_NATIVE") == "0"
    if path is None and (absent or not shutil.which("nvcc")):
        pytest.skip("there is no nvcc: libmatexport_cuda was NOT built and NOT tested")
    assert path is not None, "there is an nvcc, but matexport-plugins is installed without libmatexport_cuda"
    return path


@both_ops
def test_the_library_for_cuda_serves_the_cpu_too(op: Op) -> None:
    """On an ONNX Runtime without CUDA and without a driver: it registers, and float32 runs."""
    inputs = INPUTS[op]
    y, state = with_library(model_bytes(op, tuple(inputs), **ATTRIBUTES[op]), cuda_library()).run(None, inputs)
    want = session(model_bytes(op, tuple(inputs), **ATTRIBUTES[op]), "").run(None, inputs)
    assert np.array_equal(y, want[0])
    assert np.array_equal(state, want[1])
    with pytest.raises(Exception, match=f"Could not find an implementation for {op.name}"):
        with_library(typed_model(op, torch.bfloat16, tuple(inputs), **ATTRIBUTES[op]), cuda_library())


def test_a_domain_comes_from_one_library_only() -> None:
    """Why the library for CUDA has the ops for the CPU too."""
    options = onnxruntime.SessionOptions()
    for library in (matexport_plugins.ort_library(), cuda_library()):
        options.register_custom_ops_library(str(library))
    with pytest.raises(Exception, match="Domain already set in registry"):
        onnxruntime.InferenceSession(model_bytes(CONV, tuple(INPUTS[CONV])), options)


def test_the_library_needs_nothing_of_nvidia_to_load() -> None:
    """Neither libcuda, libcudart nor libnvinfer; without a driver a launch is an error and no crash."""
    listed = subprocess.run(["ldd", str(cuda_library())], capture_output=True, text=True, check=True).stdout
    names = {line.split()[0].split(".so")[0].rsplit("/", 1)[-1] for line in listed.splitlines()}
    assert names <= {
        "linux-vdso",
        "libc",
        "libm",
        "libpthread",
        "libdl",
        "librt",
        "ld-linux-x86-64",
        "ld-linux-aarch64",
    }
    exported = subprocess.run(["nm", "-D", "--defined-only", str(cuda_library())], capture_output=True, text=True)
    symbols = {line.split()[-1] for line in exported.stdout.splitlines()}
    scan = {
        f"matexport_cuda_{name}" for name in ("abi", "scan", "scan_workspace", "scan_most_workspace", "conv", "error")
    }
    assert symbols == scan | {"RegisterCustomOps", "getCreators", "setLoggerFinder"}
    if not torch.cuda.is_available():
        inputs = {k: torch.from_numpy(v) for k, v in INPUTS[CONV].items()}
        with pytest.raises(AssertionError, match=r"no CUDA-capable device|driver"):
            cuda_kernels.run(cuda_kernels.open_library(cuda_library()), "CausalConv1d", inputs)


def test_the_paths_cost_nothing() -> None:
    code = (
        "import sys\nbefore = set(sys.modules)\nimport matexport_plugins\n"
        "paths = matexport_plugins.ort_library(cuda=True), matexport_plugins.trt_library()\n"
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['matexport_plugins']"
