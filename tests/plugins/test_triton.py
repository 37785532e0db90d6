"""The Triton kernels against the float64 reference: in Triton's interpreter, or on a CUDA GPU where there is one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from matexport_plugins.mamba2_scan import triton_tiles
from op_cases import TINY, conv_inputs, scan_inputs
from triton_ops import CASES, DEVICE, IDS, TOLERANCES, conv_op, errors, scan_op, tensors

LONG = {**TINY, "heads": 3, "P": 24, "length": 300}
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # log2(0) of masked steps is meant


@pytest.mark.parametrize(("op", "case"), CASES, ids=IDS)
def test_against_the_reference(op: str, case: dict[str, Any]) -> None:
    of_y, of_state = errors(op, case, torch.float32)
    assert of_y < 1e-5  # false for NaN as well
    assert of_state < 1e-5


@pytest.mark.parametrize(("op", "case"), CASES[::3], ids=IDS[::3])
def test_float16_against_the_reference(op: str, case: dict[str, Any]) -> None:
    assert max(errors(op, case, torch.float16)) < TOLERANCES[torch.float16]


@pytest.mark.parametrize("segments", [2, 3, 16])
@pytest.mark.parametrize("optional", ["", "state mask z"])
def test_segments_of_a_sequence(segments: int, optional: str) -> None:
    assert max(errors("scan", {**LONG, "optional": optional}, torch.float32, segments=segments)) < 1e-5


@pytest.mark.parametrize("P", [16, 48])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_tile_that_may_be_chosen(P: int, dtype: torch.dtype) -> None:
    for tiles in triton_tiles.candidates(P, 16, 3, dtype == torch.float32, 80):
        case = {**TINY, "heads": 3, "P": P, "length": 140}
        assert max(errors("scan", case, dtype, tiles=tiles)) < TOLERANCES[dtype], tiles


def test_parts_of_a_wider_tensor_need_no_copy() -> None:
    inputs = tensors(scan_inputs(**TINY, optional=""), torch.float32)
    want = scan_op.mamba2_scan(**inputs)
    names = ("x", "B", "C", "dt_raw")
    wide = torch.cat([inputs[name] for name in names], -1)
    parts = dict(zip(names, wide.split([inputs[name].shape[-1] for name in names], -1), strict=True))
    for name, part in parts.items():
        assert scan_op.rows(part)[0].data_ptr() == part.data_ptr(), name
    for got, expected in zip(scan_op.mamba2_scan(**inputs | parts), want, strict=True):
        assert torch.equal(got, expected)
    one = {name: v[:, 7:8] for name, v in parts.items()}  # a step of a longer sequence: another stride
    got = scan_op.mamba2_scan(**inputs | one)
    expected = scan_op.mamba2_scan(**inputs | {name: v.contiguous() for name, v in one.items()})
    assert all(map(torch.equal, got, expected))


def test_a_step_may_write_over_its_state() -> None:
    inputs = tensors(scan_inputs(**TINY | {"length": 1}, optional="state"), torch.float32)
    y, state = scan_op.mamba2_scan(**inputs)
    again, written = scan_op.mamba2_scan(**inputs, out_state=inputs["state"])
    assert written.data_ptr() == inputs["state"].data_ptr()
    assert torch.equal(y, again)
    assert torch.equal(state, inputs["state"])
    longer = tensors(scan_inputs(**TINY, optional="state"), torch.float32)
    with pytest.raises(ValueError, match="length of 1"):
        scan_op.mamba2_scan(**longer, out_state=longer["state"])


def test_prefill_then_steps_is_prefill() -> None:
    case = {**TINY, "heads": 4, "groups": 2, "P": 24, "length": 40}
    inputs = tensors(scan_inputs(**case, optional=""), torch.float32)
    whole, final = scan_op.mamba2_scan(**inputs, groups=2)
    along = ("x", "dt_raw", "B", "C")
    state, ys = None, []
    for start, end in ((0, 37), (37, 38), (38, 39), (39, 40)):
        y, state = scan_op.mamba2_scan(**inputs | {k: inputs[k][:, start:end] for k in along}, groups=2, state=state)
        ys.append(y)
    assert (torch.cat(ys, 1) - whole).abs().max() < 1e-5 * whole.abs().max()
    assert (state - final).abs().max() < 1e-5 * final.abs().max()
    conv = tensors(conv_inputs(batch=2, length=9, channels=5, k=4, optional=""), torch.float32)
    whole, final = conv_op.causal_conv1d(**conv)
    first, state = conv_op.causal_conv1d(**conv | {"x": conv["x"][:, :2]})
    rest, state = conv_op.causal_conv1d(**conv | {"x": conv["x"][:, 2:]}, state=state)
    assert torch.equal(state, final)
    assert (torch.cat([first, rest], 1) - whole).abs().max() < 1e-6


@pytest.mark.parametrize("damaged", ["A", "C", "D", "dt_raw", "state", "x", "z", "mask"])
def test_the_comparison_can_fail(damaged: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One input that is a little wrong gives errors far above the tolerance."""
    right = scan_op.mamba2_scan

    def wrong(**inputs: Any) -> Any:
        value = inputs[damaged].clone()
        value[-1] = ~value[-1] if value.dtype == torch.bool else value[-1] * 1.01
        return right(**inputs | {damaged: value})

    monkeypatch.setattr(scan_op, "mamba2_scan", wrong)
    try:
        of_y, of_state = errors("scan", {**TINY, "decay": 0.1}, torch.float32)
    except AssertionError:  # a masked step was not zero
        assert damaged == "mask"
    else:
        assert max(of_y, of_state) > 1e-4


def refused(error: type[Exception], match: str, **changed: Any) -> None:
    inputs = tensors(scan_inputs(**TINY), torch.float32)
    with pytest.raises(error, match=match):
        scan_op.mamba2_scan(**inputs | changed)


def test_what_is_refused() -> None:
    refused(ValueError, "dt_raw: ", dt_raw=torch.zeros(2, 44, 2, device=DEVICE))
    refused(ValueError, "state: .*float32", state=torch.zeros(2, 2, 16, 4, device=DEVICE, dtype=torch.float16))
    refused(ValueError, "mask: .*bool", mask=torch.zeros(2, 45, device=DEVICE))
    refused(ValueError, "do not fit", groups=3)
    refused(ValueError, "expected contiguous", out_state=torch.zeros(2, 2, 4, 16, device=DEVICE))
    wide = torch.zeros(2, 45, 300, device=DEVICE)
    refused(NotImplementedError, "N <= 256", B=wide, C=wide, state=None)
    conv = tensors(conv_inputs(batch=2, length=9, channels=5, k=4), torch.float32)
    with pytest.raises(ValueError, match="weight: "):
        conv_op.causal_conv1d(**conv | {"weight": torch.zeros(4, 1, 4, device=DEVICE)})
    with pytest.raises(ValueError, match="k from 1 to 256"):
        conv_op.causal_conv1d(**conv | {"weight": torch.zeros(5, 1, 300, device=DEVICE)})


@pytest.mark.skipif(DEVICE == "cuda", reason="the GPU computes bfloat16 rightly: tests/gpu")
def test_the_interpreter_is_not_trusted_with_bfloat16() -> None:
    """It computes it wrongly without a word, so our functions refuse. Should it be right one day, this fails."""
    inputs = tensors(scan_inputs(**TINY, optional=""), torch.bfloat16)
    with pytest.raises(NotImplementedError, match="bfloat16"):
        scan_op.mamba2_scan(**inputs)
    conv = tensors(conv_inputs(batch=1, length=9, channels=5, k=4, optional=""), torch.bfloat16)
    with pytest.raises(NotImplementedError, match="bfloat16"):
        conv_op.causal_conv1d(**conv)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan_op, "INTERPRETED", False)
        of_y, _ = errors("scan", {**TINY, "P": 16, "optional": ""}, torch.bfloat16)
    assert not of_y < TOLERANCES[torch.bfloat16]


def test_the_rules_for_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [triton_tiles.head_tile(P, 128) for P in (1, 16, 24, 48, 64, 80, 128, 200)] == [
        16,
        16,
        32,
        64,
        64,
        32,
        64,
        64,
    ]
    assert triton_tiles.head_tile(64, 256) == 32
    # a batch of one fills an H200 (132 processors) with one head to a program, in segments if it is long enough
    h200 = 132
    monkeypatch.setattr(scan_op, "processors", lambda device: h200)
    cpu = torch.device("cpu")
    short, long = (scan_op.choose(1, n, 64, 1, 16, 128, torch.bfloat16, cpu) for n in (197, 16384))
    assert (short.heads, long.heads) == (1, 4)
    assert triton_tiles.useful_segments(64, 197, h200) == 1
    assert triton_tiles.useful_segments(16, 16384, h200) == 16
    assert triton_tiles.useful_segments(67, 16384, h200) == 1
    assert np.ptp([t.heads * t.p for t in triton_tiles.candidates(24, 128, 64, False, 90)]) == 96
