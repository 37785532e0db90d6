"""Plans: for every output tensor, which part of which source tensor it is. Data only; no weight is read.

A *view* reshapes a source tensor to `view_shape`, takes index ranges along each axis and reshapes the
result to `shape`. Everything a slice does to a weight is a view (and a cast, where one is asked for).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from matexport.errors import InputError
from matexport.tensors import DTYPES, FLOATS, Tensor

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class View:
    """A sub-array of one source tensor.

    Attributes:
        source: name of the source tensor.
        view_shape: the shape it is reshaped to first (its own, but for flattened axes).
        ranges: along each axis of `view_shape` the half-open index ranges taken, in order.
        shape: the shape of the result.
    """

    source: str
    view_shape: tuple[int, ...]
    ranges: tuple[Ranges, ...]
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.ranges) != len(self.view_shape):
            raise ValueError(f"{self.source}: {len(self.ranges)} range lists for {len(self.view_shape)} axes")
        for length, ranges in zip(self.view_shape, self.ranges, strict=True):
            if any(not 0 <= start < stop <= length for start, stop in ranges):
                raise ValueError(f"{self.source}: ranges {ranges} outside an axis of {length}")
        if math.prod(self.taken) != math.prod(self.shape):
            raise ValueError(f"{self.source}: {self.taken} elements taken cannot have shape {self.shape}")

    @property
    def taken(self) -> tuple[int, ...]:
        """The lengths along the axes of `view_shape` after the ranges were taken."""
        return tuple(sum(stop - start for start, stop in ranges) for ranges in self.ranges)

    def of(self, array: np.ndarray) -> np.ndarray:
        """The view of an array in memory: the definition, in numpy."""
        array = array.reshape(self.view_shape)
        for axis, ranges in enumerate(self.ranges):
            if ranges != ((0, self.view_shape[axis]),):
                index = np.concatenate([np.arange(start, stop) for start, stop in ranges] or [np.arange(0)])
                array = np.take(array, index, axis)
        return array.reshape(self.shape)

    def restrict(self, axis: int, *chosen: tuple[int, int]) -> View:
        """The ranges of indices `chosen` along `axis` of this view's result, in order (result axes = view axes)."""
        if self.taken != self.shape:
            raise ValueError(f"{self.source}: a reshaped result cannot be restricted by axis")
        axis %= len(self.shape)
        ranges = list(self.ranges)
        ranges[axis] = _through(self.ranges[axis], chosen)
        shape = (*self.shape[:axis], sum(stop - start for start, stop in chosen), *self.shape[axis + 1 :])
        return replace(self, ranges=tuple(ranges), shape=shape)


@lru_cache(8192)  # every row of a table takes most tensors whole
def whole(tensor: Tensor) -> View:
    """The view that takes everything."""
    return View(tensor.name, tensor.shape, tuple(((0, n),) if n else () for n in tensor.shape), tensor.shape)


def part(tensor: Tensor, axis: int, ranges: Iterable[tuple[int, int]]) -> View:
    """The view that takes ranges along one axis and everything along the others."""
    full = whole(tensor)
    merged = merge(ranges)
    length = sum(stop - start for start, stop in merged)
    return View(
        tensor.name,
        tensor.shape,
        (*full.ranges[:axis], merged, *full.ranges[axis + 1 :]),
        (*tensor.shape[:axis], length, *tensor.shape[axis + 1 :]),
    )


def merge(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """The same indices in the same order, with touching ranges joined and empty ones dropped."""
    merged: list[tuple[int, int]] = []
    for start, stop in ranges:
        if start == stop:
            continue
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return tuple(merged)


def blocks(indices: Iterable[int], size: int = 1, offset: int = 0) -> Ranges:
    """Ranges of the blocks with these indices, each `size` long, the first one starting at `offset`."""
    return merge((offset + i * size, offset + (i + 1) * size) for i in indices)


def compose(outer: View, inner: View) -> View:
    """The view of `inner`'s source that equals `outer` taken of `inner`'s result: a slice of a slice.

    Raises:
        InputError: the two are cut along different axes of the same tensor.
    """
    if math.prod(outer.view_shape) != math.prod(inner.shape):
        raise ValueError(f"{inner.source}: {outer.view_shape} is no shape of {inner.shape}")
    if outer.taken == outer.view_shape and all(len(ranges) == 1 for ranges in outer.ranges):
        return replace(inner, shape=outer.shape)
    if inner.taken == inner.view_shape and all(len(ranges) == 1 for ranges in inner.ranges):
        return replace(outer, source=inner.source)
    if outer.view_shape != inner.taken:
        fix = "slice the original checkpoint instead of the sliced one"
        raise InputError("two slices in a row cut this tensor along different axes", where=inner.source, fix=fix)
    ranges = tuple(_through(low, up) for low, up in zip(inner.ranges, outer.ranges, strict=True))
    return View(inner.source, inner.view_shape, ranges, outer.shape)


def _through(inner: Ranges, outer: Ranges) -> Ranges:
    """Ranges of positions in `inner`'s result, as ranges of `inner`'s own indices."""
    found: list[tuple[int, int]] = []
    for start, stop in outer:
        position = 0
        for begin, end in inner:
            low, high = max(start, position), min(stop, position + end - begin)
            if low < high:
                found.append((begin + low - position, begin + high - position))
            position += end - begin
    return merge(found)


# --------------------------------------------------------------------------------------------- plans
def _retyped(config: dict[str, Any], name: str) -> dict[str, Any]:
    """A config.json whose dtypes, of the model and of its parts, are `name`."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            value = name
        elif key.endswith("_config") and isinstance(value, dict):
            value = _retyped(value, name)
        found[key] = value
    return found


@dataclass(frozen=True)
class PlannedTensor:
    """One output tensor: a view, stored as `dtype` (another than the source's means a cast)."""

    dtype: str
    view: View

    @property
    def shape(self) -> tuple[int, ...]:
        return self.view.shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][0]

    def to_json(self) -> dict[str, Any]:
        view = self.view
        ranges = [[list(r) for r in axis] for axis in view.ranges]
        return {
            "dtype": self.dtype,
            "source": view.source,
            "view_shape": list(view.view_shape),
            "ranges": ranges,
            "shape": list(view.shape),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> PlannedTensor:
        """Raises ValueError, KeyError or TypeError for anything that `to_json` did not write."""
        ranges = tuple(tuple((int(start), int(stop)) for start, stop in axis) for axis in data["ranges"])
        shapes = (tuple(int(n) for n in data[key]) for key in ("view_shape", "shape"))
        if data["dtype"] not in DTYPES:
            raise ValueError(f"unknown dtype {data['dtype']!r}")
        view_shape, shape = shapes
        return cls(data["dtype"], View(str(data["source"]), view_shape, ranges, shape))


@dataclass(frozen=True)
class KeptLayer:
    """One layer of a slice: its index in the source and its nested width (the family's unit)."""

    source: int
    width: int


@dataclass(frozen=True)
class Plan:
    """A slice, worked out: what `slice`, `onnx` and `verify` start from.

    Attributes:
        family: name of the nested architecture.
        name: the row's name.
        layers: the kept layers.
        skipped: the source's other layers.
        tensors: output name -> what it is, in the order in which they are written.
        config: the new `config.json`.
        effective_parameters: the count that has to be in fast memory (the family decides).
        tower_parameters: of what is stored beside the nested model and copied whole (vision, audio).
        dtype: what the float tensors are cast to; None leaves each as it is.
        options: what was done to the plan beside the row (see `Family.OPTIONS`), by name.
        notes: what a user should know; nothing that stops the slice.
    """

    family: str
    name: str
    layers: tuple[KeptLayer, ...]
    skipped: tuple[int, ...]
    tensors: dict[str, PlannedTensor]
    config: dict[str, Any]
    effective_parameters: int
    tower_parameters: int = 0
    options: tuple[str, ...] = ()
    dtype: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Number of stored elements."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors (a file adds its header)."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def model_parameters(self) -> int:
        """Number of stored elements without the towers."""
        return self.parameters - self.tower_parameters

    def cast(self, dtype: str | None) -> Plan:
        """The same plan with every float tensor stored as `dtype`, and a config.json that says so."""
        if dtype is None:
            return self
        tensors = {n: PlannedTensor(dtype if t.dtype in FLOATS else t.dtype, t.view) for n, t in self.tensors.items()}
        return replace(self, tensors=tensors, dtype=dtype, config=_retyped(self.config, FLOATS[dtype]))

    def to_json(self) -> dict[str, Any]:
        return {
            "family": self.family,
            "name": self.name,
            "layers": [{"source": layer.source, "width": layer.width} for layer in self.layers],
            "skipped": list(self.skipped),
            "options": list(self.options),
            "dtype": self.dtype,
            "tensors": {name: tensor.to_json() for name, tensor in self.tensors.items()},
            "config": self.config,
            "parameters": self.parameters,
            "model_parameters": self.model_parameters,
            "effective_parameters": self.effective_parameters,
            "bytes": self.nbytes,
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """The plan that `to_json` wrote. Raises ValueError, KeyError or TypeError for anything else."""
        return cls(
            family=str(data["family"]),
            name=str(data["name"]),
            layers=tuple(KeptLayer(int(layer["source"]), int(layer["width"])) for layer in data["layers"]),
            skipped=tuple(int(layer) for layer in data["skipped"]),
            tensors={name: PlannedTensor.from_json(tensor) for name, tensor in data["tensors"].items()},
            config=dict(data["config"]),
            effective_parameters=int(data["effective_parameters"]),
            tower_parameters=int(data["parameters"]) - int(data["model_parameters"]),
            options=tuple(map(str, data["options"])),
            dtype=data["dtype"],
            notes=tuple(map(str, data["notes"])),
        )
