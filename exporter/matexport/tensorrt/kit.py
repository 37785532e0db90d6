"""Kits: what a person with trtexec needs to build an engine on its machine and to check it there, without Python."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matexport.checkpoint import read_json
from matexport.errors import InputError, printable
from matexport.families import family_named
from matexport.gpus import dotted
from matexport.manifest import FILE, MAX_MANIFEST, describe_file, manifest_bytes, read_manifest
from matexport.runtimes.ort import open_onnx
from matexport.staging import staged_folder
from matexport.targets import Target
from matexport.tensorrt.golden import SEED, Case, case_files, describe_case, golden_cases, sizes
from matexport.tensorrt.profiles import Profile
from matexport.tensorrt.source import Source, open_source

TEMPLATES = Path(__file__).with_name("kit_files")
MADE_THERE = ("model.engine", "model.engine.part", "results")  # by the scripts
TF32 = (
    "Products of float32 are not rounded to TF32: take `--noTF32` out of build.sh for speed, and widen the limit in\n"
    "verify.sh. "
)
OUTPUTS = ("float32", "float16", "bfloat16", "int32", "int64")  # types that verify.sh reads


def write_kit(
    onnx: Path | Callable[[Path], None],
    output: Path,
    *,
    target: Target,
    shapes: Mapping[str, Profile],
    tolerance: Callable[[dict[str, Any]], float],
    force: bool = False,
    inputs: Sequence[Path] = (),
) -> dict[str, Any]:
    """Writes the kit of an ONNX model, and returns its manifest.

    Args:
        onnx: a folder that matexport wrote, which is copied; or what writes one to a path.
        shapes: of some inputs, instead of the default ones; see `matexport.tensorrt.profiles`.
        tolerance: how much an output may differ, of its largest value, in an engine that a manifest describes.
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
            open_source(onnx, target, shapes)
            _copy(onnx, model)
        else:
            onnx(model)
        source = open_source(model, target, shapes)
        described = source.describe(target)
        cases = _cases(source)
        files = {f"onnx/{path.name}": describe_file(path) for path in sorted(model.iterdir())}
        small = {f"golden/{case.profile}/{name}": data for case in cases for name, data in case_files(case).items()}
        limit = tolerance(described)
        small |= {f"golden/{case.profile}/atol.txt": _atol(case, limit).encode() for case in cases}
        small |= {name: text.encode() for name, text in _texts(source, target, cases, limit).items()}
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


def _copy(onnx: Path, folder: Path) -> None:
    """An ONNX folder of ours, file by file as its manifest lists them."""
    folder.mkdir()
    for name in [*read_manifest(onnx)["files"], FILE]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(onnx / name, folder / name)


def _cases(source: Source) -> list[Case]:
    """Golden values of every profile, from random inputs of the model's family."""
    program = open_onnx(source.file)
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


# -------------------------------------------------------------------------------------------- scripts
def _texts(source: Source, target: Target, cases: Sequence[Case], limit: float) -> dict[str, str]:
    """The scripts and the README."""
    slice_ = source.manifest["slice"]
    words = {
        "NAME": _plain(f"{source.manifest['source']['name']}, slice {slice_['name']}"),
        "MODEL": _plain(f"{source.manifest['family']}, {slice_['parameters']:,} parameters"),
        "MACHINE": target.machine,
        "CAPABILITY": dotted(target.capabilities[0]),
        "PRECISIONS": ", ".join(source.precisions),
        "TOLERANCE": f"{limit:g}",
        "TF32": "" if source.tf32 else TF32,
        "TRTEXEC": _template("find_trtexec.sh").rstrip(),
        "OPTIONS": "\n".join(f"  {option}" for option in _build_options(source)),
        "CHECKS": "\n".join(_check(i, case) for i, case in enumerate(cases)),
        "PROFILES": _profile_table(source),
        "POLYGRAPHY": "\n\n".join(_polygraphy(i, case.profile) for i, case in enumerate(cases)),
        "PLUGIN": "",
        "STEPS": "",
    }
    return {name: _filled(_template(name), words) for name in ("README.md", "build.sh", "verify.sh")}


def _template(name: str) -> str:
    return (TEMPLATES / name).read_text()


def _filled(text: str, words: Mapping[str, str]) -> str:
    return re.sub(r"@([A-Z0-9]+)@", lambda match: words[match[1]], text)


def _build_options(source: Source) -> list[str]:
    """What trtexec is called with, one option a line; `--profile` must stand before its shapes."""
    found = ["--onnx=onnx/model.onnx", "--saveEngine=model.engine.part", "--skipInference", "--stronglyTyped"]
    found += [] if source.tf32 else ["--noTF32"]
    for i, profile in enumerate(source.profiles.values()):
        found.append(f"--profile={i}")
        for k, kind in enumerate(("min", "opt", "max")):
            shapes = ",".join(f"{name}:{dims(ranges[k])}" for name, ranges in profile.items())
            found.append(f"'--{kind}Shapes={shapes}'")
    return found


def _check(index: int, case: Case) -> str:
    """The lines of verify.sh for one profile."""
    given = "\n".join(f"  {name}:{dims(array.shape)}" for name, array in case.inputs.items())
    wanted = "\n".join(f"  {name}:{array.dtype.name}" for name, array in case.outputs.items())
    return f"inputs=(\n{given}\n)\noutputs=(\n{wanted}\n)\ncheck {case.profile} {index}\n"


def _profile_table(source: Source) -> str:
    """A table a profile; inputs that share all their shapes share a row."""
    lines = []
    for name, profile in source.profiles.items():
        lines += [f"### {name}", "", "| input | min | opt | max |", "|---|---|---|---|"]
        alike: dict[Profile, list[str]] = {}
        for i, ranges in profile.items():
            alike.setdefault(ranges, []).append(i)
        for ranges, names in alike.items():
            shown = f"`{names[0]}`" + (f" and {len(names) - 1} more like it" if len(names) > 1 else "")
            lines.append(f"| {shown} | {' | '.join(dims(shape) for shape in ranges)} |")
        lines.append("")
    return "\n".join(lines).strip()


def _polygraphy(index: int, profile: str) -> str:
    return (
        f"    polygraphy run model.engine --model-type engine --trt --optimization-profile {index} \\\n"
        f"      --load-inputs golden/{profile}/inputs.json --load-outputs golden/{profile}/outputs.json \\\n"
        f"      --rtol 0 --atol $(cat golden/{profile}/atol.txt)"
    )


def _atol(case: Case, limit: float) -> str:
    """How far each output may be off, as polygraphy takes it."""
    largest = {name: float(abs(array.astype("float64")).max()) for name, array in case.outputs.items() if array.size}
    return " ".join(f"{name}:{limit * value:.3g}" for name, value in largest.items()) + "\n"


def _plain(text: str) -> str:
    """Text from a manifest as it can stand in a heading or a cell."""
    return printable(" ".join(text.split())).replace("|", "/").replace("`", "'").replace("<", "(")


def dims(shape: Sequence[int]) -> str:
    """A shape as trtexec writes it, 1x3x8x8."""
    return "x".join(map(str, shape))
