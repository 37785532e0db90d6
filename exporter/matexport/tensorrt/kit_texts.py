"""The scripts and the README of a kit: templates in kit_files/, filled in."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from matexport.errors import printable
from matexport.gpus import dotted
from matexport.targets import Target
from matexport.tensorrt.golden import Case
from matexport.tensorrt.profiles import Profile
from matexport.tensorrt.source import Source

TEMPLATES = Path(__file__).with_name("kit_files")
LIBRARY = "plugin/libmatexport_trt.so"  # what plugin/build.sh makes
TF32 = (
    "Products of float32 are not rounded to TF32: take `--noTF32` out of build.sh for speed, and widen the limit in\n"
    "verify.sh. "
)
PLUGIN = f"""The scan and the convolution are plugins in CUDA. `build.sh` first compiles them for this GPU
(`plugin/build.sh`, with the `nvcc` of CUDA; `NVCC=/path/to/nvcc` says where) into `{LIBRARY}`, without which the engine
does not load: `trtexec --dynamicPlugins={LIBRARY}`, or `getPluginRegistry()->loadLibrary(...)`.

"""


def kit_texts(source: Source, target: Target, cases: Sequence[Case], limit: float, model: str) -> dict[str, str]:
    """The scripts and the README, by name.

    Args:
        model: the file in `onnx/` that the engine is built from; another one than `model.onnx` needs the plugins.
    """
    slice_ = source.manifest["slice"]
    words = {
        "NAME": _plain(f"{source.manifest['source']['name']}, slice {slice_['name']}"),
        "MODEL": _plain(f"{source.manifest['family']}, {slice_['parameters']:,} parameters"),
        "MACHINE": target.machine,
        "CAPABILITY": dotted(target.capabilities[0]),
        "PRECISIONS": ", ".join(source.precisions),
        "TOLERANCE": f"{limit:g}",
        "FILE": model,
        "TF32": "" if source.tf32 else TF32,
        "TRTEXEC": _template("find_trtexec.sh").rstrip(),
        "OPTIONS": "\n".join(f"  {option}" for option in _build_options(source, model)),
        "CHECKS": "\n".join(_check(i, case) for i, case in enumerate(cases)),
        "PROFILES": _profile_table(source),
        "POLYGRAPHY": "\n\n".join(_polygraphy(i, case.profile) for i, case in enumerate(cases)),
        "PLUGIN": "",
        "LOAD": "",
        "STEPS": "",
        "ARCHITECTURE": f"sm_{target.capabilities[0]}",
        "LIBRARY": Path(LIBRARY).name,
    }
    names = ["README.md", "build.sh", "verify.sh"]
    if model != "model.onnx":
        names.append("plugin/build.sh")
        words |= {
            "PLUGIN": f"[ -f {LIBRARY} ] || plugin/build.sh\n\n",
            "LOAD": f" \\\n      --dynamicPlugins=../../{LIBRARY}",
            "STEPS": PLUGIN,
        }
    return {name: _filled(_template(name), words) for name in names}


def _template(name: str) -> str:
    return (TEMPLATES / name).read_text()


def _filled(text: str, words: Mapping[str, str]) -> str:
    return re.sub(r"@([A-Z0-9]+)@", lambda match: words[match[1]], text)


def _build_options(source: Source, model: str) -> list[str]:
    """What trtexec is called with, one option a line; `--profile` must stand before its shapes."""
    found = [f"--onnx=onnx/{model}", "--saveEngine=model.engine.part", "--skipInference", "--stronglyTyped"]
    found += [] if source.tf32 else ["--noTF32"]
    found += [] if model == "model.onnx" else [f"--dynamicPlugins={LIBRARY}"]
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


def _plain(text: str) -> str:
    """Text from a manifest as it can stand in a heading or a cell."""
    return printable(" ".join(text.split())).replace("|", "/").replace("`", "'").replace("<", "(")


def dims(shape: Sequence[int]) -> str:
    """A shape as trtexec writes it, 1x3x8x8."""
    return "x".join(map(str, shape))
