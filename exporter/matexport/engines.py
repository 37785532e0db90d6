"""What `build_trt` would build, and whether it can be built here: without building, from headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matexport.api import StrPath, is_onnx, plan
from matexport.errors import MissingError
from matexport.slice_table import Table
from matexport.targets import target_named
from matexport.tensorrt import Profile, open_source, profiles, profiles_json, require_builder


def plan_engine(
    model: StrPath,
    *,
    slice: str | None = None,
    table: StrPath | Table | None = None,
    target: str = "rtx",
    shapes: Mapping[str, Profile] | None = None,
    plugin: str = "none",
) -> dict[str, Any]:
    """The plan of an engine or a kit: the model, the GPUs, the profiles, and what is missing here to build it.

    Needs neither TensorRT nor a GPU, and reads no weights of a checkpoint.

    Raises:
        See `matexport.build_trt`.
    """
    chosen, path = target_named(target, ("engine", "kit")), Path(model)
    if is_onnx(path, slice):
        source = open_source(path, chosen, shapes or {}, plugin)
        described, found = source.manifest["slice"], source.profiles
    else:
        planned = plan(model, slice, table=table)
        form = "stock" if plugin == "none" else "custom"
        split = planned.family.build_split(planned.plan, form) if chosen.kind == "engine" else {}
        graph = [*split.values()][-1] if split else planned.family.build_graph(planned.plan, form)
        inputs = {
            str(value.name): tuple(n if isinstance(n, int) else str(n) for n in value.shape or ())
            for value in graph.inputs
        }
        described = {"name": planned.plan.name, "parameters": planned.plan.parameters}
        found = profiles(inputs, shapes or {}, str(model))
    try:
        if chosen.kind == "engine":
            require_builder(chosen)
        missing = None
    except MissingError as e:
        missing = e.what
    return {
        "target": chosen.name,
        "kind": chosen.kind,
        "slice": described["name"],
        "parameters": described["parameters"],
        "flavour": chosen.flavour,
        "capabilities": list(chosen.capabilities),
        "plugin": plugin,
        "profiles": profiles_json(found),
        "missing": missing,
    }
