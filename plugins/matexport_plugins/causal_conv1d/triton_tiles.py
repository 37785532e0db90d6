"""How CausalConv1d is cut for a GPU; nothing here needs Triton or PyTorch."""

from __future__ import annotations


def workspace_size(batch: int, length: int) -> int:
    """Float32 elements that a call with a mask needs beside its outputs; one without needs none."""
    return 2 * batch * length


def conv_tiles(length: int) -> tuple[int, int]:
    """Steps and channels of a program: 256 bytes or more of a row, and 32 values to a thread at most."""
    BT = min(16, 1 << (length - 1).bit_length())
    return BT, 256 if BT > 1 else 128
