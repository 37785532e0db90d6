"""matexport: slices nested (Matryoshka) checkpoints, exports them, and proves that they compute the same.

    import matexport as mx

    plan = mx.plan("checkpoint", slice="half")
    plan.write("half")
    mx.export_onnx(plan, "half.onnx")
    assert mx.verify("half", source="checkpoint").passed

Importing this package imports neither torch nor onnx; each function imports what it needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matexport.version import __version__

if TYPE_CHECKING:
    from matexport.api import (
        PlannedSlice,
        export_bundle,
        export_in_place,
        export_onnx,
        load_table,
        plan,
        slice,
        verify,
    )
    from matexport.engines import build_trt, emit_ptx, plan_engine
    from matexport.errors import MatexportError

__all__ = [
    "MatexportError", "PlannedSlice", "__version__", "build_trt", "emit_ptx", "export_bundle", "export_in_place",
    "export_onnx", "load_table", "plan", "plan_engine", "slice", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'matexport' has no attribute {name!r}")
    import importlib

    engines = dict.fromkeys(("build_trt", "emit_ptx", "plan_engine"), "engines")
    module = {"MatexportError": "errors", **engines}.get(name, "api")
    return getattr(importlib.import_module(f"matexport.{module}"), name)


def __dir__() -> list[str]:
    return __all__
