"""Profiles: the defaults, a user's shapes, and shapes that do not fit."""

from __future__ import annotations

import pytest

from matexport.errors import InputError
from matexport.tensorrt.profiles import Profile, profiles

IMAGES: dict[str, tuple[int | str, ...]] = {"x": ("batch", 3, 8)}
TOKENS: dict[str, tuple[int | str, ...]] = {
    "ids": ("batch", "sequence"), "mask": ("batch", "total_sequence"), "state": ("batch", 4, 2)
}  # fmt: skip


def test_of_images() -> None:
    assert profiles(IMAGES, {}, "m", "TensorRT") == {"default": {"x": ((1, 3, 8), (8, 3, 8), (64, 3, 8))}}


def test_of_tokens() -> None:
    found = profiles(TOKENS, {}, "m", "TensorRT")
    assert list(found) == ["prefill", "decode"]
    assert found["prefill"] == {
        "ids": ((1, 1), (1, 128), (8, 2048)), "mask": ((1, 1), (1, 128), (8, 32768)),
        "state": ((1, 4, 2), (1, 4, 2), (8, 4, 2)),
    }  # fmt: skip
    assert found["decode"] == {**found["prefill"], "ids": ((1, 1), (1, 1), (8, 1))}
    assert profiles(TOKENS, {}, "m", "TensorRT-RTX") == {"default": found["prefill"]}


def test_a_given_axis_counts_for_all_inputs() -> None:
    found = profiles(TOKENS, {"ids": ((2, 16), (4, 64), (6, 50000))}, "m", "TensorRT")
    assert found == {
        "default": {  # never one token, so no profile for it
            "ids": ((2, 16), (4, 64), (6, 50000)), "mask": ((2, 16), (4, 64), (6, 50000)),
            "state": ((2, 4, 2), (4, 4, 2), (6, 4, 2)),
        }
    }  # fmt: skip


def test_of_a_cache() -> None:
    """It holds the tokens that are not new, none at first."""
    inputs: dict[str, tuple[int | str, ...]] = {**TOKENS, "state": ("batch", 4, "past_sequence")}
    found = profiles(inputs, {}, "m", "TensorRT")
    assert found["prefill"]["state"] == ((1, 4, 0), (1, 4, 0), (8, 4, 32767))
    assert found["decode"]["state"] == ((1, 4, 0), (1, 4, 127), (8, 4, 32767))
    own: Profile = ((1, 4, 0), (2, 4, 3), (2, 4, 9))
    assert profiles(inputs, {"state": own}, "m", "TensorRT")["decode"]["state"] == own


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"y": ((1,), (1,), (1,))}, "has no input 'y'"),
        ({"ids": ((1,), (1,), (1,))}, "input 'ids' is batchxsequence, not 1"),
        ({"state": ((1, 4, 2), (1, 4, 3), (1, 4, 2))}, "input 'state' is batchx4x2, not 1x4x3"),
        ({"ids": ((1, 9), (1, 8), (1, 10))}, "'sequence' of input 'ids' is 9, 8 and 10"),
        ({"ids": ((0, 1), (1, 1), (1, 1))}, "from 1"),
        ({"ids": ((1, 1),) * 3, "mask": ((2, 2),) * 3}, "'ids' and 'mask' differ in the axis that they share, 'batch'"),
        ({"ids": ((1, 9),) * 3, "mask": ((1, 8),) * 3}, "total_sequence 8 is shorter than sequence 9"),
    ],
)
def test_what_does_not_fit(given: dict[str, Profile], message: str) -> None:
    with pytest.raises(InputError, match=message):
        profiles(TOKENS, given, "m", "TensorRT")
