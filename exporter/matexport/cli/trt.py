"""`matexport trt`."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from matexport import api
from matexport.cli.common import (
    force_option,
    hint,
    human_bytes,
    model_option,
    output_option,
    slice_option,
    table_option,
)
from matexport.errors import UsageError
from matexport.manifest import manifest_path, read_manifest
from matexport.targets import TARGETS


@click.command()
@model_option
@table_option
@slice_option
@output_option
@click.option(
    "--target", default="rtx", show_default=True, metavar="NAME",
    help=f"Deployment target: {', '.join(t.name for t in TARGETS.values() if t.kind == 'engine')}.",
)  # fmt: skip
@click.option("--min-shapes", multiple=True, metavar="NAME:1x3x8x8", help="Smallest shape of an input.")
@click.option("--opt-shapes", multiple=True, metavar="NAME:8x3x8x8", help="Shape to be fastest at.")
@click.option("--max-shapes", multiple=True, metavar="NAME:64x3x8x8", help="Largest shape of an input.")
@force_option
def command(
    model: str, table: str | None, row: str | None, output: Path, target: str, min_shapes: tuple[str, ...],
    opt_shapes: tuple[str, ...], max_shapes: tuple[str, ...], force: bool,
) -> None:  # fmt: skip
    """Builds an engine from an ONNX folder, or from a checkpoint by way of ONNX.

    TensorRT-RTX (--target rtx) builds on any machine, without a GPU. A dynamic batch axis runs from 1 to
    64, best at 8, unless all three shapes of an input are given.

    \b
    Examples:
      matexport trt -m half-onnx -o half-rtx
      matexport trt -m checkpoint -s half -o half-rtx --min-shapes pixel_values:1x3x8x8 \\
          --opt-shapes pixel_values:16x3x8x8 --max-shapes pixel_values:256x3x8x8
    """
    shapes = _profiles(min_shapes, opt_shapes, max_shapes)
    if _is_onnx(Path(model)):
        if row is not None:
            raise UsageError("an ONNX folder is one slice already", where=model, fix="leave out -s")
        manifest = api.build_trt(model, output, target=target, shapes=shapes, force=force)
    else:
        with tempfile.TemporaryDirectory() as folder:
            api.export_onnx(model, Path(folder, "onnx"), slice=row, table=table)
            manifest = api.build_trt(Path(folder, "onnx"), output, target=target, shapes=shapes, force=force)
    size = human_bytes(sum(entry["bytes"] for entry in manifest["files"].values()))
    click.echo(f"{output}: {manifest['tensorrt']['flavour']} {manifest['tensorrt']['version']}, {size}")
    hint("inspect", "-m", output)


def _is_onnx(model: Path) -> bool:
    return manifest_path(model).is_file() and read_manifest(model)["kind"] != "checkpoint"


def _profiles(*groups: tuple[str, ...]) -> dict[str, api.Profile]:
    """min, opt and max shapes in trtexec's grammar (`name:1x3x8x8`, commas between inputs) by input."""
    found: dict[str, list[tuple[int, ...]]] = {}
    for group in groups:
        for item in (part for text in group for part in text.split(",")):
            name, _, sizes = item.rpartition(":")
            if not name or not all(size.isdigit() and 0 < len(size) < 10 for size in sizes.split("x")):
                raise UsageError(f"{item!r} is not a shape", fix="write NAME:1x3x8x8")
            found.setdefault(name, []).append(tuple(int(size) for size in sizes.split("x")))
    for name, shapes in found.items():
        if len(shapes) != 3:
            raise UsageError(f"input {name!r} needs a minimal, an optimal and a maximal shape", fix="give all three")
    return {name: (shapes[0], shapes[1], shapes[2]) for name, shapes in found.items()}
