"""`matexport onnx`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from matexport import api
from matexport.cli.common import (
    force_option,
    hint,
    load_arrays,
    model_option,
    note,
    pickle_option,
    progress_bar,
    say,
    table_option,
)
from matexport.errors import UsageError
from matexport.graph.encoding import METHODS
from matexport.targets import FORMS, TARGETS


@click.command()
@model_option
@pickle_option
@table_option
@click.option(
    "-s", "--slice", "rows", metavar="NAME", multiple=True,
    help="Row: its name, #3 for the third one, or a unique part of its name. Several give an elastic bundle.",
)  # fmt: skip
@click.option("-o", "--output", metavar="PATH", type=click.Path(path_type=Path), help="Where to write.")
@click.option("--in-place", is_flag=True, help="Put model.onnx beside the checkpoint's own weights, and use them.")
@click.option(
    "--target", default="cpu", show_default=True, metavar="NAME",
    help=f"Deployment target: {', '.join(t.name for t in TARGETS.values() if t.kind == 'onnx')}.",
)  # fmt: skip
@click.option("--form", type=click.Choice(FORMS), help="How the scan appears in the graph.  [the target's]")
@click.option("--dtype", metavar="NAME", help="Store weights as float32, float16 or bfloat16.  [the target's]")
@click.option(
    "--quantize", type=click.Choice(METHODS),
    help="Store projections in fewer bits: int8 for long inputs and images, the block methods for decoding; those for"
    " TensorRT with target cuda.",
)  # fmt: skip
@click.option(
    "--calibration", metavar="NPZ", type=click.Path(path_type=Path),
    help="For fp8: inputs by name, on which the scales of activations are measured.",
)  # fmt: skip
@click.option(
    "--opset", type=int, metavar="N",
    help="Of ai.onnx. Gemma 3n knows 23 too: fused operators, for ONNX Runtime 1.23 and newer.  [21]",
)  # fmt: skip
@click.option(
    "--split-embeddings", is_flag=True,
    help="Gemma 3n: two graphs, embed_tokens.onnx with the tables and decoder_model_merged.onnx with the rest.",
)  # fmt: skip
@force_option
def command(
    model: str, allow_pickle: bool, table: str | None, rows: tuple[str, ...], output: Path | None, in_place: bool,
    target: str, form: str | None, dtype: str | None, quantize: str | None, calibration: Path | None,
    opset: int | None, split_embeddings: bool, force: bool,
) -> None:  # fmt: skip
    """Writes ONNX from a full checkpoint and a row, or from a sliced checkpoint.

    The output is a folder with model.onnx and its weights; a name that ends in .onnx gives that file
    instead, with its weights beside it. Several rows share one weights file, with a graph for each:
    an elastic bundle. Computed is in float32, whatever weights are stored as, but for target cuda, whose
    products are computed in --dtype, by default float16.

    \b
    Examples:
      matexport onnx -m checkpoint -s half -o half-onnx
      matexport onnx -m half -o half.onnx --form stock
      matexport onnx -m checkpoint -s half -o half-int4 --quantize int4-block
      matexport onnx -m half --in-place
      matexport onnx -m gemma -s E2.49B -o e2.49b-onnx --split-embeddings
      matexport onnx -m checkpoint -s full -s half -s quarter -o elastic
    """
    if in_place and (rows or output or dtype or quantize or calibration):
        fix = "leave out -s, -o, --dtype, --quantize and --calibration; slice it first"
        raise UsageError("--in-place takes a checkpoint as it is", fix=fix)
    if (in_place or len(rows) > 1) and (opset or split_embeddings):
        fix = "leave out --opset and --split-embeddings, or write one row with -o"
        raise UsageError("--in-place and elastic bundles are one graph each, at opset 21", fix=fix)
    if len(rows) > 1 and (quantize or calibration):
        raise UsageError("an elastic bundle cannot be quantised", fix="export each row by itself")
    if not in_place and output is None:
        raise UsageError("there is no output", fix="name it with -o, or use the checkpoint's own weights: --in-place")
    planned = [api.plan(model, row, table=table, allow_pickle=allow_pickle) for row in rows or (None,)]
    for text in dict.fromkeys(text for each in planned for text in each.plan.notes):
        note(text)
    first = planned[0].plan
    if in_place:
        written = api.export_in_place(planned[0], target=target, form=form, force=force)
        say(f"{written}: {first.name}, {first.parameters:,} parameters, target {target}")
        hint("verify", "-m", written, "--source", model)
        return
    assert output is not None
    with progress_bar("writing", max(each.plan.nbytes for each in planned)) as progress:
        options: dict[str, Any] = {"target": target, "form": form, "dtype": dtype, "force": force, "progress": progress}
        if len(planned) == 1:
            given = load_arrays(calibration, "--calibration")
            options |= {"quantize": quantize, "calibration": given, "opset": opset}
            options["split_embeddings"] = split_embeddings
            api.export_onnx(planned[0], output, **options)
            stored = f", {quantize}" if quantize else ""
            say(f"{output}: {first.name}, {first.parameters:,} parameters, target {target}{stored}")
        else:
            for name, file in api.export_bundle(planned, output, **options).items():
                say(f"{output / file}: {name}, target {target}")
    hint("verify", "-m", output, "--source", model)
