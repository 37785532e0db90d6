"""`matexport trt`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from matexport.cli.common import (
    force_option,
    hint,
    human_bytes,
    load_arrays,
    model_option,
    note,
    say,
    shape_ranges,
    slice_option,
    table_option,
)
from matexport.engines import build_trt, emit_ptx, plan_engine
from matexport.errors import UsageError
from matexport.gpus import dotted
from matexport.targets import TARGETS, target_named
from matexport.tensorrt import CAPABILITIES, PLUGINS, Profile
from matexport.tensorrt.precision import METHODS, require_precision

BUILT = ("engine", "kit")


@click.command()
@model_option
@table_option
@slice_option
@click.option("-o", "--output", metavar="FOLDER", type=click.Path(path_type=Path), help="Where to write.")
@click.option(
    "--dry-run", is_flag=True, help="Print the profiles, and what is missing to build it here; write nothing."
)
@click.option(
    "--target", "targets", multiple=True, metavar="NAME",
    help=f"Deployment target: {', '.join(t.name for t in TARGETS.values() if t.kind in BUILT)}; rtx by default."
    " Of several, each gets a folder of its name.",
)  # fmt: skip
@click.option("--dtype", metavar="NAME", help="Compute products in float32, float16 or bfloat16.  [float32]")
@click.option(
    "--quantize", type=click.Choice(list(METHODS)),
    help="Store projections in fewer bits: int8, int4; fp8 on Ada, Hopper and newer; nvfp4 on Blackwell.",
)  # fmt: skip
@click.option(
    "--calibration", metavar="NPZ", type=click.Path(path_type=Path),
    help="For fp8: inputs by name, on which the scales of activations are measured.",
)  # fmt: skip
@click.option("--min-shapes", multiple=True, metavar="NAME:1x3x8x8", help="Smallest shape of an input.")
@click.option("--opt-shapes", multiple=True, metavar="NAME:8x3x8x8", help="Shape to be fastest at.")
@click.option("--max-shapes", multiple=True, metavar="NAME:64x3x8x8", help="Largest shape of an input.")
@click.option(
    "--timing-cache", metavar="FILE", type=click.Path(path_type=Path),
    help="For target tensorrt: timings of earlier builds, which make this one faster; written too.",
)  # fmt: skip
@click.option(
    "--plugin", type=click.Choice(PLUGINS), default="none", show_default=True,
    help="What has the scan and the convolution: standard operators, our CUDA kernels, or our Triton kernels.",
)  # fmt: skip
@click.option("--embed-plugin", is_flag=True, help="Put the library of --plugin cuda into the engine: one file.")
@click.option(
    "--in-place", is_flag=True, help="Write new states over old ones (--plugin cuda): bind both to one address."
)
@click.option(
    "--emit-ptx", "ptx", is_flag=True,
    help="Build no engine: write the Triton kernels of the model as PTX, for the GPUs of each --target, by default for"
    f" compute capabilities {', '.join(f'{n // 10}.{n % 10}' for n in CAPABILITIES)}.",
)  # fmt: skip
@force_option
def command(
    model: str, table: str | None, row: str | None, output: Path | None, dry_run: bool, targets: tuple[str, ...],
    dtype: str | None, quantize: str | None, calibration: Path | None, min_shapes: tuple[str, ...],
    opt_shapes: tuple[str, ...], max_shapes: tuple[str, ...], timing_cache: Path | None, plugin: str,
    embed_plugin: bool, in_place: bool, ptx: bool, force: bool,
) -> None:  # fmt: skip
    """Builds an engine from a checkpoint, or from an ONNX folder (target portable).

    TensorRT-RTX (rtx and rtx-...) builds on any machine, without a GPU. TensorRT (tensorrt) builds on its
    own GPU. Of a100, h100, h200, b200, jetson-orin and jetson-thor it writes a kit: what is needed to
    build the engine there with trtexec, and to check it, without Python.

    Images come in batches of 1 to 64,
    best 8; texts in batches of 1 to 8, best 1, with 1 to 2048 new tokens, unless all three shapes of an
    input are given. What is given for one input counts for all that share its axes.

    With --plugin cuda or triton, ONNX folders are of form custom (target cpu), and the engine needs the plugins where
    it is loaded: the last line says how.

    \b
    Examples:
      matexport trt -m half -o half-rtx
      matexport trt -m checkpoint -s half -o half-rtx --min-shapes pixel_values:1x3x8x8 \\
          --opt-shapes pixel_values:16x3x8x8 --max-shapes pixel_values:256x3x8x8
      matexport trt -m half -o engines --target rtx-ampere --target rtx-blackwell
      matexport trt -m half -o half-int4 --dtype float16 --quantize int4
      matexport trt -m half -o half-fp8 --dtype float16 --quantize fp8 --calibration images.npz --target rtx-ada
      matexport trt -m half -o half-fused --plugin cuda --embed-plugin
      matexport trt -m half -o half-ptx --emit-ptx --target rtx-ada --dtype float16
      matexport trt -m half -o half-h100 --target h100
      matexport trt -m half --target tensorrt --dry-run
    """
    if output is None and not dry_run:
        raise click.UsageError("Missing option '-o' / '--output' (or use --dry-run).")
    output = output or Path()
    if ptx:
        of_engines = (
            embed_plugin, in_place, dry_run, min_shapes, opt_shapes, max_shapes, quantize, calibration, timing_cache,
        )  # fmt: skip
        if plugin == "cuda" or any(of_engines):
            raise UsageError("--emit-ptx builds no engine", fix="leave out the options of engines")
        _emit_ptx(model, table, row, output, targets, dtype, force)
        return
    targets = targets or ("rtx",)
    shapes = _profiles({"min": min_shapes, "opt": opt_shapes, "max": max_shapes})
    places = {name: output / name if len(set(targets)) > 1 else output for name in targets}
    for name in places:  # before hours of building, not after
        require_precision(target_named(name, BUILT), quantize)
    if dry_run:
        for name in places:
            _show_plan(plan_engine(model, slice=row, table=table, target=name, shapes=shapes, plugin=plugin))
        return
    measured = load_arrays(calibration, "--calibration")
    for name, place in places.items():
        manifest = build_trt(
            model, place, slice=row, table=table, target=name, shapes=shapes, dtype=dtype, quantize=quantize,
            calibration=measured, plugin=plugin, embed_plugin=embed_plugin, in_place=in_place,
            timing_cache=timing_cache, force=force, warn=note,
        )  # fmt: skip
        size = human_bytes(sum(entry["bytes"] for entry in manifest["files"].values()))
        library = manifest["tensorrt"]
        what = "a kit" if manifest["kind"] == "kit" else f"{library['flavour']} {library['version']}"
        say(f"{place}: {what}, {size}")
        if "plugins" in manifest and "load" in manifest["plugins"]:
            say(f"  to load it: {manifest['plugins']['load']}")
    hint("inspect", "-m", place)


def _show_plan(plan: dict[str, Any]) -> None:
    gpus = " or ".join(map(dotted, plan["capabilities"])) or "of this machine"
    what = f"a kit for {plan['flavour']}" if plan["kind"] == "kit" else f"an engine of {plan['flavour']}"
    say(f"{plan['target']}: {what}, GPUs {gpus}; {plan['slice']}, {plan['parameters']:,} parameters")
    for name, profile in plan["profiles"].items():
        say(f"  profile {name}")
        for inputs, ranges in shape_ranges(profile).items():
            say(f"    {inputs}: {ranges}")
    say(f"  cannot be built here: {plan['missing']}" if plan["missing"] else "  can be made here")


def _emit_ptx(
    model: str, table: str | None, row: str | None, output: Path, targets: tuple[str, ...], dtype: str | None,
    force: bool,
) -> None:  # fmt: skip
    numbers = {n for name in targets for n in target_named(name, BUILT).capabilities}
    if targets and not numbers:
        raise UsageError(f"target {targets[0]!r} is the GPU at hand: which one is it?", fix="name another target")
    chosen = sorted(numbers) or list(CAPABILITIES)
    manifest = emit_ptx(
        model, output, slice=row, table=table, dtype=dtype, capabilities=chosen, force=force,
        progress=lambda number: note(f"compute capability {number // 10}.{number % 10}"),
    )  # fmt: skip
    size = human_bytes(sum(entry["bytes"] for entry in manifest["files"].values()))
    say(f"{output}: kernels for {len(chosen)} compute capabilities, {size}")
    hint("inspect", "-m", output)


def _profiles(groups: dict[str, tuple[str, ...]]) -> dict[str, Profile]:
    """min, opt and max shapes in trtexec's grammar (`name:1x3x8x8`, commas between inputs) by input."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for kind, texts in groups.items():
        for item in (part for text in texts for part in text.split(",")):
            name, _, sizes = item.rpartition(":")
            if not re.fullmatch(r"[0-9]{1,9}(x[0-9]{1,9})*", sizes) or not name:
                raise UsageError(f"{item!r} is not a shape", fix="write NAME:1x3x8x8")
            found.setdefault(name, {})[kind] = tuple(int(size) for size in sizes.split("x"))
    for name, shapes in found.items():
        if len(shapes) != 3:
            raise UsageError(f"input {name!r} needs a minimal, an optimal and a maximal shape", fix="give all three")
    return {name: (shapes["min"], shapes["opt"], shapes["max"]) for name, shapes in found.items()}
