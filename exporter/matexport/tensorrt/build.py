"""ONNX folder to engine folder. The library runs in a child process: it may abort, and that is only a message."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matexport.errors import InputError, MatexportError, MismatchError, MissingError
from matexport.manifest import FILE, describe_file, file_problems, manifest_bytes, read_manifest
from matexport.staging import staged_folder
from matexport.targets import Target
from matexport.tensorrt.plugins import Plugins, fused_model
from matexport.tensorrt.profiles import Profile, profiles
from matexport.version import __version__

ENGINE = "model.engine"
TIMEOUT = 3600  # seconds


def build_engine(
    onnx: Path,
    output: Path,
    *,
    target: Target,
    shapes: Mapping[str, Profile],
    plugins: Plugins | None = None,
    force: bool = False,
    inputs: Sequence[Path] = (),
) -> dict[str, Any]:
    """Builds an engine from an ONNX folder that matexport wrote, and returns the engine's manifest.

    Args:
        shapes: of some inputs, instead of the default ones; see `matexport.tensorrt.profiles`.
        plugins: that have the ops, of which the model is then in form `custom`; see `choose_plugins`.
        inputs: what the output must not overlap, beside the ONNX folder.

    Raises:
        InputError: not an ONNX folder of ours, shapes that do not fit it, or a model that the builder refuses (with
            its message).
        MismatchError: its files are not those that were written.
        MissingError: the target's library or its GPU is not here.
    """
    source = read_manifest(onnx)
    if source["kind"] != "onnx":
        fix = "export it first: matexport onnx"
        raise InputError(f"is of kind {source['kind']!r}, not ONNX", where=str(onnx), fix=fix)
    form = "custom" if plugins else target.form
    if source.get("form") != form:
        fix = f"export it with: matexport onnx --target {'cpu' if plugins else 'portable'}"
        if source.get("form") == "custom":
            fix += "; or build it with --plugin cuda, or --plugin triton"
        using = f"plugin {plugins.kind!r}" if plugins else "TensorRT without plugins"
        raise InputError(f"form {source.get('form')!r} is not for {using}", where=str(onnx), fix=fix)
    for name, problem in file_problems(onnx, source).items():
        if problem:
            raise MismatchError(f"{name!r} {problem}", where=str(onnx), fix="export it again")
    if target.name == "tensorrt":
        require_tensorrt()
    model = onnx if onnx.is_file() else onnx / "model.onnx"
    chosen = profiles(input_shapes(model), shapes, str(onnx))
    with (
        staged_folder(output, force=force, inputs=[onnx, *inputs]) as folder,
        model_for(model, plugins) as chosen_model,
    ):
        job = {
            "model": str(chosen_model.path.resolve()),
            "weights": str(model.resolve()),
            "plugins": plugins.job() if plugins else None,
            "engine": str(folder / ENGINE),
            "profiles": list(chosen.values()),
            "capabilities": target.capabilities,
        }
        built = run_builder(job, onnx)
        beside = plugins.put_beside(folder) if plugins else []
        manifest = {
            "kind": "engine",
            "matexport": __version__,
            **{key: source[key] for key in ("family", "slice", "source")},
            "target": target.name,
            "form": source["form"],
            **chosen_model.described,
            "tensorrt": {"flavour": built["flavour"], "version": built["version"]},
            "capabilities": list(target.capabilities),
            "inputs": built["inputs"],
            "outputs": built["outputs"],
            "profiles": {
                profile: {
                    name: dict(zip(("min", "opt", "max"), sizes, strict=True)) for name, sizes in by_input.items()
                }
                for profile, by_input in chosen.items()
            },
            "onnx": source["files"][model.name],
            "files": {name: describe_file(folder / name) for name in (ENGINE, *beside)},
        }
        (folder / FILE).write_bytes(manifest_bytes(manifest))
    return manifest


@dataclass(frozen=True)
class Chosen:
    """The model that the builder gets, and what the manifest says of it."""

    path: Path
    described: dict[str, Any]


@contextlib.contextmanager
def model_for(model: Path, plugins: Plugins | None) -> Iterator[Chosen]:
    """The ONNX file as it is, or one for the plugins, in a temporary folder; weights stay where they are."""
    if plugins is None:
        yield Chosen(model, {})
        return
    import onnx

    loaded = onnx.load(model, load_external_data=False)
    ops, aliases = fused_model(loaded, in_place=plugins.in_place)
    if not ops:
        raise InputError("has no op that a plugin could have", where=str(model), fix="leave out --plugin")
    described = {"plugins": plugins.describe(ops)} | ({"aliases": aliases} if plugins.in_place else {})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, model.name)
        path.write_bytes(loaded.SerializeToString())
        yield Chosen(path, described)


def input_shapes(model: Path) -> dict[str, tuple[int | str, ...]]:
    """The shape of every input of an ONNX file; dynamic axes are names."""
    import onnx

    graph = onnx.load(model, load_external_data=False).graph
    return {
        value.name: tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim) for value in graph.input
    }


def require_tensorrt() -> None:
    """Raises MissingError unless TensorRT and a GPU are here, naming what is missing."""
    if importlib.util.find_spec("tensorrt") is None:
        fix = "install TensorRT on the machine with the GPU, or use --target rtx, which needs neither"
        raise MissingError("target 'tensorrt' needs the package tensorrt, which is not installed", fix=fix)
    if not has_gpu():
        fix = "build on the machine with the GPU, or use --target rtx, which needs none"
        raise MissingError("target 'tensorrt' needs an NVIDIA GPU, and there is none here", fix=fix)
    raise MissingError("target 'tensorrt' is not supported by this version", fix="use --target rtx")


def has_gpu() -> bool:
    """Whether an NVIDIA GPU and its driver are here."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()


# ------------------------------------------------------------------------------------ the child process
@contextlib.contextmanager
def rtx_environment() -> Iterator[dict[str, str]]:
    """The environment in which TensorRT-RTX works.

    Its parser opens `libtensorrt_rtx.so`, of which the wheel ships only `...so.1`; a symlink must be on
    LD_LIBRARY_PATH before the process starts, or it aborts.
    """
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    folders = list(spec.submodule_search_locations or []) if spec else []
    libraries = [path for folder in folders for path in Path(folder).glob("libtensorrt_rtx.so.*")]
    if not libraries:
        raise MissingError("TensorRT-RTX is not installed", fix="pip install 'matexport[rtx]'")
    with tempfile.TemporaryDirectory() as links:
        Path(links, "libtensorrt_rtx.so").symlink_to(libraries[0])
        path = os.pathsep.join(filter(None, [links, os.environ.get("LD_LIBRARY_PATH")]))
        yield {**os.environ, "LD_LIBRARY_PATH": path}


def run_builder(job: dict[str, Any], onnx: Path) -> dict[str, Any]:
    """Runs `rtx_child.py` on a job and returns its result. Raises InputError with the builder's own message."""
    child = Path(__file__).with_name("rtx_child.py")
    with rtx_environment() as environment, tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        try:
            done = subprocess.run(
                [sys.executable, "-P", str(child), json.dumps({**job, "result": str(result)})],
                env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise MatexportError(
                "the build did not end in an hour", where=str(onnx), fix="use a smaller model"
            ) from None
        if done.returncode < 0:
            name = signal.Signals(-done.returncode).name
            last = done.stderr.strip().splitlines()[-1:] or ["no message"]
            raise InputError(f"the builder died with {name}: {last[0]}", where=str(onnx), fix="report this as a bug")
        if not result.exists():
            raise MatexportError(
                f"the builder failed: {done.stderr.strip()[-400:]}", where=str(onnx), fix="report this as a bug"
            )
        answer: dict[str, Any] = json.loads(result.read_text())
    if not answer["ok"]:
        first = (answer["messages"] or ["no message"])[0]
        fix = "see docs/tensorrt.md for what builds"
        if any("Plugin not found" in message for message in answer["messages"]):
            fix = "its ops are plugins: build it with --plugin cuda or --plugin triton, or export it with --form stock"
        raise InputError(f"TensorRT-RTX refuses the model: {first}", where=str(onnx), fix=fix)
    return answer
