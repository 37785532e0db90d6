"""`matexport doctor`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
from typing import Any

import click

import matexport_plugins
from matexport.cli.common import echo_json, echo_table, format_option
from matexport.gpus import find_gpus

# what it is for, the distribution, the module, and the line that installs it
PARTS = (
    ("oracle, parity", "torch", "torch", "pip install 'matexport[torch]'"),
    ("Auto classes", "transformers", "transformers", "pip install 'matexport[torch]'"),
    ("run ONNX", "onnxruntime", "onnxruntime", "pip install 'matexport[ort]'"),
    ("build RTX engines", "tensorrt_rtx", "tensorrt_rtx", "pip install 'matexport[rtx]'"),
    ("build TensorRT engines", "tensorrt", "tensorrt", "install TensorRT on the machine with the GPU"),
    ("Triton kernels, PTX", "triton", "triton", "pip install triton"),
    ("custom ops", "matexport-plugins", "matexport_plugins", "pip install matexport-plugins"),
)


@click.command()
@format_option
def command(style: str) -> None:
    """Says which runtimes and which hardware are usable here, and the one line that installs what is missing.

    \b
    Example:
      matexport doctor
    """
    found: list[dict[str, Any]] = []
    for purpose, distribution, module, install in PARTS:
        spec = importlib.util.find_spec(module)
        usable = spec is not None and spec.origin is not None
        version = _version(distribution) if usable else None
        found.append({"part": distribution, "for": purpose, "version": version, "install": None if usable else install})
    library = matexport_plugins.trt_library()
    found.append({
        "part": "TensorRT plugins", "for": "trt --plugin cuda",
        "version": matexport_plugins.__version__ if library else None,
        "install": None if library else "install matexport-plugins again, beside an nvcc",
    })  # fmt: skip
    tool = shutil.which("trtexec")
    found.append(
        {"part": "trtexec", "for": "build kits", "version": tool, "install": None if tool else "part of TensorRT"}
    )
    gpus = ", ".join(map(str, find_gpus()))
    found.append({"part": "NVIDIA GPU", "for": "run engines", "version": gpus or None, "install": None})
    if style == "json":
        echo_json({"parts": found})
        return
    rows = [[entry["part"], entry["for"], entry["version"] or "missing", entry["install"] or ""] for entry in found]
    echo_table(["part", "for", "version", "to install"], rows, left=4)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:  # a system package: JetPack brings TensorRT this way
        return "present"
