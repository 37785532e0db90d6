"""Writes slices/matmamba-digits.csv: every row's accuracy on the held-out digits, measured with the oracle.

python examples/digits/measure.py
"""

from pathlib import Path

from data import HERE, load_split

import matexport as mx
from matexport.dims import Dims
from matexport.slice_table import Row, format_table

TABLE = HERE.parents[1] / "slices" / "matmamba-digits.csv"
METRIC = "Held-out accuracy"

ROWS = (
    # the widths that were trained
    Row("full", mamba=Dims(fill=64)),
    Row("half", mamba=Dims(fill=32)),
    Row("quarter", mamba=Dims(fill=16)),
    Row("eighth", mamba=Dims(fill=8)),
    # Mix'n'Match: trained widths, mixed over the layers
    Row("narrowing", mamba=Dims(head=(64, 32, 16, 8))),
    Row("widening", mamba=Dims(head=(8, 16, 32, 64))),
    Row("half then eighth", mamba=Dims(head=(32, 32, 8, 8))),
    Row("eighth then half", mamba=Dims(head=(8, 8, 32, 32))),
    Row("slim ends", mamba=Dims(head=(8, 32, 32, 8))),
    # depth was never trained
    Row("half without layer 2", skipped=(2,), mamba=Dims(fill=32)),
)


def measured(row: Row) -> Row:
    """The row with its layers, and its accuracy in per cent as its metric."""
    planned = mx.plan(HERE / "checkpoint", row)
    images, labels = load_split("heldout")
    logits = planned.family.load_oracle(planned.checkpoint, planned.plan.layers)({"pixel_values": images})["logits"]
    accuracy = f"{100 * (logits.argmax(-1) == labels).mean():.2f}%"
    return Row(row.name, row.skipped, mamba=row.mamba, layers=len(planned.plan.layers), metrics={METRIC: accuracy})


if __name__ == "__main__":
    Path(TABLE).write_text(format_table([measured(row) for row in ROWS]))
    print(f"wrote {TABLE}")
