"""One comparison of two arrays, and what each kind of comparison tolerates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from matexport.families import Arrays, Family
from matexport.parity.quality import Quality

# kind -> largest max|got - want| / max|want| that passes; 0 means equal bit for bit. Of quantised models: see
# `compare_stored`
TOLERANCES = {
    "digest": 0.0,  # a file is the one that was written
    "config": 0.0,  # config.json and custom code are what the plan says
    "provenance": 0.0,  # only views were taken
    "checkpoint": 0.0,  # same module, same weights: the same operations in the same order
    "decode": 1e-5,  # step by step from states: fp32 in another order of summation
    "stock": 1e-5,  # another library's class: the same
    "onnx": 1e-5,  # another runtime: the same, about 100 units in the last place
    "onnx gemma3n": 1e-4,  # with the truth in float64, at once and step by step; see `NOISE`
    "decode gemma3n": 1e-4,
    "fp32 gemma3n": 1e-3,  # with the truth in fp32, of a model too large for float64: layers amplify both errors
    # products in fewer bits: 32 times the rounding of one number, which is 2^-11 or 2^-8. A layer rounds weights and
    # four activations; layers add up by their square root (24 random layers: 15 and 13 times)
    "onnx float16": 32 * 2**-11,
    "onnx bfloat16": 32 * 2**-8,
    "onnx int8": 8.0,  # inputs of products in 8 bits: measured 1.4 to 3.5, and 0.8 to 1.8 with a scale for each block
    "onnx int8-block": 8.0,
    "onnx int4-block": 1.0,  # inputs have 16 times as many levels as weights: 0.1 to 0.2
    "onnx int8-weight": 4.0,  # for TensorRT: inputs are rounded to the type of products, 0.5 to 0.9 with bfloat16
    "onnx int4-weight": 0.5,  # 0.04
    "onnx nvfp4": 0.5,  # 0.04
    "onnx fp8": 4.0,  # inputs and weights in e4m3: 1.0 to 1.6
    "golden fp8": 0.3,  # of the largest value: engine and golden values may round what products take to either side
    "loss": math.inf,  # what fewer bits lose against the source: stated, and for the user to judge
    "engine": 1e-4,  # another runtime, on a GPU, with approximations of its own; not measured yet
    "functions": 1e-5,  # another runtime without our kernels, where it could have them: the functions in the file
}
# an engine rounds what its ONNX file rounds
TOLERANCES |= {kind.replace("onnx", "engine", 1): n for kind, n in TOLERANCES.items() if kind.startswith("onnx ")}
NOISE = 4  # a result in fp32 may always be so many times as far from float64 as the source's own library in fp32 is


def kind_of(runtime: str, manifest: Mapping[str, Any]) -> str:
    """The kind of the outputs of an artefact that "onnx" or an "engine" computes, by what it computes in."""
    coarse = manifest.get("quantize") or manifest.get("dtype", "float32")
    return runtime if coarse == "float32" else f"{runtime} {coarse}"


@dataclass(frozen=True)
class Comparison:
    """The outcome of one comparison; numbers that do not apply are None.

    Attributes:
        name: tensor, output or file.
        max_abs: max|got - want|.
        max_rel: max|got - want| / max|want|.
        cosine: of the two arrays as vectors.
        top1: share of rows along the last axis with the same largest element.
        kl: mean Kullback-Leibler divergence of softmax(got) from softmax(want), in nats.
        detail: why it failed, where the numbers do not say it.
        quality: what the output is worth, where the inputs tell.
        of_loss: of a quantised model |got - want| over what storing its weights so changes; its tolerance is for this.
    """

    name: str
    kind: str
    passed: bool
    tolerance: float
    max_abs: float | None = None
    max_rel: float | None = None
    cosine: float | None = None
    top1: float | None = None
    kl: float | None = None
    detail: str = ""
    quality: Quality | None = None
    of_loss: float | None = None

    def to_json(self) -> dict[str, Any]:
        keys = ("name", "kind", "max_abs", "max_rel", "cosine", "top1", "kl", "tolerance", "passed")
        values = {key: getattr(self, key) for key in keys}
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        worth: dict[str, Any] = {"quality": self.quality.to_json()} if self.quality else {}
        worth |= {"of_loss": self.of_loss} if self.of_loss is not None and math.isfinite(self.of_loss) else {}
        return {**finite, **worth, **({"detail": self.detail} if self.detail else {})}

    @property
    def badness(self) -> tuple[bool, float]:
        """For finding the worst failure: tensors before files, then by relative error, those without one first."""
        return self.kind not in ("digest", "config"), math.inf if self.max_rel is None else self.max_rel


def compare(name: str, kind: str, got: np.ndarray, want: np.ndarray, tolerance: float | None = None) -> Comparison:
    """Compares an output with the truth. What is not finite, or of another shape, never passes.

    Args:
        tolerance: by default that of the kind.
    """
    tolerance = TOLERANCES[kind] if tolerance is None else tolerance
    if got.shape != want.shape:
        return Comparison(name, kind, False, tolerance, detail=f"shape {got.shape}, {want.shape} expected")
    a, b = got.astype(np.float64), want.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Comparison(name, kind, False, tolerance, detail="not finite")
    if not a.size:
        return Comparison(name, kind, False, tolerance, detail="empty")
    max_abs, scale = float(np.abs(a - b).max()), float(np.abs(b).max())
    max_rel = max_abs / scale if scale else (0.0 if max_abs == 0 else math.inf)
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = float((a * b).sum()) / norms if norms else None
    passed = bool(np.array_equal(got, want)) if tolerance == 0 else max_rel <= tolerance
    top1 = kl = None
    if a.ndim >= 2:
        top1 = float((a.argmax(-1) == b.argmax(-1)).mean())
        log_a, log_b = _log_softmax(a), _log_softmax(b)
        kl = float((np.exp(log_b) * (log_b - log_a)).sum(-1).mean())
    return Comparison(name, kind, passed, tolerance, max_abs, max_rel, cosine, top1, kl)


def compare_stored(
    name: str, kind: str, got: np.ndarray, want: np.ndarray, truth: np.ndarray, floor: float = 0.0
) -> Comparison:
    """Compares an output of a quantised model with what its weights give in float32.

    The two differ by the rounding of inputs to 8 bits, which has no bound of its own: layers amplify it, as they do the
    rounding of weights. So the measure is what that changes, |want - truth|, in the 2-norm.

    Args:
        want: of the source with its weights as they are stored.
        truth: of the source.
        floor: max|got - want| / max|want| that is that of another order of summation, and always passes.
    """
    found = compare(name, kind, got, want)
    if found.max_abs is None or truth.shape != want.shape:
        return found
    error, loss = (float(np.linalg.norm(np.float64(a) - np.float64(b))) for a, b in ((got, want), (want, truth)))
    share = error / loss if loss else math.inf if error else 0.0
    passed = share <= found.tolerance or (found.max_rel is not None and found.max_rel <= floor)
    return replace(found, passed=passed, of_loss=share)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)))


def compare_outputs(kind: str, got: Arrays, want: Arrays, family: Family) -> list[Comparison]:
    """Every output with the oracle's, and what was decoded step by step with what was computed at once."""
    own = f"{kind} {family.NAME}"
    kind = own if own in TOLERANCES else kind
    outputs = [name for name in want if not name.startswith("whole.")]
    found = [Comparison(name, kind, False, 0.0, detail="is not an output") for name in outputs if name not in got]
    found += [_compared(name, kind, got[name], name, want, family) for name in outputs if name in got]
    lossy = kind.removesuffix(f" {family.NAME}").startswith(("onnx ", "engine"))  # all is compared with the oracle
    for name in got:
        step, _, output = name.partition(".")
        if step.partition("@")[0] != "decode" or output not in want:
            continue
        if lossy:
            found += [_compared(name, kind, got[name], output, want, family)] if name not in want else []
            continue
        if f"whole.{output}" in got:  # both in float64
            found.append(compare(name, "decode", got[name], got[f"whole.{output}"]))
            continue
        own = f"decode {family.NAME}"
        found.append(_compared(name, own if own in TOLERANCES else "decode", got[name], output, want, family))
    return found


def compare_quantised(kind: str, got: Arrays, want: Arrays, truth: Arrays, family: Family) -> list[Comparison]:
    """Every output of a quantised model, step by step too, with what its weights give and with the source's.

    Args:
        want, truth: see `compare_stored`.
    """
    found, floor = [], max(TOLERANCES["onnx"], TOLERANCES.get(f"fp32 {family.NAME}", 0.0))
    for name in got:
        step, _, output = name.partition(".")
        same = name if name in want else output if step.startswith("decode@") else ""
        if same in want:
            found.append(compare_stored(name, kind, got[name], want[same], truth[same], floor))
            found.append(compare(name, "loss", got[name], truth[same]))
    return found or [Comparison("logits", kind, False, 0.0, detail="is not an output")]


def _compared(name: str, kind: str, got: np.ndarray, output: str, want: Arrays, family: Family) -> Comparison:
    """Compares what is computed in fp32 with an output of the oracle, in float64 where that is known."""
    tolerance, exact = TOLERANCES[kind], want.get(f"whole.{output}")
    if tolerance == 0:
        return compare(name, kind, got, want[output])
    if exact is None:
        return compare(name, kind, got, want[output], max(tolerance, TOLERANCES.get(f"fp32 {family.NAME}", 0)))
    noise = compare(name, kind, want[output], exact).max_rel or 0.0
    return compare(name, kind, got, exact, max(tolerance, NOISE * noise))
