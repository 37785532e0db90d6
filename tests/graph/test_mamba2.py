"""The scan in ai.onnx operators against the float64 reference, in ONNX Runtime and ONNX's own evaluator."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import onnxruntime
import pytest

from matexport.graph import mamba2
from matexport.graph.builder import IR_VERSIONS, OPSET, Graph
from matexport_plugins.mamba2_scan.reference import mamba2_scan


def scan_model(
    length: int, heads: int, groups: int, head_dim: int, state: int, A: np.ndarray, D: np.ndarray
) -> onnx.ModelProto:
    g = Graph("scan")
    sizes = {"x": heads * head_dim, "dt": heads, "B": groups * state, "C": groups * state}
    x, dt, B, C = (g.input(name, "F32", ["batch", length, size]) for name, size in sizes.items())
    y = mamba2.scan(
        g, x, dt, g.constant(A, "F32"), B, C, g.constant(D, "F32"),
        length=length, heads=heads, head_dim=head_dim, groups=groups, state=state, chunk=16,
    )  # fmt: skip
    g.output(y, "y", "F32", ["batch", length, heads * head_dim])
    return ir.to_proto(g.to_model(producer_version="test", metadata={}))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 3 * 16 + 5])
@pytest.mark.parametrize(("heads", "groups", "head_dim"), [(4, 1, 2), (8, 2, 24), (8, 8, 5)])
def test_against_float64(length: int, heads: int, groups: int, head_dim: int) -> None:
    rng = np.random.default_rng(length)
    b, n = 2, 6
    A, D = -rng.uniform(1, 16, heads), rng.standard_normal(heads)
    feeds = {
        "x": rng.standard_normal((b, length, heads * head_dim)),
        "dt": np.logaddexp(0, 4 * rng.standard_normal((b, length, heads))),
        "B": rng.standard_normal((b, length, groups * n)),
        "C": rng.standard_normal((b, length, groups * n)),
    }
    feeds["dt"][:, : length // 2] = 25  # decays that underflow, and sums far beyond 2^16 in the whole sequence
    feeds["dt"][:, length // 2 :] *= 0.01
    inverse_softplus = np.log(np.expm1(feeds["dt"]))
    want, _ = mamba2_scan(feeds["x"], inverse_softplus, A, feeds["B"], feeds["C"], D, np.zeros(heads), groups=groups)
    single = {name: array.astype(np.float32) for name, array in feeds.items()}
    model = scan_model(length, heads, groups, head_dim, n, A, D)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    scale = np.abs(want).max()
    assert np.abs(session.run(None, single)[0] - want).max() / scale < 1e-5
    if length in (1, 53):
        evaluated = onnx.reference.ReferenceEvaluator(model).run(None, single)[0]
        assert np.abs(evaluated - want).max() / scale < 1e-5
    shuffled = {**single, "B": single["B"][:, ::-1].copy()}
    if length > 1:  # the comparison can fail
        assert np.abs(session.run(None, shuffled)[0] - want).max() / scale > 1e-2


def test_the_model_is_one_that_old_runtimes_load() -> None:
    model = scan_model(20, 4, 1, 2, 3, -np.ones(4), np.ones(4))
    onnx.checker.check_model(model, full_check=True)
    assert (model.ir_version, model.opset_import[0].version) == (IR_VERSIONS[OPSET], OPSET) == (10, 21)
    assert {node.domain for node in model.graph.node} == {""}
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)


def test_split_sums_do_not_cancel() -> None:
    """Segment sums of steps of -400, where a difference of cumulative sums is off by a hundred times more."""
    v = -np.random.default_rng(0).uniform(0, 400, (1, 64)).astype(np.float32)
    g = Graph("sums")
    g.output(mamba2.segment_sums(g, g.input("v", "F32", [1, 64])), "s", "F32", [1, 64, 64])
    model = ir.to_proto(g.to_model(producer_version="test", metadata={}))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    exact = np.cumsum(v.astype(np.float64), -1)
    exact = exact[:, :, None] - exact[:, None, :]
    near = np.tril(np.ones((64, 64), bool)) & (exact[0] > -20)
    naive = np.cumsum(v, -1, dtype=np.float32)
    naive_error = np.abs((naive[:, :, None] - naive[:, None, :]) - exact)[0][near].max()
    error = np.abs(session.run(None, {"v": v})[0] - exact)[0][near].max()
    assert error < 4e-6
    assert naive_error > 100 * error


@pytest.mark.parametrize("length", [1, 2, 70])
@pytest.mark.parametrize(("heads", "groups", "head_dim"), [(4, 1, 2), (8, 2, 24), (8, 8, 5)])
def test_the_last_output_alone(length: int, heads: int, groups: int, head_dim: int) -> None:
    rng = np.random.default_rng(length)
    b, n = 2, 6
    A, D, bias = -rng.uniform(0.1, 2, heads), rng.standard_normal(heads), rng.standard_normal(heads)
    sizes = {"x": heads * head_dim, "dt_raw": heads, "B": groups * n, "C": groups * n}
    feeds = {name: rng.standard_normal((b, length, size)).astype(np.float32) for name, size in sizes.items()}
    feeds["dt_raw"] -= 4  # so that steps far back count
    limit = (0.01, 0.5)
    g = Graph("last")
    x, dt, B, C = (g.input(name, "F32", ["batch", "length", size]) for name, size in sizes.items())
    query = g.op("Slice", C, g.constant([-1]), g.constant([length]), g.constant([1]))
    y = mamba2.last_output(
        g, x, mamba2.softplus(g, dt, g.constant(bias, "F32"), limit), g.constant(A, "F32"), B, query,
        g.constant(D, "F32"), heads=heads, head_dim=head_dim, groups=groups, state=n,
    )  # fmt: skip
    g.output(y, "y", "F32", ["batch", 1, heads * head_dim])
    model = ir.to_proto(g.to_model(producer_version="test", metadata={}))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    wide = {name: array.astype(np.float64) for name, array in feeds.items()}
    want, _ = mamba2_scan(**wide, A=A, D=D, dt_bias=bias, groups=groups, dt_limit=limit)
    for evaluated in (session.run(None, feeds)[0], onnx.reference.ReferenceEvaluator(model).run(None, feeds)[0]):
        assert np.abs(evaluated - want[:, -1:]).max() / np.abs(want).max() < 1e-5
    if length > 2:  # the comparison can fail: a step far back that is forgotten
        feeds["x"][:, length // 2] = 0
        assert np.abs(session.run(None, feeds)[0] - want[:, -1:]).max() / np.abs(want).max() > 1e-3
