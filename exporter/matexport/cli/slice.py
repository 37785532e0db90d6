"""`matexport slice`."""

from __future__ import annotations

from pathlib import Path

import click

from matexport import api
from matexport.cli.common import (
    BYTES,
    echo_json,
    echo_table,
    force_option,
    format_option,
    hint,
    human_bytes,
    model_option,
    note,
    pickle_option,
    progress_bar,
    say,
    slice_option,
    table_option,
)


@click.command()
@model_option
@pickle_option
@table_option
@slice_option
@click.option("-o", "--output", metavar="FOLDER", type=click.Path(path_type=Path), help="Where to write.")
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@click.option(
    "--max-shard-size", callback=BYTES, metavar="SIZE", help="Most bytes of tensors in a file (5GB).  [one file]"
)
@click.option("--tokenizer", metavar="FOLDER", help="Tokenizer files to put along, for checkpoints that have none.")
@click.option(
    "--stream", is_flag=True, help="From the Hub: read byte ranges over HTTP instead of downloading weight files."
)
@click.option("--dtype", metavar="NAME", help="Cast the weights: float32, float16 or bfloat16.  [as they are]")
@click.option("--text-only", is_flag=True, help="Gemma 3n: the language model without its towers.")
@click.option("--drop-dead-kv", is_flag=True, help="Gemma 3n: leave out keys and values that no layer reads.")
@click.option("--repair", is_flag=True, help="Put right what the MatFormer Lab notebook wrote; -s is its row.")
@click.option("--strict", is_flag=True, help="NaN or infinity in a kept tensor is an error.")
@click.option("--no-digest", is_flag=True, help="No SHA-256 in the manifest: faster, but it cannot be resumed.")
@click.option("--no-resume", is_flag=True, help="Start over instead of going on from a killed run.")
@force_option
@format_option
def command(
    model: str, allow_pickle: bool, table: str | None, row: str | None, output: Path | None, dry_run: bool,
    max_shard_size: int | None, tokenizer: str | None, stream: bool, dtype: str | None, text_only: bool,
    drop_dead_kv: bool, repair: bool, strict: bool, no_digest: bool, no_resume: bool, force: bool, style: str,
) -> None:  # fmt: skip
    """Writes one row of a slice table as a standalone checkpoint; without -s, the whole model.

    \b
    Examples:
      matexport slice -m checkpoint -s half -o half
      matexport slice -m checkpoint -s '#3' --dry-run --format json
      matexport slice -m google/gemma-3n-E4B-it -s E2.49B -o e2.49b --text-only --stream
      matexport slice -m lab-output --repair -s 'official E2B' -o repaired
    """
    options = [name for name, wanted in (("text_only", text_only), ("drop_dead_kv", drop_dead_kv)) if wanted]
    planned = api.plan(model, row, table=table, options=options, dtype=dtype, repair=repair, allow_pickle=allow_pickle)
    plan = planned.plan
    for text in plan.notes:
        note(text)
    if dry_run:
        if style == "json":
            echo_json(plan.to_json())
        else:
            shapes = [
                [n, t.dtype, str(list(t.shape)), t.view.source, _ranges(t.view.ranges)] for n, t in plan.tensors.items()
            ]
            echo_table(["tensor", "dtype", "shape", "source", "ranges"], shapes, left=5)
            say(f"{plan.parameters:,} parameters, {human_bytes(plan.nbytes)}")
        return
    if output is None:
        raise click.UsageError("Missing option '-o' / '--output' (or use --dry-run).")
    with progress_bar("writing", plan.nbytes) as progress:
        planned.write(
            output, max_shard_size=max_shard_size, force=force, strict=strict, tokenizer=tokenizer, stream=stream,
            digest=not no_digest, resume=not no_resume,
            progress=progress, warn=note,
        )  # fmt: skip
    if style == "json":
        echo_json(
            {"output": str(output), "parameters": plan.parameters, "bytes": plan.nbytes, "notes": list(plan.notes)}
        )
    else:
        size = f"{plan.parameters:,} parameters, {human_bytes(plan.nbytes)}"
        say(f"{output}: {plan.name}, {len(plan.layers)} layers, {size}")
    hint("verify", "-m", output, "--source", model)


def _ranges(ranges: tuple[tuple[tuple[int, int], ...], ...]) -> str:
    return " x ".join("+".join(f"{start}:{stop}" for start, stop in axis) for axis in ranges)
