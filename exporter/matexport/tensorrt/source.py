"""The ONNX folder that an engine or a kit is made from: ours, whole, in a form that TensorRT takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matexport.errors import InputError, MismatchError
from matexport.manifest import file_problems, read_manifest
from matexport.targets import Target
from matexport.tensorrt.precision import require_precision
from matexport.tensorrt.profiles import Profile, profiles, profiles_json
from matexport.version import __version__


@dataclass(frozen=True)
class Source:
    """An ONNX folder, checked.

    Attributes:
        file: the model in it; of several graphs the last one, which has the layers.
        beside: the files of the graphs before it, which stay as they are.
        shapes: of each input; dynamic axes are names.
        precisions: the types that weights and what is computed from them are in, as NumPy writes them.
        profiles: the shapes that the engine is for, by profile and input.
    """

    folder: Path
    file: Path
    beside: tuple[str, ...]
    manifest: dict[str, Any]
    shapes: Mapping[str, tuple[int | str, ...]]
    precisions: tuple[str, ...]
    profiles: Mapping[str, Mapping[str, Profile]]

    @property
    def tf32(self) -> bool:
        """Whether products of float32 may be rounded to TF32: not in a model of float32, which then means float32."""
        return bool(self.manifest.get("dtype", "float32") != "float32")

    def describe(self, target: Target) -> dict[str, Any]:
        """What the manifests of an engine and of a kit share."""
        origin = self.manifest.get("origin")
        short = {key: value for key, value in origin.items() if key != "tensors"} if origin else None
        return {
            "matexport": __version__,
            **{key: self.manifest[key] for key in ("family", "slice", "source")},
            **({"origin": short} if "origin" in self.manifest else {}),
            **{key: self.manifest[key] for key in ("quantize", "dtype") if key in self.manifest},
            "target": target.name,
            "form": self.manifest["form"],
            "capabilities": list(target.capabilities),
            "precisions": list(self.precisions),
            "tf32": self.tf32,
            "profiles": profiles_json(self.profiles),
        }


def open_source(onnx: Path, target: Target, shapes: Mapping[str, Profile], plugin: str = "none") -> Source:
    """Reads and checks an ONNX folder.

    Args:
        shapes: of some inputs, instead of the default ones; see `matexport.tensorrt.profiles`.
        plugin: what has the ops: with `cuda` and `triton` the folder is of form `custom`.

    Raises:
        InputError: not an ONNX folder of ours, or shapes that do not fit it.
        MismatchError: its files are not those that were written.
        UsageError: the GPUs of the target have not its precision.
    """
    manifest = read_manifest(onnx)
    if manifest["kind"] != "onnx":
        fix = "export it first: matexport onnx"
        raise InputError(f"is of kind {manifest['kind']!r}, not ONNX", where=str(onnx), fix=fix)
    require_precision(target, manifest.get("quantize"))
    form = manifest.get("form")
    if form != (target.form if plugin == "none" else "custom"):
        fix = f"export it with: matexport onnx --target {'portable' if plugin == 'none' else 'cpu'}"
        if form == "custom":
            fix += "; or build it with --plugin cuda or --plugin triton"
        using = "TensorRT without plugins" if plugin == "none" else f"plugin {plugin!r}"
        raise InputError(f"form {form!r} is not for {using}", where=str(onnx), fix=fix)
    for name, problem in file_problems(onnx, manifest).items():
        if problem:
            raise MismatchError(f"{name!r} {problem}", where=str(onnx), fix="export it again")
    file, beside = onnx, tuple[str, ...]()
    if onnx.is_dir():
        *others, last = manifest.get("graphs") or {"model.onnx": []}
        if last not in manifest["files"]:
            fix = "export it with: matexport onnx --target portable, or --target cuda --form stock"
            raise InputError(f"has no {last!r}", where=str(onnx), fix=fix)
        file = onnx / last
        beside = tuple(name for name in manifest["files"] if name.startswith(tuple(others))) if others else ()
    found, precisions = _read(file)
    return Source(onnx, file, beside, manifest, found, precisions, profiles(found, shapes, str(onnx), target.flavour))


def _read(file: Path) -> tuple[dict[str, tuple[int | str, ...]], tuple[str, ...]]:
    """The inputs of a model, and its precisions."""
    import onnx

    graph = onnx.load(file, load_external_data=False).graph
    shapes = {
        value.name: tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim) for value in graph.input
    }
    types = {weight.data_type for weight in graph.initializer}
    types |= {value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    names = {onnx.TensorProto.DataType.Name(number).lower() for number in types}
    known = ("double", "float", "float16", "bfloat16", "float8e4m3fn", "int8", "uint8", "int4", "uint4", "float4e2m1")
    return shapes, tuple({"double": "float64", "float": "float32"}.get(n, n) for n in known if n in names)
