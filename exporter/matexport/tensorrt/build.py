"""ONNX folder to engine folder. The library runs in a child process: it may abort, and that is only a message."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matexport.errors import InputError, MatexportError, MissingError, UsageError
from matexport.gpus import Gpu, find_gpus
from matexport.manifest import FILE, describe_file, manifest_bytes
from matexport.staging import staged_folder
from matexport.targets import FLAVOURS, KITS, Target
from matexport.tensorrt.fused import fused_model
from matexport.tensorrt.plugins import Plugins
from matexport.tensorrt.profiles import Profile
from matexport.tensorrt.source import open_source

ENGINE = "model.engine"
TIMEOUT = 3600  # seconds


def build_engine(
    onnx: Path,
    output: Path,
    *,
    target: Target,
    shapes: Mapping[str, Profile],
    plugins: Plugins | None = None,
    timing_cache: Path | None = None,
    force: bool = False,
    inputs: Sequence[Path] = (),
    warn: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Builds an engine from an ONNX folder that matexport wrote, and returns the engine's manifest.

    Of several graphs the last one becomes the engine, and the others, with tables of embeddings, go along as they are.

    Args:
        shapes: of some inputs, instead of the default ones; see `matexport.tensorrt.profiles`.
        plugins: that have the ops, of which the model is then in form `custom`; see `choose_plugins`.
        timing_cache: a file of TensorRT's timings, read if it fits and written; TensorRT-RTX has none.
        inputs: what the output must not overlap, beside the ONNX folder.

    Raises:
        InputError: not an ONNX folder of ours, shapes that do not fit it, or a model that the builder refuses (with
            its message).
        MismatchError: its files are not those that were written.
        MissingError: the target's library or its GPU is not here.
        UsageError: a timing cache for TensorRT-RTX; see also `staged_folder`.
    """
    if timing_cache and target.flavour != "TensorRT":
        raise UsageError("TensorRT-RTX has no timing cache", fix="leave out --timing-cache, or use --target tensorrt")
    gpu = require_builder(target)
    source = open_source(onnx, target, shapes, plugin=plugins.kind if plugins else "none")
    with staged_folder(output, force=force, inputs=[onnx, *inputs]) as folder, model_for(source.file, plugins) as model:
        job = {
            "model": str(model.path.resolve()),
            "weights": str(source.file.resolve()),
            "plugins": plugins.job() if plugins else None,
            "engine": str(folder / ENGINE),
            "profiles": list(source.profiles.values()),
            "capabilities": target.capabilities,
            "tf32": source.tf32,
            "timing_cache": str(timing_cache.resolve()) if timing_cache else None,
        }
        built = run_builder(job, onnx, target.flavour)
        for note in built["notes"]:
            warn(note)
        beside = plugins.put_beside(folder) if plugins else []
        for name in source.beside:
            shutil.copyfile(source.folder / name, folder / name)
        manifest = {
            "kind": "engine",
            **source.describe(target),
            **model.described,
            "capabilities": [gpu.capability] if gpu else list(target.capabilities),
            "tensorrt": {"flavour": target.flavour, "version": built["version"]},
            "inputs": built["inputs"],
            "outputs": built["outputs"],
            "onnx": source.manifest["files"],
            **({"before": [name for name in source.beside if name.endswith(".onnx")]} if source.beside else {}),
            "files": {name: describe_file(folder / name) for name in (ENGINE, *beside, *source.beside)},
        }
        (folder / FILE).write_bytes(manifest_bytes(manifest))
    return manifest


@dataclass(frozen=True)
class Model:
    """The model that the builder gets, and what the manifest says of it."""

    path: Path
    described: dict[str, Any]


@contextlib.contextmanager
def model_for(file: Path, plugins: Plugins | None) -> Iterator[Model]:
    """The ONNX file as it is, or one for the plugins, in a temporary folder; weights stay where they are."""
    if plugins is None:
        yield Model(file, {})
        return
    import onnx

    loaded = onnx.load(file, load_external_data=False)
    ops, aliases = fused_model(loaded, in_place=plugins.in_place)
    if not ops:
        raise InputError("has no op that a plugin could have", where=str(file), fix="leave out --plugin")
    described = {"plugins": plugins.describe(ops)} | ({"aliases": aliases} if plugins.in_place else {})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, file.name)
        path.write_bytes(loaded.SerializeToString())
        yield Model(path, described)


def require_builder(target: Target) -> Gpu | None:
    """The GPU that an engine of this target is built for here; None where it needs no GPU.

    Raises:
        MissingError: the target's library, or the GPU that it needs, is not here; with the way out.
    """
    if target.flavour == "TensorRT-RTX":
        rtx_library()
        return None
    fix = f"run this on the machine with the GPU, or write a kit for it: --target {', '.join(KITS)}"
    if importlib.util.find_spec(FLAVOURS[target.flavour]) is None:
        raise MissingError(f"target {target.name!r} needs the package tensorrt, which is not installed", fix=fix)
    gpus = find_gpus()
    if not gpus:
        raise MissingError(f"target {target.name!r} needs an NVIDIA GPU, and there is none here", fix=fix)
    return gpus[0]


# ------------------------------------------------------------------------------------ the child process
@contextlib.contextmanager
def rtx_environment() -> Iterator[dict[str, str]]:
    """The environment in which TensorRT-RTX works.

    Its parser opens `libtensorrt_rtx.so`, of which the wheel ships only `...so.1`; a symlink must be on
    LD_LIBRARY_PATH before the process starts, or it aborts.
    """
    library = rtx_library()
    with tempfile.TemporaryDirectory() as links:
        Path(links, "libtensorrt_rtx.so").symlink_to(library)
        path = os.pathsep.join(filter(None, [links, os.environ.get("LD_LIBRARY_PATH")]))
        yield {**os.environ, "LD_LIBRARY_PATH": path}


def rtx_library() -> Path:
    """The library of TensorRT-RTX. Raises MissingError."""
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    folders = list(spec.submodule_search_locations or []) if spec else []
    libraries = [path for folder in folders for path in Path(folder).glob("libtensorrt_rtx.so.*")]
    if not libraries:
        raise MissingError("TensorRT-RTX is not installed", fix="pip install 'matexport[rtx]'")
    return libraries[0]


def run_builder(job: dict[str, Any], onnx: Path, flavour: str) -> dict[str, Any]:
    """Runs `child.py` on a job and returns its result. Raises InputError with the builder's own message."""
    child, job = Path(__file__).with_name("child.py"), {**job, "module": FLAVOURS[flavour]}
    environment = rtx_environment() if flavour == "TensorRT-RTX" else contextlib.nullcontext(dict(os.environ))
    with environment as variables, tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        try:
            done = subprocess.run(
                [sys.executable, "-P", str(child), json.dumps({**job, "result": str(result)})],
                env=variables, capture_output=True, text=True, timeout=TIMEOUT, check=False,
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
        raise InputError(f"{flavour} refuses the model: {first}", where=str(onnx), fix=fix)
    return answer
