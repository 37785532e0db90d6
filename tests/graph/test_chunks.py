"""The scan in ai.onnx operators against the float64 reference, in ONNX Runtime and ONNX's own evaluator."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import onnxruntime
import pytest

from matexport.graph import chunks, mamba2, stateful
from matexport.graph.builder import IR_VERSIONS, Graph
from matexport.graph.options import OPSET
from matexport_plugins.mamba2_scan.reference import mamba2_scan

Arrays = dict[str, np.ndarray]


def scan_model(length: int | None, heads: int, groups: int, head_dim: int, state: int, A: np.ndarray) -> bytes:
    """Of a known length and without states, or of any length and with."""
    g, time = Graph("scan"), length or "time"
    sizes = {"x": heads * head_dim, "dt_raw": heads, "B": groups * state, "C": groups * state}
    x, dt, B, C = (g.input(name, "F32", ["batch", time, size]) for name, size in sizes.items())
    D, bias = (g.input(name, "F32", [heads]) for name in ("D", "dt_bias"))
    past = None if length else g.input("state", "F32", ["batch", heads, state, head_dim])
    pieces = chunks.cut(g, length) if length else chunks.cut_any(g, g.op("Shape", x, start=1, end=2))
    y, final = stateful.mamba2_scan(
        g, "stock", x, dt, g.constant(A, "F32"), B, C, D, bias, past, None,
        heads=heads, head_dim=head_dim, groups=groups, state=state, dt_limit=(0.0, np.inf), chunks=pieces,
    )  # fmt: skip
    g.output(y, "y", "F32", ["batch", time, heads * head_dim])
    assert (final is None) == (past is None)
    if final is not None:
        g.output(final, "final_state", "F32", ["batch", heads, state, head_dim])
    return bytes(ir.to_proto(g.to_model(producer_version="test", metadata={})).SerializeToString())


def evaluated(model: bytes, feeds: Arrays) -> list[np.ndarray]:
    found: list[np.ndarray] = onnx.reference.ReferenceEvaluator(onnx.load_from_string(model)).run(None, feeds)
    return found


def in_onnxruntime(model: bytes, feeds: Arrays) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(None, feeds)
    return found


def inputs(length: int, heads: int, groups: int, head_dim: int, n: int = 6, b: int = 2) -> tuple[Arrays, np.ndarray]:
    """Steps whose decay underflows, whose sums are far beyond 2^16 in the whole sequence, then weak ones; and A."""
    rng = np.random.default_rng(length)
    dt = np.logaddexp(0, 4 * rng.standard_normal((b, length, heads)))
    dt[:, : length // 2] = 25
    dt[:, length // 2 :] *= 0.01
    feeds = {
        "x": rng.standard_normal((b, length, heads * head_dim)),
        "dt_raw": np.log(np.expm1(dt)),
        "B": rng.standard_normal((b, length, groups * n)),
        "C": rng.standard_normal((b, length, groups * n)),
        "D": rng.standard_normal(heads),
        "dt_bias": 0.1 * rng.standard_normal(heads),
        "state": rng.standard_normal((b, heads, n, head_dim)),
    }
    return {name: array.astype(np.float32) for name, array in feeds.items()}, -rng.uniform(1, 16, heads)


def off(got: list[np.ndarray], want: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(got, want, strict=True))


def reference(feeds: Arrays, A: np.ndarray, groups: int) -> list[np.ndarray]:
    wide = {name: array.astype(np.float64) for name, array in feeds.items()}
    return list(mamba2_scan(**wide, A=A.astype(np.float32), groups=groups))


# of one chunk, of full ones, and one more; chunks are of equal length, so that little is filled up
LENGTHS = [1, 2, 3, 4, 5, 63, 64, 65, 127, 128, 197, 389]


@pytest.mark.parametrize("known", [True, False], ids=["known", "any"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("heads", "groups", "head_dim"), [(4, 1, 2), (8, 2, 24), (8, 8, 5)])
def test_against_float64(length: int, heads: int, groups: int, head_dim: int, known: bool) -> None:
    feeds, A = inputs(length, heads, groups, head_dim)
    if known:
        del feeds["state"]
    model = scan_model(length if known else None, heads, groups, head_dim, 6, A)
    want = reference(feeds, A, groups)[: 1 if known else 2]
    assert off(in_onnxruntime(model, feeds), want) < 1e-5
    if length in (1, 5, 65):
        assert off(evaluated(model, feeds), want) < 1e-5
    if length > 1:  # the comparison can fail
        shuffled = {**feeds, "B": feeds["B"][:, ::-1].copy()}
        assert off(in_onnxruntime(model, shuffled), want) > 1e-2


@pytest.mark.parametrize("length", [1, 5, 130])
def test_the_state_before_counts(length: int) -> None:
    feeds, A = inputs(length, 4, 2, 3)
    feeds["dt_raw"] = feeds["dt_raw"] * 0 - 9  # weak decay: a state lasts
    model, want = scan_model(None, 4, 2, 3, 6, A), reference(feeds, A, 2)
    assert off(in_onnxruntime(model, feeds), want) < 1e-5
    assert off(in_onnxruntime(model, {**feeds, "state": 0 * feeds["state"]}), want) > 1e-1


@pytest.mark.parametrize("length", [5, 70])
def test_a_head_that_forgets_all_is_no_nan(length: int) -> None:
    """A is minus infinity where exp(A_log) is above what float32 holds."""
    feeds, A = inputs(length, 4, 2, 3)
    A[1], forgetful = -np.inf, A.copy()
    forgetful[1] = -1e30
    model = scan_model(None, 4, 2, 3, 6, A)
    assert off(in_onnxruntime(model, feeds), reference(feeds, forgetful, 2)) < 1e-5


@pytest.mark.parametrize("most", [1, 2, 3])
def test_longer_chunks_where_there_would_be_too_many(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """A length that would need more has longer chunks."""
    monkeypatch.setattr(chunks, "MOST", most)
    g = Graph("any")
    found = chunks.cut_any(g, g.input("length", "I64", [1])).inside
    g.output(found.after, "after", "F32", [1, 1, 1, "l", "l"])
    g.output(found.until, "until", "F32", [1, 1, 1, "l", "l"])
    model = ir.to_proto(g.to_model(producer_version="test", metadata={})).SerializeToString()
    for length in (1, 7, 64, 65, 300, 1000):
        after, until = in_onnxruntime(model, {"length": np.array([length])})
        pieces = chunks.cut(Graph("known"), length)
        assert isinstance(pieces.count, int)
        assert isinstance(pieces.steps, int)
        assert pieces.count <= most
        assert until.shape == (1, 1, 1, pieces.steps, pieces.steps)  # both ways of cutting agree
        assert np.array_equal(until, np.tril(np.ones_like(until)))
        assert np.array_equal(after, np.tril(until, -1))
        assert 0 <= pieces.count * pieces.steps - length < pieces.steps
    feeds, A = inputs(200, 4, 2, 3)
    assert off(in_onnxruntime(scan_model(None, 4, 2, 3, 6, A), feeds), reference(feeds, A, 2)) < 1e-5


@pytest.mark.parametrize("length", [20, None])
def test_the_model_is_one_that_old_runtimes_load(length: int | None) -> None:
    model = onnx.load_from_string(scan_model(length, 4, 1, 2, 3, -np.ones(4)))
    onnx.checker.check_model(model, full_check=True)
    assert (model.ir_version, model.opset_import[0].version) == (IR_VERSIONS[OPSET], OPSET) == (10, 21)
    assert {node.domain for node in model.graph.node} == {""}
    assert not {"Scan", "Loop", "If"} & {node.op_type for node in model.graph.node}
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)


def test_decays_do_not_cancel() -> None:
    """Between weak steps after ones of -400, where differences of cumulative sums are off a thousand times more."""
    v = -np.random.default_rng(0).uniform(0, 400, (1, 64)).astype(np.float32)
    v[:, 32:] *= 1e-3
    g = Graph("sums")
    triangle = chunks.cut(g, 64).inside
    a = g.input("a", "F32", [1, 1, 1, 64, 1])
    g.output(chunks.segment_decays(g, a, triangle), "decays", "F32", [1, 1, 1, 64, 64])
    model = ir.to_proto(g.to_model(producer_version="test", metadata={}))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    exact = np.cumsum(v.astype(np.float64), -1)
    kept = np.tril(np.ones((64, 64), bool))
    exact = np.exp(np.where(kept, exact[:, :, None] - exact[:, None, :], 0))[0]
    sums = np.cumsum(v, -1, dtype=np.float32)
    naive = np.exp(np.where(kept, sums[:, :, None] - sums[:, None, :], 0))[0]
    error = np.abs(session.run(None, {"a": v.reshape(1, 1, 1, 64, 1)})[0].squeeze() - exact).max()
    assert error < 1e-6
    assert np.abs(naive - exact).max() > 1000 * error


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
