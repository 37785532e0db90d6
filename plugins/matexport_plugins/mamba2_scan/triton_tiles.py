"""How Mamba2Scan is cut for a GPU, by rules on sizes alone: nothing here needs Triton or PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

MAX_SEGMENTS = 16


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The next one from n on."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class Tiles:
    """What one program takes: `Q` steps at a time of `heads` heads, `p` columns each; `warps` and pipeline `stages`."""

    Q: int
    heads: int
    p: int
    warps: int
    stages: int


def step_tile(heads: int, P: int, processors: int) -> int:
    """Columns of a program of the step kernel: few where there would be too few programs, never below 64 bytes."""
    PT = min(64, max(16, power_of_2(P)))
    while PT > 16 and heads * ceil_div(P, PT) < 2 * processors:
        PT //= 2
    return int(PT)


def head_tile(P: int, N: int) -> int:
    """Columns of a head that a program takes: the most that pad little."""
    fit = [PT for PT in (64, 32, 16) if PT * N <= 64 * 128] or [16]
    padded = {PT: ceil_div(P, PT) * PT for PT in fit}
    return next(PT for PT in fit if 3 * padded[PT] <= 4 * min(padded.values()))


def useful_segments(programs: int, length: int, processors: int) -> int:
    """A segment costs a second pass over x and B: worth it only where most of the GPU would idle otherwise."""
    if 2 * programs > processors:
        return 1
    return max(1, min(MAX_SEGMENTS, length // 256, 2 * processors // programs))


def candidates(P: int, N: int, share: int, float32: bool, capability: int) -> list[Tiles]:
    """The tiles worth measuring, the likeliest first; `share` is the number of heads in a group."""
    p = head_tile(P, N)
    columns = max(p, 64 if N <= 128 else 32)
    if float32:
        shapes = [(columns // 2, 16, 4, 2), (columns // 4, 16, 4, 2), (columns, 16, 8, 2)]
    else:
        shapes = [
            (columns, 64, 4, 2), (columns, 64, 4, 3), (columns, 64, 8, 2), (2 * columns, 64, 8, 2),
            (columns, 128, 8, 2), (columns, 32, 4, 3), (columns // 2, 64, 4, 2),
        ]  # fmt: skip
        if capability // 10 not in (9, 10, 11):  # without Hopper's products from shared memory, registers are short
            shapes.insert(0, (columns, 64, 8, 2))
    found = [
        Tiles(Q, min(max(1, c // p), power_of_2(share)), min(p, max(16, c)), warps, stages)
        for c, Q, warps, stages in shapes
    ]
    return list(dict.fromkeys(found))


def workspace_size(
    batch: int, length: int, heads: int, groups: int, P: int, N: int, float32: bool, most_processors: int = 256
) -> int:
    """Float32 elements that `mamba2_scan` needs beside its outputs, at most, for up to this batch and length.

    Args:
        most_processors: of any GPU that this is for; an H200 has 132. With more, a sequence is cut into fewer segments
            than it could be.
    """
    if length == 1:
        return 0
    choices = [tiles for target in (80, 90) for tiles in candidates(P, N, heads // groups, float32, target)]
    parts, longest = 3 if float32 else 2, max(tiles.Q for tiles in choices)
    sums = parts * batch * heads * ceil_div(length, longest) * longest
    fewest = min(groups * ceil_div(heads // groups, t.heads) * ceil_div(P, t.p) for t in choices)  # a sequence
    cuts = min(batch * (min(MAX_SEGMENTS, max(1, length // 256)) - 1), 2 * most_processors // fewest)
    return int(sums + cuts * heads * (N * P + 1))
