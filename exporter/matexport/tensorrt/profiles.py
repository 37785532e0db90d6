"""Optimisation profiles: the smallest, the best and the largest shape of every input of an engine."""

from __future__ import annotations

from collections.abc import Mapping

from matexport.errors import InputError

Shape = tuple[int, ...]
Profile = tuple[Shape, Shape, Shape]  # min, opt and max shape of one input
Axis = tuple[int, int, int]  # min, opt and max size of one dynamic axis

IMAGES, SEQUENCES = (1, 8, 64), (1, 1, 8)  # batch sizes: of what has no tokens, of what has
LENGTH, CONTEXT = (1, 128, 2048), 32768  # new tokens, and all tokens at most
PAST = "past_sequence"  # the axis of a cache


def profiles(
    inputs: Mapping[str, tuple[int | str, ...]], given: Mapping[str, Profile], where: str, flavour: str
) -> dict[str, dict[str, Profile]]:
    """The profiles of an engine, by name and input, in the engine's order.

    TensorRT tunes kernels for the best shapes of a profile, so a model over tokens that takes one as well as many gets
    two: `prefill` for any length and `decode` for one new token. Others get one, `default`; so does every model of
    TensorRT-RTX, which compiles kernels for the shapes that it meets when it runs. Inputs share their dynamic axes:
    what is given for one input counts for all.

    Args:
        inputs: the shape of each; dynamic axes are names.
        given: a user's shapes of some inputs.
        flavour: of TensorRT: see `matexport.targets.FLAVOURS`.

    Raises:
        InputError: shapes that do not fit the inputs, or each other.
    """
    own = _given_axes(inputs, given, where)
    axes = {**_defaults(inputs), **own}
    if "sequence" in axes and "total_sequence" in axes:
        low, best, high = axes["sequence"]
        if "total_sequence" not in own:
            axes["total_sequence"] = low, best, max(CONTEXT, high)
        for new, every in zip(axes["sequence"], axes["total_sequence"], strict=True):
            if every < new:
                what = f"total_sequence {every} is shorter than sequence {new}, which it includes"
                raise InputError(what, where=where, fix="give larger shapes of attention_mask")
    found = {"default": axes}
    if flavour == "TensorRT" and "sequence" in axes and axes["sequence"][0] == 1 < axes["sequence"][2]:
        found = {"prefill": axes, "decode": {**axes, "sequence": (1, 1, 1)}}
    if PAST in axes and PAST not in own:  # a cache of the tokens before the new ones
        found = {name: {**sizes, PAST: _past(sizes)} for name, sizes in found.items()}
    return {name: {i: _shapes(shape, sizes) for i, shape in inputs.items()} for name, sizes in found.items()}


def profiles_json(found: Mapping[str, Mapping[str, Profile]]) -> dict[str, dict[str, dict[str, Shape]]]:
    """Profiles as manifests have them."""
    return {
        profile: {name: dict(zip(("min", "opt", "max"), shapes, strict=True)) for name, shapes in by_input.items()}
        for profile, by_input in found.items()
    }


def _past(axes: Mapping[str, Axis]) -> Axis:
    """The length of a cache: all tokens but the new ones, and 0 before the first one."""
    (short, best, _), (_, best_total, longest) = axes["sequence"], axes["total_sequence"]
    return 0, best_total - best, longest - short


def _defaults(inputs: Mapping[str, tuple[int | str, ...]]) -> dict[str, Axis]:
    names = {size for shape in inputs.values() for size in shape if isinstance(size, str)}
    batch = SEQUENCES if "sequence" in names else IMAGES
    return {name: LENGTH if name.endswith("sequence") else batch for name in sorted(names)}


def _given_axes(
    inputs: Mapping[str, tuple[int | str, ...]], given: Mapping[str, Profile], where: str
) -> dict[str, Axis]:
    """The dynamic axes as a user's shapes have them."""
    axes: dict[str, tuple[Axis, str]] = {}
    for name, shapes in given.items():
        if name not in inputs:
            raise InputError(f"has no input {name!r}", where=where, fix=f"its inputs are {', '.join(inputs)}")
        shape = inputs[name]
        for one in shapes:
            if len(one) != len(shape) or any(isinstance(n, int) and n != m for n, m in zip(shape, one, strict=True)):
                wanted, got = ("x".join(map(str, sizes)) for sizes in (shape, one))
                raise InputError(f"input {name!r} is {wanted}, not {got}", where=where, fix="give such shapes")
        for i, axis in enumerate(shape):
            if isinstance(axis, str):
                low, best, high = (one[i] for one in shapes)
                least = 0 if axis == PAST else 1
                if not least <= low <= best <= high:
                    what = f"axis {axis!r} of input {name!r} is {low}, {best} and {high} at least, at best, at most"
                    raise InputError(what, where=where, fix=f"give shapes that grow, from {least}")
                known, other = axes.setdefault(axis, ((low, best, high), name))
                if known != (low, best, high):
                    what = f"inputs {other!r} and {name!r} differ in the axis that they share, {axis!r}"
                    raise InputError(what, where=where, fix="give the same sizes for both, or leave one out")
    return {axis: sizes for axis, (sizes, _) in axes.items()}


def _shapes(shape: tuple[int | str, ...], axes: Mapping[str, Axis]) -> Profile:
    low, best, high = (tuple(n if isinstance(n, int) else axes[n][i] for n in shape) for i in range(3))
    return low, best, high
