"""Repairing what the MatFormer Lab notebook wrote: right tensors, wrong config.json."""

from __future__ import annotations

from dataclasses import replace

from matexport.checkpoint import Checkpoint
from matexport.errors import CheckpointError
from matexport.families.gemma3n.config import layer_types, repaired_config, text_of
from matexport.families.rows import kept_layers
from matexport.slice_table import Row


def repair(checkpoint: Checkpoint, row: Row | None) -> Checkpoint:
    """The checkpoint with the config.json that it should have had.

    Args:
        row: the row that it was cut with; needed where the skipped layers cannot be inferred.

    Raises:
        CheckpointError: it cannot be inferred, or the row is another one.
        TableError: the row fits no model of the source's depth.
    """
    where = str(checkpoint.path / "config.json")
    text = text_of(checkpoint.config)
    count = len(layer_types(text, 0)) or text.get("num_hidden_layers", 0)
    kept = kept_layers(row, count) if row is not None and type(count) is int else None
    widths = row.ffn.resolve(len(kept)) if row is not None and row.ffn is not None and kept else None
    if widths is not None and text.get("intermediate_size") not in ([*widths], widths[0]):
        what = f"its FFN widths are not those of row {row.name!r}" if row else ""
        raise CheckpointError(what, where=where, fix="name the row that it was cut with: -s ROW")
    return replace(checkpoint, config=repaired_config(checkpoint.config, kept, where))
