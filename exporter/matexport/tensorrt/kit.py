"""Kits: what a person with trtexec needs to build an engine on its machine and to check it there, without Python."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matexport_plugins
from matexport.checkpoint import read_json
from matexport.errors import InputError, UsageError
from matexport.families import family_named
from matexport.manifest import FILE, MAX_MANIFEST, describe_file, manifest_bytes, read_manifest
from matexport.runtimes.ort import open_onnx
from matexport.staging import staged_folder
from matexport.targets import Target
from matexport.tensorrt.fused import fused_model
from matexport.tensorrt.golden import SEED, Case, case_files, describe_case, golden_cases, sizes
from matexport.tensorrt.kit_texts import LIBRARY, kit_texts
from matexport.tensorrt.profiles import Profile
from matexport.tensorrt.source import Source, open_source

MADE_THERE = ("model.engine", "model.engine.part", "results", LIBRARY)  # by the scripts
FUSED = "model.fused.onnx"  # beside model.onnx, whose weights it uses
OUTPUTS = ("float32", "float16", "bfloat16", "int32", "int64")  # types that verify.sh reads


def write_kit(
    onnx: Path | Callable[[Path], None],
    output: Path,
    *,
    target: Target,
    shapes: Mapping[str, Profile],
    tolerance: Callable[[dict[str, Any]], float],
    plugin: str = "none",
    force: bool = False,
    inputs: Sequence[Path] = (),
) -> dict[str, Any]:
    """Writes the kit of an ONNX model, and returns its manifest.

    Args:
        onnx: a folder that matexport wrote, which is copied; or what writes one to a path.
        shapes: of some inputs, instead of the default ones; see `matexport.tensorrt.profiles`.
        tolerance: how much an output may differ, of its largest value, in an engine that a manifest describes.
        plugin: `cuda`: the ops are plugins, whose sources go along; the model is then of form `custom`.
        inputs: what the output must not overlap, beside the ONNX folder.

    Raises:
        InputError, MismatchError: see `open_source`.
        InputError: no golden values can be computed.
        MissingError: onnxruntime, which computes them, is not installed.
        UsageError: see `staged_folder`.
    """
    taken = [onnx] if isinstance(onnx, Path) else []
    if isinstance(onnx, Path) and not onnx.is_dir():
        raise InputError("is one file, and a kit takes a folder", where=str(onnx), fix="export it with -o FOLDER")
    with staged_folder(output, force=force, inputs=[*taken, *inputs]) as folder:
        model = folder / "onnx"
        if isinstance(onnx, Path):
            open_source(onnx, target, shapes, plugin)
            _copy(onnx, model)
        else:
            onnx(model)
        source = open_source(model, target, shapes, plugin)
        if source.beside:
            fix = "leave out --split-embeddings when it is exported"
            raise InputError("has several graphs, and a kit is of one", where=str(model), fix=fix)
        described = source.describe(target)
        cases = _cases(source)
        small: dict[str, bytes] = {}
        if plugin != "none":
            described["plugins"] = {"kind": plugin, "ops": _fuse(source), "library": LIBRARY}
            small |= {f"plugin/{name}": path.read_bytes() for name, path in matexport_plugins.trt_sources().items()}
        files = {f"onnx/{name}": entry for name, entry in read_manifest(model)["files"].items()}
        files[f"onnx/{FILE}"] = describe_file(model / FILE)
        small |= {f"golden/{case.profile}/{name}": data for case in cases for name, data in case_files(case).items()}
        limit = tolerance(described)
        small |= {f"golden/{case.profile}/atol.txt": _atol(case, limit).encode() for case in cases}
        texts = kit_texts(source, target, cases, limit, source.file.name if plugin == "none" else FUSED)
        small |= {name: text.encode() for name, text in texts.items()}
        for name, data in small.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            if path.suffix == ".sh":
                path.chmod(path.stat().st_mode | (path.stat().st_mode & 0o444) >> 2)
            files[name] = describe_file(path)
        manifest = {
            "kind": "kit",
            **described,
            "tensorrt": {"flavour": target.flavour},
            "golden": {case.profile: describe_case(case) for case in cases},
            "tolerance": limit,
            "made_there": list(MADE_THERE),
            "files": files,
        }
        (folder / FILE).write_bytes(manifest_bytes(manifest))
    return manifest


def refuse_for_kits(plugin: str, *, embed: bool, in_place: bool, timing_cache: bool) -> None:
    """Raises UsageError for what is not done with trtexec, or not here."""
    if plugin not in ("none", "cuda"):
        what = f"plugin {plugin!r} is Python, and a kit is for machines without"
        raise UsageError(what, fix="use --plugin cuda, or --plugin none")
    if embed:
        fix = f"leave it out; on the machine: ./build.sh --setPluginsToSerialize={LIBRARY}"
        raise UsageError("trtexec loads no engine with plugins inside", fix=fix)
    if in_place:
        raise UsageError("trtexec gives every state memory of its own", fix="leave out --in-place")
    if timing_cache:
        fix = "give it to the kit's build.sh: --timingCacheFile=FILE"
        raise UsageError("a kit is built on its own machine, and so are timings", fix=fix)


def _fuse(source: Source) -> list[str]:
    """Puts the model for the plugins beside the other one, and into the manifest of that folder; returns the ops."""
    import onnx

    model = onnx.load(source.file, load_external_data=False)
    ops, _ = fused_model(model)
    if not ops:
        raise InputError("has no op that a plugin could have", where=str(source.file), fix="leave out --plugin")
    file = source.file.with_name(FUSED)
    file.write_bytes(model.SerializeToString(deterministic=True))
    files = {**source.manifest["files"], FUSED: describe_file(file)}
    (source.folder / FILE).write_bytes(manifest_bytes({**source.manifest, "files": files}))
    return ops


def _copy(onnx: Path, folder: Path) -> None:
    """An ONNX folder of ours, file by file as its manifest lists them."""
    folder.mkdir()
    for name in [*read_manifest(onnx)["files"], FILE]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(onnx / name, folder / name)


def _cases(source: Source) -> list[Case]:
    """Golden values of every profile, from random inputs of the model's family."""
    program = open_onnx(source.file, own_types=True)
    batch, length = sizes(next(iter(source.profiles.values())), source.shapes)
    family = family_named(source.manifest["family"])
    config = read_json(source.folder / "config.json", MAX_MANIFEST)
    samples = family.sample_inputs(config, batch * (length + 1), SEED)  # of tokens: a row each, at least
    cases = golden_cases(program, source.profiles, samples)
    for case in cases:
        for name, array in case.outputs.items():
            if array.dtype.name not in OUTPUTS:
                what = f"output {name!r} is {array.dtype.name}, of which verify.sh knows nothing"
                raise InputError(what, where=str(source.folder), fix=f"one of {', '.join(OUTPUTS)}")
        for name in (*case.inputs, *case.outputs):
            if not re.fullmatch(r"[A-Za-z0-9_.-]{1,100}", name):
                fix = "write the ONNX folder again"
                raise InputError(f"{name!r} cannot be written into a script", where=str(source.folder), fix=fix)
    return cases


def _atol(case: Case, limit: float) -> str:
    """How far each output may be off, as polygraphy takes it."""
    largest = {name: float(abs(array.astype("float64")).max()) for name, array in case.outputs.items() if array.size}
    return " ".join(f"{name}:{limit * value:.3g}" for name, value in largest.items()) + "\n"
