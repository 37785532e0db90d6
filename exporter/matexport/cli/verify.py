"""`matexport verify`."""

from __future__ import annotations

from pathlib import Path

import click

from matexport import api
from matexport.cli.common import (
    echo_json,
    format_option,
    load_arrays,
    note,
    pickle_option,
    slice_option,
    table_option,
)
from matexport.errors import MismatchError


@click.command()
@click.option("-m", "--model", required=True, metavar="FOLDER", help="The artefact.")
@pickle_option
@click.option("--source", required=True, metavar="MODEL", help="What it was made from: FOLDER or ORG/NAME[@REVISION].")
@table_option
@slice_option
@click.option(
    "--inputs", metavar="NPZ", type=click.Path(path_type=Path), help="Inputs by name; random ones by default."
)
@click.option("--report", metavar="FILE", type=click.Path(path_type=Path), help="Also write the report as Markdown.")
@format_option
def command(
    model: str,
    allow_pickle: bool,
    source: str,
    table: str | None,
    row: str | None,
    inputs: Path | None,
    report: Path | None,
    style: str,
) -> None:
    """Proves that an artefact is a slice of its source and computes the same function.

    Every weight must be, bit for bit, the part of the source that the slice says it is. Outputs are
    compared with the oracle: the source, in fp32, with the slice applied at run time. A checkpoint must
    equal it bit for bit, an ONNX file within 1e-5 of the largest output. -s is needed only for a
    checkpoint without a manifest. Exit code 3 if anything differs.

    Inputs are pixel_values, or input_ids. For input_ids, and for images with their labels, the report
    has the perplexity or accuracy of an ONNX file beside its source's: what quantising costs.

    \b
    Examples:
      matexport verify -m half --source checkpoint
      matexport verify -m half-onnx --source checkpoint --inputs golden.npz --format json
    """
    found = api.verify(
        model,
        source,
        slice=row,
        table=table,
        inputs=load_arrays(inputs, "--inputs"),
        allow_pickle=allow_pickle,
        progress=_say,
    )
    markdown = found.to_markdown()
    if style == "json":
        echo_json(found.to_json())
    else:
        click.echo(markdown)
    if report:
        try:
            report.write_text(markdown)
        except OSError as e:
            note(f"the report cannot be written to {report}: {e.strerror}")
    if not found.passed:
        worst = found.worst
        assert worst is not None
        raise MismatchError(
            f"{worst.kind} of {worst.name!r} fails"
            + (f": {worst.detail}" if worst.detail else f": max rel {worst.max_rel:.2g}"),
            where=model,
            fix="write the artefact again from this source",
        )


def _say(text: str) -> None:
    click.echo(f"checking {text} ...", err=True)
