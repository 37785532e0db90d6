"""The deployment targets: what an artefact for each of them is."""

from __future__ import annotations

from dataclasses import dataclass, replace

from matexport.errors import UsageError


@dataclass(frozen=True)
class Target:
    """One deployment target.

    Attributes:
        kind: the artefact: "onnx", "engine", or "kit", with which an engine is built and checked on another machine.
        forms: how the scan may appear in the graph, the default first: "custom" is our ops, with functions for where
            no kernel is registered, "contrib" ONNX Runtime's, "stock" ai.onnx operators alone.
        dtype: what float weights are cast to.
        typed: whether `dtype` is also what products are computed in; else that is float32, however weights are stored.
        folder: where in the artefact the model lies.
        split: whether large embeddings are in a graph of their own.
        max_file: the most bytes of weights in one file; None for any number.
        flavour: of TensorRT, which builds the engine and runs it: a key of `FLAVOURS`.
        capabilities: of the GPUs that an engine is for, 86 for 8.6; none where that is the GPU at hand.
        machine: of a kit, what it is for.
    """

    name: str
    kind: str
    forms: tuple[str, ...]
    dtype: str
    typed: bool = False
    folder: str = ""
    split: bool = False
    max_file: int | None = None
    flavour: str = ""
    capabilities: tuple[int, ...] = ()
    machine: str = ""

    @property
    def form(self) -> str:
        """The form that is used."""
        return self.forms[0]


FLAVOURS = {"TensorRT-RTX": "tensorrt_rtx", "TensorRT": "tensorrt"}  # and their Python modules
CHUNK = 2_000_000_000  # bytes: a browser keeps a file in one buffer, of less than 2 GiB


def _rtx(name: str, *capabilities: int) -> Target:
    return Target(name, "engine", ("stock",), "F32", flavour="TensorRT-RTX", capabilities=capabilities)


def _kit(name: str, capability: int, machine: str) -> Target:
    return Target(name, "kit", ("stock",), "F32", flavour="TensorRT", capabilities=(capability,), machine=machine)


TARGETS = {
    target.name: target
    for target in (
        Target("cpu", "onnx", ("custom", "contrib", "stock"), "F32"),  # ONNX Runtime >= 1.20 on the CPU: the default
        # ONNX Runtime >= 1.20 on NVIDIA GPUs (onnxruntime-gpu); states and all between products in float32
        Target("cuda", "onnx", ("custom", "contrib", "stock"), "F16", typed=True),
        Target("genai", "onnx", ("custom", "contrib"), "F32"),  # onnxruntime-genai >= 0.18
        # transformers.js >= 4.3 and onnxruntime-web, where no kernels of ours can be
        Target("web", "onnx", ("contrib", "stock"), "F32", folder="onnx", split=True, max_file=CHUNK),
        Target("portable", "onnx", ("stock",), "F32"),  # any ONNX runtime
        # TensorRT-RTX: built anywhere, runs on RTX GPUs (RTX 30, 40 and 50, RTX PRO, GB10)
        _rtx("rtx", 86, 89, 120, 121),
        _rtx("rtx-ampere", 86),
        _rtx("rtx-ada", 89),
        _rtx("rtx-blackwell", 120, 121),
        Target("tensorrt", "engine", ("stock",), "F32", flavour="TensorRT"),  # on the GPU of this machine
        # TensorRT on the GPU of another machine, of a kind that TensorRT-RTX does not know
        _kit("a100", 80, "NVIDIA A100"),
        _kit("h100", 90, "NVIDIA H100"),
        _kit("h200", 90, "NVIDIA H200"),
        _kit("b200", 100, "NVIDIA B200"),
        _kit("jetson-orin", 87, "Jetson Orin"),
        _kit("jetson-thor", 110, "Jetson Thor"),
    )
}
FORMS = ("custom", "contrib", "stock")
KITS = tuple(target.name for target in TARGETS.values() if target.kind == "kit")


def target_named(name: str, kind: str | tuple[str, ...], form: str | None = None) -> Target:
    """The target called `name`, in that form. Raises UsageError if it is of another kind or cannot run `form`."""
    kinds = (kind,) if isinstance(kind, str) else kind
    fits = [target.name for target in TARGETS.values() if target.kind in kinds]
    if name not in fits:
        raise UsageError(f"unknown target {name!r}", fix=f"one of {', '.join(fits)}")
    target = TARGETS[name]
    if form is not None and form not in target.forms:
        raise UsageError(f"target {name!r} cannot run form {form!r}", fix=f"use --form {target.form}")
    return target if form is None else replace(target, forms=(form,))


def require_method(target: Target, quantize: str | None, calibrated: bool) -> None:
    """Raises UsageError if a target cannot read what is stored so, or if it goes without calibration."""
    from matexport.graph.encoding import CALIBRATED, METHODS, TYPED

    typed = TYPED if target.typed else ()
    known = [m for m in METHODS if m in typed or (m not in TYPED and (target.form != "stock" or m == "int8"))]
    if quantize is not None and quantize not in known:
        what = f"cannot quantise {quantize!r} in form {target.form!r} for target {target.name!r}"
        raise UsageError(what, fix=f"one of {', '.join(known)}")
    if (quantize in CALIBRATED) != calibrated:
        if calibrated:
            raise UsageError("calibration is for what products take", fix=f"use --quantize {CALIBRATED[0]} with it")
        what = f"{quantize} rounds what products take, by scales that must be measured"
        raise UsageError(what, fix="give inputs: --calibration FILE.npz")
