"""The whole way on the trained digits model: every row of the table to a checkpoint, ONNX and a verdict.

Slices each row, exports it to ONNX (the first trained half also to a TensorRT-RTX engine), runs the
held-out digits through onnxruntime and through the oracle (the full model with the slice applied at
run time), and fails unless the predictions are equal. Writes everything, and a size-accuracy plot, into
the folder given (default: demo-out).
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from data import HERE, load_split
from rich.console import Console
from rich.progress import track
from rich.table import Table

import matexport as mx
from matexport.parity.comparison import TOLERANCES, compare
from matexport.runtimes.ort import load_onnx

SOURCE = HERE / "checkpoint"
ENGINE_ROW = "half"


def main(output: Path) -> int:
    images, labels = load_split("heldout")
    inputs = {"pixel_values": images}
    table = Table(
        "row", *("parameters", "bytes", "PyTorch %", "ONNX %", "max rel diff", "verified"), title="held-out digits"
    )
    points, failures = [], []
    rows = mx.load_table(HERE.parents[1] / "slices" / "matmamba-digits.csv").rows
    for row in track(rows, "slicing, exporting, verifying", console=Console(stderr=True), transient=True):
        folder = output / row.name.replace(" ", "-")
        planned = mx.plan(SOURCE, row)
        planned.write(folder / "checkpoint", force=True)
        mx.export_onnx(planned, folder / "onnx", force=True)
        reports = [mx.verify(folder / kind, SOURCE, inputs=inputs) for kind in ("checkpoint", "onnx")]
        want = planned.family.load_oracle(planned.checkpoint, planned.plan.layers)(inputs)["logits"]
        got = load_onnx(folder / "onnx" / "model.onnx")(inputs)["logits"]
        same = np.array_equal(got.argmax(-1), want.argmax(-1))
        ok = same and all(report.passed for report in reports)
        if not ok:
            failures.append(row.name)
        accuracy, accuracy_onnx = (100 * (logits.argmax(-1) == labels).mean() for logits in (want, got))
        difference = compare("logits", "onnx", got, want).max_rel
        cells = f"{planned.plan.parameters:,}", f"{planned.plan.nbytes:,}", f"{accuracy:.2f}", f"{accuracy_onnx:.2f}"
        table.add_row(row.name, *cells, f"{difference:.1e}", "yes" if ok else "[red]NO")
        points.append((planned.plan.nbytes / 1000, accuracy, row.name))
    for column in table.columns[1:]:
        column.justify = "right"
    Console(width=100).print(table)
    print(f"ONNX within {TOLERANCES['onnx']:g} of the oracle, checkpoints bit for bit.")
    manifest = mx.build_trt(output / ENGINE_ROW / "checkpoint", output / ENGINE_ROW / "rtx", force=True)
    engine = manifest["tensorrt"]
    print(f"{ENGINE_ROW}: engine for {engine['flavour']} {engine['version']} built (not run: that needs an RTX GPU).")
    plot(points, output / "size-accuracy.png")
    print(f"plot: {output / 'size-accuracy.png'}")
    if failures:
        print(f"MISMATCH in {', '.join(failures)}", file=sys.stderr)
    return 3 if failures else 0


def plot(points: list[tuple[float, float, str]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for size, accuracy, name in points:
        axes.plot(
            size, accuracy, "o", color="tab:blue" if name in ("full", "half", "quarter", "eighth") else "tab:orange"
        )
        axes.annotate(name, (size, accuracy), textcoords="offset points", xytext=(6, 4), fontsize=8)
    axes.set(
        xlabel="weights (kB)",
        ylabel="held-out accuracy (%)",
        title="One checkpoint, ten models (trained widths in blue)",
    )
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo-out")))
