"""The deployment targets: what an artefact for each of them is."""

from __future__ import annotations

from dataclasses import dataclass

from matexport.errors import UsageError


@dataclass(frozen=True)
class Target:
    """One deployment target.

    Attributes:
        kind: the artefact, "onnx" or "engine".
        form: how the scan appears in the graph; "stock" is ai.onnx operators alone.
        dtype: what float weights are cast to.
    """

    name: str
    kind: str
    form: str
    dtype: str


TARGETS = {
    target.name: target
    for target in (
        Target("portable", "onnx", "stock", "F32"),  # any ONNX runtime, onnxruntime >= 1.20
        Target("rtx", "engine", "stock", "F32"),  # TensorRT-RTX: built anywhere, runs on RTX GPUs
        Target("tensorrt", "engine", "stock", "F32"),  # TensorRT, on the GPU of this machine
    )
}
FORMS = ("stock",)


def target_named(name: str, kind: str, form: str | None = None) -> Target:
    """The target called `name`. Raises UsageError if it is of another kind or cannot run `form`."""
    fits = [target.name for target in TARGETS.values() if target.kind == kind]
    if name not in fits:
        raise UsageError(f"unknown target {name!r}", fix=f"one of {', '.join(fits)}")
    target = TARGETS[name]
    if form is not None and form != target.form:
        raise UsageError(f"target {name!r} cannot run form {form!r}", fix=f"use --form {target.form}")
    return target
