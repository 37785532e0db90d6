"""Which precisions the GPUs of a target have."""

from __future__ import annotations

from matexport.errors import UsageError
from matexport.targets import TARGETS, Target

METHODS = {"int8": "int8-weight", "int4": "int4-weight", "fp8": "fp8", "nvfp4": "nvfp4"}  # by what users say
# the first compute capability that has it. The matrix of facts is held by a test that builds each with TensorRT-RTX
NEEDS = {"fp8": 89, "nvfp4": 100}


def require_precision(target: Target, quantize: str | None) -> None:
    """Raises UsageError if a GPU that an engine is for cannot compute what is stored so."""
    least = NEEDS.get(quantize or "", 0)
    lacking = [number for number in target.capabilities if number < least]
    if lacking:
        have = ", ".join(t.name for t in TARGETS.values() if t.capabilities and min(t.capabilities) >= least)
        gpus = " and ".join(_version(number) for number in lacking)
        what = f"target {target.name!r} includes compute capability {gpus}, and {quantize} needs {_version(least)}"
        raise UsageError(what, fix=f"one of {have}; int8 and int4 run everywhere")


def _version(number: int) -> str:
    return f"{number // 10}.{number % 10}"
