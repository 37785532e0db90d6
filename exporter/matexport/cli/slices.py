"""`matexport slices`."""

from __future__ import annotations

import click

from matexport import api
from matexport.checkpoint import open_checkpoint
from matexport.cli.common import (
    BYTES,
    COUNT,
    echo_json,
    echo_table,
    format_option,
    hint,
    human_bytes,
    model_option,
    note,
    pickle_option,
    table_option,
)
from matexport.families import family_of
from matexport.pareto import Candidate, best_fit, choose_metric, dominated_by


@click.command()
@model_option
@pickle_option
@table_option
@click.option(
    "--fit", callback=BYTES, metavar="SIZE", help="Choose the best row of at most this many bytes (200KB, 3GB, 1GiB)."
)
@click.option(
    "--fit-params",
    callback=COUNT,
    metavar="COUNT",
    help="Choose the best row of at most this many effective parameters (50K, 2.5B).",
)
@click.option(
    "--metric", metavar="NAME[:min|max]", help="The column that is quality; the first numeric one by default."
)
@format_option
def command(
    model: str,
    allow_pickle: bool,
    table: str | None,
    fit: int | None,
    fit_params: int | None,
    metric: str | None,
    style: str,
) -> None:
    """Lists the rows of a slice table with their exact sizes for this model, from the headers alone.

    A row is dominated if another one is no larger and scores no worse, one of them strictly.

    \b
    Examples:
      matexport slices -m checkpoint
      matexport slices -m checkpoint --fit 200KB --format json
      matexport slices -m checkpoint -c my.csv --metric perplexity:min
    """
    checkpoint = open_checkpoint(model, allow_pickle=allow_pickle)
    family = family_of(checkpoint)
    found, known = api.choose_table(checkpoint, family, table)
    chosen = api.need_table(found, checkpoint)
    candidates = [Candidate(row, family.plan_slice(checkpoint, row, known)) for row in chosen.rows]
    quality = choose_metric(chosen.rows, metric)
    beaten = dominated_by(candidates, quality)
    picking = fit is not None or fit_params is not None
    if picking:
        if quality:
            note(f"best is the {'highest' if quality.higher_is_better else 'lowest'} {quality.column!r} (see --metric)")
        candidates = [best_fit(candidates, quality, max_bytes=fit, max_parameters=fit_params)]
    if style == "json":
        echo_json({"rows": [candidate.to_json(beaten[candidate.row.name]) for candidate in candidates]})
    else:
        metrics = list(dict.fromkeys(title for row in chosen.rows for title in row.metrics))
        # "effective" is what has to be in fast memory, "parameters" the model without its towers
        effective = any(c.plan.effective_parameters != c.plan.model_parameters for c in candidates)
        titles = ["name", "layers", *(["effective"] if effective else []), "parameters", "size"]
        titles += [*metrics, "dominated by"]
        rows = []
        for candidate in candidates:
            plan, row = candidate.plan, candidate.row
            counts = [plan.effective_parameters, plan.model_parameters] if effective else [plan.model_parameters]
            sizes = [str(len(plan.layers)), *(f"{count:,}" for count in counts), human_bytes(plan.nbytes)]
            rows.append([row.name, *sizes, *(row.metrics.get(title, "") for title in metrics), beaten[row.name] or ""])
        echo_table(titles, rows)
    for candidate in candidates:
        for text in candidate.plan.notes:
            note(f"{candidate.row.name}: {text}")
    option = ["-c", table] if table else []
    hint("slice", "-m", model, *option, "-s", candidates[0].row.name if picking else "NAME", "-o", "OUTPUT")
