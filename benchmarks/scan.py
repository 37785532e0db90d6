"""The scan and the convolution of one layer: our kernels against every other way to run them on this CPU.

Outputs are verified first, against float64. Then all ways run interleaved: in each round each way once, a block of
runs after one that is not timed. Ratios are those of one round, a rival's time over ours; slow rivals take part in
fewer rounds. A CPU's fp32 GEMM rate is that of ONNX Runtime's MatMul of 1024 x 1024 matrices, in the same rounds;
FLOPs of a scan are those of its causal form in chunks of 32 steps.

    python benchmarks/scan.py                                     # ten minutes
    python benchmarks/scan.py --quick                             # one minute, fewer lengths; writes nothing
    python benchmarks/scan.py --only 64x24 conv                   # these parts, merged into the results
    python benchmarks/scan.py --mobius FOLDER                     # with mobius-onnx, from pip install --target FOLDER
    python benchmarks/scan.py --only                              # tables of what was measured before

Results: benchmarks/results/scan-CPU.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import measuring
import numpy as np
import scan_ways
import torch
from measuring import say, spread
from scan_ways import OURS, Sizes, Way

from matexport_plugins.causal_conv1d.reference import causal_conv1d
from matexport_plugins.mamba2_scan.reference import mamba2_scan

SHAPES = {f"{h}x{p}": Sizes(h, p) for h, p in ((64, 16), (64, 24), (64, 32), (64, 48), (64, 64), (64, 80), (24, 64))}
SCAN_LENGTHS, CONV_LENGTHS, LONG = (1, 196, 512, 2048), (1, 16, 196, 512, 2048), (2048, 8192, 65536)
PARTS = (*SHAPES, "conv", "long")
CHANNELS, CHUNK, SLOW = 1792, 32, 0.1  # a way that takes longer runs in three rounds only
ATTENTION, EXPANDED = "LinearAttention", "LinearAttention, B and C expanded"
CONV_RIVALS = ("CausalConvWithState", "Conv", "shifted products")


# -------------------------------------------------------------------------------------------- inputs
def scan_inputs(s: Sizes, length: int) -> dict[str, np.ndarray]:
    """One sequence; steps and decays as in a trained model. From a zero state, except for single steps."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    dt = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), s.heads))
    return {
        "x": normal(1, length, s.heads * s.P), "dt_raw": normal(1, length, s.heads) / 2,
        "A": -rng.uniform(1, 16, s.heads).astype(np.float32), "B": normal(1, length, s.N),
        "C": normal(1, length, s.N) / np.float32(np.sqrt(s.N)), "D": normal(s.heads),
        "dt_bias": (dt + np.log(-np.expm1(-dt))).astype(np.float32),
        "state": normal(1, s.heads, s.N, s.P) * np.float32(length == 1),
    }  # fmt: skip


def conv_inputs(length: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"x": (1, length, CHANNELS), "weight": (CHANNELS, 1, 4), "bias": (CHANNELS,), "state": (1, CHANNELS, 3)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def scan_reference(inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    """Step by step in NumPy; long sequences in the torch op in float64, which has to agree on the first 64 steps."""
    along = ("x", "dt_raw", "B", "C")
    first = mamba2_scan(**{k: v[:, :64] if k in along else v for k, v in inputs.items()})
    if inputs["x"].shape[1] <= 64:
        return first
    exact = torch.ops.matexport.mamba2_scan(**{k: torch.from_numpy(v).double() for k, v in inputs.items()})
    y, state = (value.numpy() for value in exact)
    assert error(y[:, :64], first[0]) < 1e-12, "the two float64 references differ"
    return y, state


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


# ------------------------------------------------------------------------------------------ measuring
def measure(
    ways: dict[str, Way], want: tuple[np.ndarray, ...], rounds: int, label: str, slow: float = SLOW
) -> dict[str, Any]:
    """Verifies, then times: the ratios of every way to ours, and the seconds of all."""
    errors = {}
    for name, way in ways.items():
        way.run()
        if name != "gemm":
            found = [error(got, exact) for got, exact in zip(way.results(), want, strict=False)]
            errors[name] = max(found)
            if not errors[name] < (1e-2 if name == scan_ways.OURS_BF16 else 1e-4):
                sys.exit(f"{label}: {name} is off by {errors[name]:.1e}")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for k in range(rounds):
        names = list(ways)
        for name in (*names[k % len(names) :], *names[: k % len(names)]):
            if k >= 3 and statistics.median(seconds[name]) > slow:
                continue
            seconds[name].append(block(ways[name]))
    found: dict[str, Any] = {"error": {name: float(f"{e:.1e}") for name, e in errors.items()}, "ratio": {}}
    for name in ways:
        pairs = zip(seconds[name], seconds[OURS], strict=False)
        if name not in (OURS, "gemm"):
            found["ratio"][name] = spread([theirs / ours for theirs, ours in pairs])
    rivals = [name for name in found["ratio"] if name != scan_ways.OURS_BF16]
    best = min(rivals, key=lambda name: found["ratio"][name]["median"])
    found["best rival"] = best
    say(f"{label}: best rival {best}, {found['ratio'][best]['median']} times our time")
    return found | {"seconds": {name: float(f"{statistics.median(times):.4g}") for name, times in seconds.items()}}


def block(way: Way) -> float:
    """Seconds of one run: the median of a block of at least 10 ms, after a run that warms caches and wakes threads."""
    time.sleep(0.03)  # until other sessions' threads have stopped spinning
    way.run()
    times: list[float] = []
    while sum(times) < 0.01:
        started = time.perf_counter()
        way.run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def flops(s: Sizes, length: int) -> int:
    """Of the causal form in chunks of 32: C S and B x for the state, W x inside a chunk, and C B once for all heads."""
    return length * (s.heads * (4 * s.N * s.P + (CHUNK + 1) * s.P) + (CHUNK + 1) * s.N)


def measure_scan(name: str, length: int, threads: int, rounds: int, mobius: str | None) -> dict[str, Any]:
    s, label = SHAPES[name], f"scan {name} T={length} threads={threads}"
    inputs = scan_inputs(s, length)
    ways = scan_ways.scan_ways(inputs, s, length, threads, mobius)
    if length > 1:
        ways["gemm"] = scan_ways.gemm_way(threads)
    found = measure(ways, scan_reference(inputs), rounds, label)
    if length > 1:
        rate, gemm = flops(s, length) / found["seconds"][OURS], 2 * 1024**3 / found["seconds"]["gemm"]
        found["of gemm rate"] = float(f"{rate / gemm:.3g}")
    return found


def measure_conv(length: int, threads: int, rounds: int) -> dict[str, Any]:
    inputs = conv_inputs(length)
    ways = scan_ways.conv_ways(inputs, length, threads)
    return measure(ways, causal_conv1d(**inputs), rounds, f"conv T={length} threads={threads}")


def measure_long() -> dict[str, Any]:
    """Seconds per step and working memory over length, each in a process of its own."""
    command = [sys.executable, __file__, "--one-long"]
    runs = {n: json.loads(subprocess.check_output([*command, str(n)], text=True)) for n in LONG}
    first = runs[LONG[0]]
    return {
        "seconds per step": {n: float(f"{run['seconds'] / n:.3g}") for n, run in runs.items()},
        "relative cost per step": {
            n: float(f"{run['seconds'] / n / (first['seconds'] / LONG[0]):.3g}") for n, run in runs.items()
        },
        "working memory, MiB": {n: round(run["memory"], 2) for n, run in runs.items()},
    }


def one_long(length: int) -> None:
    """In a process of its own: how much memory a run takes beyond inputs and outputs, and its time."""
    s = Sizes(8, 64)
    inputs = scan_inputs(s, length)
    model = scan_ways.graph_bytes(inputs, lambda g, v: scan_ways.in_form(g, v, s, "custom"), OURS)
    way = scan_ways.ort_way(model, inputs, 1, ours=True, like=("x", "state"))
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    way.run()
    used = memory("VmHWM") - before
    print(json.dumps({"seconds": min(block(way) for _ in range(5)), "memory": used}))


def memory(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


# ------------------------------------------------------------------------------------------- targets
def targets(results: dict[str, Any]) -> list[tuple[str, str, float, float]]:
    """What is asked for: (where, of what, at least, measured), for all that was measured."""
    found = []

    def ask(key: str, what: str, limit: float, value: float | None = None) -> None:
        if key in results:
            ratio = results[key]["ratio"]
            found.append((key, what, limit, ratio[what]["median"] if value is None else value))

    for threads in (1, 2):
        for limit, shapes, lengths in (
            (13, ("64x24", "64x16"), (196, 512)), (4, ("64x48", "64x80"), (512,)), (1.9, ("24x64",), (512, 2048)),
            (1.7, ("64x64",), (512, 2048)), (1.4, ("64x32",), (512, 2048)),
        ):  # fmt: skip
            for shape in shapes:
                for length in lengths:
                    for rival in (ATTENTION, EXPANDED):
                        ask(f"scan {shape} T={length} threads={threads}", rival, limit)
        for shape in SHAPES:
            key = f"scan {shape} T=1 threads={threads}"
            if key in results:
                ask(key, results[key]["best rival"], 0.95)
        for length in CONV_LENGTHS:
            for rival in CONV_RIVALS:
                first = rival == CONV_RIVALS[0]
                if not first or length == 2048:
                    ask(f"conv T={length} threads={threads}", rival, 4 if first else 1)
    for limit, shapes in ((0.9, ("64x64", "24x64")), (0.75, ("64x24",))):
        for shape in shapes:
            for length in (512, 2048):
                key = f"scan {shape} T={length} threads=1"
                if key in results:
                    ask(key, "GEMM rate", limit, results[key]["of gemm rate"])
    return found


def show(results: dict[str, Any]) -> None:
    """Tables in Markdown, and every target with what was measured, the worst first."""
    for kind in ("scan", "conv"):
        rows = {key: found for key, found in results.items() if key.startswith(kind)}
        ways = list(dict.fromkeys(way for found in rows.values() for way in found["ratio"]))
        if rows:
            print("\n| ", " | ".join([kind, *ways, *["of the GEMM rate"] * (kind == "scan")]), " |", sep="")
            print("|---" * (len(ways) + 1 + (kind == "scan")), "|", sep="")
        for key, found in rows.items():
            cells = [found["ratio"].get(way, {}).get("median", "") for way in ways]
            if kind == "scan":
                cells.append(f"{found['of gemm rate']:.0%}" if "of gemm rate" in found else "")
            print(f"| {key.removeprefix(kind + ' ')} |", " | ".join(map(str, cells)), "|")
    for what, values in results.get("long", {}).items():
        print(f"\n{what}: {values}")
    print()
    for key, what, limit, value in sorted(targets(results), key=lambda row: row[3] / row[2]):
        print(f"{'met   ' if value >= limit else 'MISSED'} {key}: {what} {value}, at least {limit}")


def results_path() -> Path:
    return Path(__file__).parent / "results" / f"scan-{measuring.cpu()}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--mobius", metavar="FOLDER", help="where mobius-onnx and what it needs were installed")
    parser.add_argument("--one-long", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one_long:
        return one_long(args.one_long)
    path, rounds = results_path(), 3 if args.quick else 7
    versions = measuring.versions("numpy", "onnxruntime", "torch")
    if args.mobius:
        (found,) = importlib.metadata.distributions(name="mobius-onnx", path=[args.mobius])
        versions["mobius-onnx"] = found.version
    content = {"machine": measuring.machine(Path.cwd()), "versions": versions, "results": {}}
    if path.exists() and not args.quick:
        earlier = json.loads(path.read_text())
        same = ("onnxruntime", "torch", "numpy")
        if all(earlier["versions"][name] == versions[name] for name in same):  # else all has to be measured again
            content |= {"results": earlier["results"], "versions": earlier["versions"] | versions}
    results = content["results"]
    lengths = (1, 512) if args.quick else None
    for part in args.only:
        if part == "long":
            results["long"] = measure_long()
            continue
        for threads in (1,) if args.quick else (1, 2):
            for length in lengths or (CONV_LENGTHS if part == "conv" else SCAN_LENGTHS):
                name = f"conv T={length}" if part == "conv" else f"scan {part} T={length}"
                if part == "conv":
                    found = measure_conv(length, threads, rounds)
                else:
                    found = measure_scan(part, length, threads, rounds, args.mobius)
                results[f"{name} threads={threads}"] = found
    if args.only and not args.quick:
        measuring.write_results(path.name, content)
    show(results)


if __name__ == "__main__":
    main()
