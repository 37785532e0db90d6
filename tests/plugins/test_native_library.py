"""The library of custom ops: what it refuses, threads, instruction sets, and the ONNX Runtime that it meets."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import onnxruntime
import pytest

from matexport_plugins.mamba2_scan.reference import mamba2_scan
from native_ops import (
    ALONG_LENGTH,
    ATTRIBUTES,
    CONV,
    INPUTS,
    SCAN,
    Op,
    OrtRunner,
    error,
    instruction_sets,
    library,
    model_bytes,
    part,
    processor_flags,
    session,
)
from support import REPOSITORY

ISAS = instruction_sets()
both_ops = pytest.mark.parametrize("op", [SCAN, CONV], ids=lambda op: op.name)
every_isa = pytest.mark.parametrize("isa", ISAS)


def wrong_tail(y: np.ndarray, state: np.ndarray, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The last columns of x, also where the mask is zero."""
    return y, inputs["x"][:, -3:].transpose(0, 2, 1)


def newest_first(y: np.ndarray, state: np.ndarray, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return y, state[..., ::-1]


def from_the_wrong_end(
    y: np.ndarray, state: np.ndarray, inputs: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The sequence run backwards."""
    backwards = {k: v[:, ::-1] if k in ALONG_LENGTH else v for k, v in inputs.items()}
    return y, mamba2_scan(**backwards, groups=2)[1]


def other_groups(y: np.ndarray, state: np.ndarray, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Groups dealt out in turn to the heads, and not in blocks."""
    turn = {k: inputs[k].reshape(2, 100, 2, 16)[:, :, [0, 1, 0, 1]].reshape(2, 100, -1) for k in "BC"}
    return mamba2_scan(**{**inputs, **turn}, groups=4)


def no_gate(y: np.ndarray, state: np.ndarray, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return mamba2_scan(**{k: v for k, v in inputs.items() if k != "z"}, groups=2)


FAULTS = [(CONV, wrong_tail), (CONV, newest_first), (SCAN, from_the_wrong_end), (SCAN, other_groups), (SCAN, no_gate)]


@pytest.mark.parametrize(("op", "fault"), FAULTS, ids=lambda v: getattr(v, "__name__", ""))
def test_the_comparison_can_fail(op: Op, fault: Any) -> None:
    got = OrtRunner(op, "portable", attributes=ATTRIBUTES[op])(**INPUTS[op])
    wrong = fault(*op.reference(**INPUTS[op], **ATTRIBUTES[op]), INPUTS[op])
    assert max(error(g, w) for g, w in zip(got, wrong, strict=True)) > 1e-2


@both_ops
@every_isa
def test_the_number_of_threads_changes_no_bit(op: Op, isa: str) -> None:
    one, many = (OrtRunner(op, isa, threads, ATTRIBUTES[op])(**INPUTS[op]) for threads in (1, 3))
    assert all(np.array_equal(a, b) for a, b in zip(one, many, strict=True))


@both_ops
def test_several_threads_may_run_one_session(op: Op) -> None:
    """They share the kernel, and with it the memory that it keeps."""
    runner, inputs = session(model_bytes(op, tuple(INPUTS[op]), **ATTRIBUTES[op]), ISAS[-1], 2), INPUTS[op]
    want, results = runner.run(None, inputs), []

    def work() -> None:
        results.extend(runner.run(None, inputs) for _ in range(20))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 80
    assert all(np.array_equal(got, w) for result in results for got, w in zip(result, want, strict=True))


@both_ops
@every_isa
@pytest.mark.parametrize("length", [1, 70])
def test_the_final_state_may_be_left_out(op: Op, isa: str, length: int) -> None:
    inputs = part(INPUTS[op], 0, length, INPUTS[op]["state"])
    (y,) = session(model_bytes(op, tuple(inputs), ("y",), **ATTRIBUTES[op]), isa).run(None, inputs)
    (unnamed,) = session(model_bytes(op, tuple(inputs), ("y", ""), **ATTRIBUTES[op]), isa).run(None, inputs)
    want, _ = op.reference(**inputs, **ATTRIBUTES[op])
    assert error(y, want) < 1e-5
    assert np.array_equal(y, unnamed)


@both_ops
def test_an_empty_batch_is_possible(op: Op) -> None:
    inputs = {k: v[:0] if k in ALONG_LENGTH | {"state"} else v for k, v in INPUTS[op].items()}
    y, state = session(model_bytes(op, tuple(inputs), **ATTRIBUTES[op]), "portable").run(None, inputs)
    assert y.shape == inputs["x"].shape
    assert state.shape == inputs["state"].shape


BAD_INPUTS = [
    (SCAN, "dt_raw", (2, 100, 3), "axis 2 of dt_raw is 3, and 4 would fit"),
    (SCAN, "B", (2, 100, 31), "last axis of B \\(31\\) is not divisible by the 2 groups"),
    (SCAN, "C", (2, 99, 32), "axis 1 of C is 99, and 100"),
    (SCAN, "D", (1,), "axis 0 of D is 1, and 4"),
    (SCAN, "A", (3,), "A has 3 heads"),
    (SCAN, "x", (2, 100, 95), "4 heads, which must divide the 95 channels"),
    (SCAN, "x", (2, 9600), "x, A, B need 3, 1, 3 axes, not 2, 1, 3"),
    (SCAN, "x", (2, 0, 96), "length must be at least 1"),
    (SCAN, "state", (2, 4, 24, 16), "axis 2 of state is 24, and 16"),
    (SCAN, "mask", (2, 1), "axis 1 of mask is 1, and 100"),
    (CONV, "weight", (24, 4), "weight need 3 axes"),
    (CONV, "weight", (24, 1, 5), "axis 2 of state is 3, and 4"),
    (CONV, "weight", (24, 1, 257), "257 taps"),
    (CONV, "bias", (23,), "axis 0 of bias is 23, and 24"),
    (CONV, "state", (2, 3, 24), "axis 1 of state is 3, and 24"),
]


@pytest.mark.parametrize(("op", "name", "shape", "message"), BAD_INPUTS, ids=lambda v: getattr(v, "name", str(v)))
def test_shapes_that_do_not_fit_are_refused(op: Op, name: str, shape: tuple[int, ...], message: str) -> None:
    inputs = INPUTS[op] | {name: np.zeros(shape, INPUTS[op][name].dtype)}
    with pytest.raises(Exception, match=f"{op.name}: .*{message}"):
        session(model_bytes(op, tuple(inputs), **ATTRIBUTES[op]), "portable").run(None, inputs)


@pytest.mark.parametrize(
    "attributes", [{"groups": 0}, {"dt_limit": [1.0, 0.0]}, {"dt_limit": [0.0]}, {"dt_limit": [0.0, 1.0, 2.0]}], ids=str
)
def test_attributes_that_make_no_sense_are_refused(attributes: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=f"Mamba2Scan: {next(iter(attributes))} must"):
        session(model_bytes(SCAN, tuple(INPUTS[SCAN]), **attributes), "portable")


def test_the_instruction_set_can_be_forced() -> None:
    """On this machine: all that the processor has, and a clear error for all others."""
    library()
    model = model_bytes(SCAN, tuple(INPUTS[SCAN]), groups=2)
    assert ISAS[0] == "portable"
    results = {isa: session(model, isa).run(None, INPUTS[SCAN])[0] for isa in ISAS}
    if "avx2" in ISAS:  # fused multiply-add rounds once: other code must have run
        assert not np.array_equal(results["portable"], results["avx2"])
    assert np.array_equal(session(model, "").run(None, INPUTS[SCAN])[0], results[ISAS[-1]])
    for isa in {"avx2", "avx512"} - set(ISAS):
        with pytest.raises(Exception, match=f"MATEXPORT_ISA={isa}: this (processor does not have|library was built)"):
            session(model, isa)
    with pytest.raises(Exception, match="MATEXPORT_ISA=sse9 is not one of portable, avx2, avx512"):
        session(model, "sse9")
    if "avx512f" in processor_flags():
        assert "avx2" in ISAS


@every_isa
def test_bfloat16_is_used_where_the_processor_has_it(isa: str) -> None:
    """And nowhere else; never for a single step."""
    for length in (100, 1):
        inputs = part(INPUTS[SCAN], 0, length, INPUTS[SCAN]["state"])
        exact, y = (
            session(model_bytes(SCAN, tuple(inputs), groups=2, bfloat16=flag), isa).run(None, inputs)[0]
            for flag in (0, 1)
        )
        used = isa == "avx512" and "avx512_bf16" in processor_flags() and length > 1
        assert np.array_equal(exact, y) != used
        assert error(y, exact) < 1e-2


def test_an_onnxruntime_that_is_too_old_gets_a_status() -> None:
    """A runtime that knows API versions up to 16 only; all it can do for us is to make a status."""
    said: list[tuple[int, bytes]] = []
    create_status = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)(
        lambda code, text: said.append((code, text)) or 4711  # type: ignore[func-returns-value]
    )
    table = (ctypes.c_void_p * 1)(ctypes.cast(create_status, ctypes.c_void_p))
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(
        lambda version: ctypes.addressof(table) if version <= 16 else None
    )
    base = (ctypes.c_void_p * 2)(ctypes.cast(get_api, ctypes.c_void_p), None)
    register = ctypes.CDLL(str(library())).RegisterCustomOps
    register.restype, register.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_void_p]
    assert register(None, ctypes.addressof(base)) == 4711
    assert said == [(2, b"matexport's custom ops need ONNX Runtime 1.17 or newer")]


def test_the_path_costs_nothing() -> None:
    code = (
        "import sys\nbefore = set(sys.modules)\nimport matexport_plugins\npath = matexport_plugins.ort_library()\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
        "print(sorted(new), path)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"['matexport_plugins'] {library()}"


def test_one_library_serves_many_sessions() -> None:
    """Registered again and again, in options of their own and twice in the same ones."""
    model = model_bytes(CONV, ("x", "weight", "bias"))
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library()))
    for _ in range(3):
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        session(model, "portable")


def test_kernels_share_no_inline_functions() -> None:
    """What is compiled for several instruction sets may not include headers whose functions the linker merges."""
    sources = REPOSITORY / "plugins" / "matexport_plugins"
    kernels = [*sources.glob("*/*_kernel.h"), sources / "native" / "vectors.h"]
    assert len(kernels) == 5
    for path in kernels:
        assert "#include" not in path.read_text(), path
