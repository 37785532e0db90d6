"""What building TensorRT-RTX engines costs: LM-130M cut to half of its heads, for every RTX target in every precision.

No GPU is used. The source is synthetic: random weights in the released shapes. Each ONNX model is first compared with
the oracle by `matexport verify`; then it is built, once for each target, in a process of its own: seconds, and the peak
memory of the builder's process. Targets of one precision differ little, so one round is enough to see the cost.

    python benchmarks/trt_build.py                     # seven minutes, 1 GB of disk
    python benchmarks/trt_build.py --only float16      # a minute

Results: benchmarks/results/trt-build-CPU.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measuring
import numpy as np
from export import make_source
from measuring import say

import matexport as mx
from matexport.targets import TARGETS
from matexport.tensorrt.precision import METHODS, NEEDS

LIMITS = {"seconds": 15.0, "peak_mib": 2048}
RTX = [target.name for target in TARGETS.values() if target.flavour == "TensorRT-RTX"]
# name -> type of products, how projections are stored, and what has the ops
PRECISIONS = {
    **{dtype: (dtype, None, "none") for dtype in ("float32", "float16", "bfloat16")},
    **{f"float16 {method}": ("float16", method, "none") for method in METHODS},
    **{f"{dtype}, plugins": (dtype, None, "cuda") for dtype in ("float32", "float16", "bfloat16")},
}


def export(source: Path, folder: Path, name: str) -> dict[str, Any]:
    """Writes the model and compares it with the oracle; returns the errors of its logits."""
    dtype, quantize, plugin = PRECISIONS[name]
    method = METHODS[quantize] if quantize else None
    ids = np.random.default_rng(0).integers(0, 50277, (4, 64))
    form = "stock" if plugin == "none" else "custom"
    options: dict[str, Any] = {"target": "cuda", "form": form, "dtype": dtype, "quantize": method}
    mx.export_onnx(source, folder, slice="half", calibration={"input_ids": ids} if method == "fp8" else None, **options)
    report = mx.verify(folder, source, inputs={"input_ids": ids[:1, :24]})
    if not report.passed:
        sys.exit(report.to_markdown())
    return {c.kind: float(f"{c.max_rel:.2g}") for c in report.comparisons if c.name == "logits" and c.max_rel}


def build(folder: Path, output: Path, target: str, plugin: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", str(folder), str(output), target, plugin]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{target}: {done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def child(folder: str, output: str, target: str, plugin: str) -> None:
    started = time.perf_counter()
    manifest = mx.build_trt(folder, output, target=target, plugin=plugin, force=True)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN)  # the builder is this process's only child
    print(json.dumps({
        "seconds": round(seconds, 1), "processor_seconds": round(peak.ru_utime + peak.ru_stime, 1),
        "peak_mib": round(peak.ru_maxrss / 1024), "engine_mb": round(manifest["files"]["model.engine"]["bytes"] / 1e6),
    }))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(PRECISIONS), default=list(PRECISIONS), metavar="PRECISION")
    parser.add_argument("--targets", nargs="*", choices=RTX, default=RTX)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    path = Path(__file__).parent / "results" / f"trt-build-{measuring.cpu()}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"models": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = make_source(folder, "130M", "BF16")
        found |= {
            "model": "MatMamba-LM 130M, half of its heads; prompts and steps in one profile", "limits": LIMITS,
            "machine": measuring.machine(folder), "versions": measuring.versions("tensorrt-rtx", "onnx", "numpy"),
        }  # fmt: skip
        for name in arguments.only:
            quantize, onnx = PRECISIONS[name][1], folder / "onnx"
            say(f"{name}: export, verify")
            entry = found["models"][name] = {"max_rel": export(source, onnx, name), "builds": {}}
            for target in arguments.targets:
                if min(TARGETS[target].capabilities) >= NEEDS.get(quantize or "", 0):
                    say(f"{name}: {target}")
                    entry["builds"][target] = build(onnx, folder / "engine", target, PRECISIONS[name][2])
                    say(f"  {entry['builds'][target]}")
            measuring.write_results(path.name, found)
            shutil.rmtree(onnx)
            shutil.rmtree(folder / "engine", ignore_errors=True)
    say(f"written: {path}")


if __name__ == "__main__":
    main()
