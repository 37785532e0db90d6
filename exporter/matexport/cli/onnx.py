"""`matexport onnx`."""

from __future__ import annotations

from pathlib import Path

import click

from matexport import api
from matexport.cli.common import (
    force_option,
    hint,
    model_option,
    note,
    output_option,
    pickle_option,
    progress_bar,
    say,
    slice_option,
    table_option,
)
from matexport.targets import FORMS, TARGETS


@click.command()
@model_option
@pickle_option
@table_option
@slice_option
@output_option
@click.option(
    "--target", default="cpu", show_default=True, metavar="NAME",
    help=f"Deployment target: {', '.join(t.name for t in TARGETS.values() if t.kind == 'onnx')}.",
)  # fmt: skip
@click.option("--form", type=click.Choice(FORMS), help="How the scan appears in the graph.  [the target's]")
@force_option
def command(
    model: str,
    allow_pickle: bool,
    table: str | None,
    row: str | None,
    output: Path,
    target: str,
    form: str | None,
    force: bool,
) -> None:
    """Writes ONNX from a full checkpoint and a row, or from a sliced checkpoint.

    The output is a folder with model.onnx and its weights; a name that ends in .onnx gives that file
    instead, with its weights beside it.

    \b
    Examples:
      matexport onnx -m checkpoint -s half -o half-onnx
      matexport onnx -m half -o half.onnx --form stock
    """
    planned = api.plan(model, row, table=table, allow_pickle=allow_pickle)
    for text in planned.plan.notes:
        note(text)
    with progress_bar("writing", planned.plan.nbytes) as progress:
        api.export_onnx(planned, output, target=target, form=form, force=force, progress=progress)
    say(f"{output}: {planned.plan.name}, {planned.plan.parameters:,} parameters, target {target}")
    hint("verify", "-m", output, "--source", model)
