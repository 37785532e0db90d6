"""Repairing what the MatFormer Lab notebook wrote: right tensors, wrong config.json."""

from __future__ import annotations

from dataclasses import replace

from matexport.checkpoint import Checkpoint
from matexport.errors import CheckpointError, UsageError
from matexport.families.gemma3n.config import faults, layer_types, repaired_config, text_of
from matexport.families.rows import kept_layers
from matexport.slice_table import Row


def repair(checkpoint: Checkpoint, row: Row | None) -> Checkpoint:
    """The checkpoint with the config.json that it should have had.

    Args:
        row: the row that it was cut with; needed where the skipped layers cannot be inferred.

    Raises:
        CheckpointError: it cannot be inferred, or the row is another one.
        TableError: the row fits no model of the source's depth.
        UsageError: nothing of it needs repair.
    """
    where = str(checkpoint.path / "config.json")
    if not faults(checkpoint.config):
        raise UsageError("nothing of it needs repair", where=where, fix="leave out --repair")
    if row is None:
        return replace(checkpoint, config=repaired_config(checkpoint.config, None, where))
    text = text_of(checkpoint.config)
    layers, width = text.get("num_hidden_layers"), text.get("intermediate_size")
    kept = kept_layers(row, len(layer_types(text, layers if type(layers) is int else 0)))
    widths = row.ffn.resolve(len(kept)) if row.ffn is not None else None
    if widths is not None and (width if isinstance(width, list) else [width] * len(widths)) != list(widths):
        fix = "name the row that it was cut with: -s ROW"
        raise CheckpointError(f"its FFN widths are not those of row {row.name!r}", where=where, fix=fix)
    return replace(checkpoint, config=repaired_config(checkpoint.config, kept, where))
