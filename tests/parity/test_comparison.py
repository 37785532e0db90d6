from __future__ import annotations

import json

import numpy as np
import pytest

from matexport.parity.comparison import TOLERANCES, Comparison, compare, compare_stored
from matexport.parity.report import Report

RNG = np.random.default_rng(0)
WANT = RNG.standard_normal((4, 10)).astype(np.float32)


def test_equal_arrays() -> None:
    found = compare("y", "checkpoint", WANT.copy(), WANT)
    assert (found.passed, found.max_abs, found.max_rel, found.top1, found.kl) == (True, 0.0, 0.0, 1.0, 0.0)
    assert found.cosine == pytest.approx(1.0)


def test_one_bit_fails_where_bits_are_promised() -> None:
    got = WANT.copy()
    got[2, 3] = np.nextafter(got[2, 3], np.float32(np.inf))
    assert not compare("y", "checkpoint", got, WANT).passed
    assert compare("y", "onnx", got, WANT).passed


@pytest.mark.parametrize(("factor", "passes"), [(0.9, True), (1.1, False)])
def test_the_tolerance_is_where_it_says(factor: float, passes: bool) -> None:
    got = WANT.astype(np.float64)
    got[0, 0] += factor * TOLERANCES["onnx"] * np.abs(WANT).max()
    found = compare("y", "onnx", got, WANT)
    assert found.passed is passes
    assert found.max_rel == pytest.approx(factor * TOLERANCES["onnx"], rel=1e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_never_passes(value: float) -> None:
    got, want = WANT.copy(), WANT.copy()
    got[0, 0] = want[0, 0] = value
    for a, b in ((got, want), (got, WANT), (WANT, want)):
        for kind in ("checkpoint", "onnx"):
            found = compare("y", kind, a, b)
            assert not found.passed
            assert found.detail == "not finite"


def test_other_shapes_never_pass() -> None:
    assert not compare("y", "onnx", WANT[:1], WANT).passed
    assert not compare("y", "onnx", WANT[:0], WANT[:0]).passed
    assert not compare("y", "onnx", WANT * 0 + 1, WANT * 0).passed


def test_statistics_against_scipy() -> None:
    from scipy.special import rel_entr, softmax

    got = WANT + 0.1 * RNG.standard_normal(WANT.shape)
    found = compare("y", "onnx", got, WANT)
    kl = rel_entr(softmax(WANT.astype(np.float64), -1), softmax(got, -1)).sum(-1).mean()
    assert found.kl == pytest.approx(kl, rel=1e-6)
    assert found.top1 == (got.argmax(-1) == WANT.argmax(-1)).mean()


def test_reports() -> None:
    good = compare("y", "onnx", WANT, WANT)
    bad = compare("z", "onnx", WANT * 1.1, WANT)
    worse = compare("w", "onnx", WANT * 2, WANT)
    report = Report("out", "source", "half", (good, bad, worse))
    assert not report.passed
    assert report.worst is not None
    assert report.worst.name == "w"
    assert "FAILED" in report.to_markdown()
    assert set(report.to_json()["comparisons"][0]) == {
        "name", "kind", "max_abs", "max_rel", "cosine", "top1", "kl", "tolerance", "passed",
    }  # fmt: skip
    assert Report("out", "source", "half", (good,)).passed
    assert not Report("out", "source", "half", ()).passed  # nothing compared is nothing proven
    missing = Comparison("t", "provenance", False, 0.0, detail="the tensor is missing")
    assert Report("out", "source", "half", (worse, missing)).worst == missing


def test_quantised_outputs_are_measured_by_what_their_weights_lose() -> None:
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((3, 50))
    want = truth + 0.1 * rng.standard_normal(truth.shape)
    near, far = (want + share * (want - truth) for share in (0.9, 1.1))
    found = [compare_stored("logits", "onnx int4-block", got, want, truth) for got in (near, far)]
    assert [c.passed for c in found] == [True, False]
    assert found[1].of_loss == pytest.approx(1.1)
    assert "1 x loss" in Report("a", "b", "c", tuple(found)).to_markdown()
    # nothing is lost: then rounding alone may differ
    same = compare_stored("logits", "onnx int4-block", want * (1 + 1e-6), want, want, 1e-5)
    assert same.passed
    assert not compare_stored("logits", "onnx int4-block", want * (1 + 1e-4), want, want, 1e-5).passed
    assert not compare_stored("logits", "onnx int4-block", want * np.nan, want, truth).passed
    json.dumps(same.to_json(), allow_nan=False)
