"""ONNX exports of MatMamba language models at scale: time, memory, and what switching rows costs.

The sources are synthetic: random weights in the released names and shapes (130M: 24 layers, 370M: 48, 1.4B: 48).

- Writing the 1.4B shape: the graph alone (put beside the weights that it uses), and the half-width row as a new folder
  from bf16, against a copy of the same bytes that is synced too. Peak memory is VmHWM of the process.
- Quantising a matrix against ONNX Runtime's own quantiser, as `MatMulNBitsQuantizer` calls it.
- An elastic bundle: in one process, full width is open, and the session of another row is opened. Its time over what
  it may take (100 ms at 24 layers, 200 ms at 48), the anonymous memory that it adds over the bytes of its weights, and
  speeds of the mapped weights over those of a session that packs its own.

    python benchmarks/export.py --keep FOLDER          # 9 GB of disk
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measuring
import numpy as np
from slice_matmamba import SIZES, shapes

LIMITS = {"graph_seconds": 2.0, "peak_mib": 400, "open_seconds": {24: 0.1, 48: 0.2}, "anonymous": 0.05, "quantise": 2.0}
ROWS = ("full", "half", "quarter")


def make_source(folder: Path, size: str, dtype: str) -> Path:
    """A checkpoint in the released names: random finite weights of sensible magnitude."""
    source = folder / f"matmamba-{size}-{dtype}"
    if (source / "config.json").exists():
        return source
    source.mkdir(parents=True)
    d, layers = SIZES[size]
    rng, header, end = np.random.default_rng(0), {}, 0
    item = 2 if dtype == "BF16" else 4
    for name, shape in shapes(d, layers).items():
        start, end = end, end + item * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with (source / "model.safetensors").open("wb") as f:
        f.write(len(raw).to_bytes(8, "little") + raw)
        for shape in shapes(d, layers).values():
            values = rng.standard_normal(int(np.prod(shape)), dtype=np.float32) * np.float32(0.02)
            f.write((values.view(np.uint32) >> 16).astype(np.uint16).data if dtype == "BF16" else values.data)
    config = {
        "d_model": d, "d_intermediate": 0, "n_layer": layers, "vocab_size": 50277, "ssm_cfg": {}, "attn_layer_idx": [],
        "attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True,
        "pad_vocab_size_multiple": 8, "tie_embeddings": True,
    }  # fmt: skip
    (source / "config.json").write_text(json.dumps(config))
    return source


# ------------------------------------------------------------------------------------ child processes
def child(name: str, *arguments: str) -> Any:
    command = [sys.executable, __file__, "--child", name, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def export(source: str, output: str, *rows: str) -> None:
    """`matexport onnx` of a row, or in place without one."""
    from matexport import api

    def work() -> None:
        if rows:
            api.export_onnx(api.plan(source, rows[0]), output)
            measuring.sync_folder(Path(output))
        else:
            api.export_in_place(source, force=True)

    measuring.report(work)


def copy(source: str, output: str) -> None:
    measuring.report(lambda: measuring.copy_folder(Path(source), Path(output)))


def switch(folder: str, first: str, second: str, prepack: str) -> None:
    """Opens one row, then another; prints times, anonymous memory, and seconds of a step and of a prompt."""
    import onnxruntime as ort

    from matexport.runtimes.ort import kernels

    def anonymous() -> int:
        status = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in status if line.startswith("RssAnon")).split()[1])

    def opened(name: str) -> tuple[Any, float, int]:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        options.add_session_config_entry("session.disable_prepacking", "0" if prepack == "1" else "1")
        options.register_custom_ops_library(str(kernels()))
        before, started = anonymous(), time.perf_counter()
        session = ort.InferenceSession(Path(folder, f"{name}.onnx"), options, providers=["CPUExecutionProvider"])
        return session, time.perf_counter() - started, anonymous() - before

    def run(session: Any, length: int) -> float:
        states = {i.name: np.zeros([1, *i.shape[1:]], np.float32) for i in session.get_inputs() if "past" in i.name}
        ids = np.arange(length, dtype=np.int64)[None]
        times = []
        for _ in range(5):
            started = time.perf_counter()
            session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids), **states})
            times.append(time.perf_counter() - started)
        return sorted(times)[2]

    held, _, _ = opened(first)
    run(held, 8)
    session, seconds, added = opened(second)
    print(json.dumps({"seconds": seconds, "added": added, "step": run(session, 1), "prompt": run(session, 128)}))


# --------------------------------------------------------------------------------------- the benchmark
def writing(folder: Path, runs: int) -> dict[str, Any]:
    source = make_source(folder, "1.4B", "BF16")
    out, ready = folder / "out", folder / "ready"
    child("export", str(source), str(ready), "half")
    verify_half(source, ready)
    graph = [child("export", str(source), "") for _ in range(runs)]
    files = measuring.files_of(source, ready)
    ratios, peaks = [], []
    for k in range(runs):
        measuring.say(f"writing: round {k + 1} of {runs}")
        seconds = {}
        for name, arguments in (("copy", [str(ready)]), ("export", [str(source)])):
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            for path in files:
                path.read_bytes() if path.stat().st_size < 1 << 20 else measuring._into_cache(path)
            found = child(name, *arguments, str(out), *(["half"] if name == "export" else []))
            seconds[name] = found["seconds"]
            if name == "export":
                peaks.append(found["peak_mib"])
        ratios.append(seconds["copy"] / seconds["export"])
    shutil.rmtree(out)
    nbytes = (ready / "model.onnx_data").stat().st_size
    shutil.rmtree(ready)
    for name in ("model.onnx", "model.onnx.json"):
        (source / name).unlink()
    return {
        "model": "1.4B, bf16",
        "graph_time_over_limit": measuring.spread([g["seconds"] / LIMITS["graph_seconds"] for g in graph]),
        "graph_peak_mib": round(max(g["peak_mib"] for g in graph)),
        "half_bytes": nbytes,
        "half_speed_of_copy": measuring.spread(ratios),
        "half_peak_mib": round(max(peaks)),
    }


def verify_half(source: Path, output: Path) -> None:
    """Every weight of the export, by the onnx library, against NumPy views of the source: some rows of each."""
    import onnx

    from matexport.checkpoint import open_checkpoint

    held = open_checkpoint(source).tensors
    for weight in onnx.load(output / "model.onnx", load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in weight.external_data}
        if not place or not weight.name.endswith("out_proj.weight"):
            continue
        d, w = weight.dims
        tensor = held[weight.name]
        full = np.memmap(tensor.file, np.uint16, "r", tensor.start, tensor.shape)[:, :w]
        got = np.memmap(output / place["location"], np.float32, "r", int(place["offset"]), (d, w))
        if not np.array_equal(got, (full.astype(np.uint32) << 16).view(np.float32)):
            sys.exit(f"{weight.name} is wrong")


def quantising(runs: int, n: int = 4096, k: int = 2048) -> dict[str, Any]:
    """A matrix, ours in blocks of rows as the writer does, theirs at once."""
    from onnxruntime.capi import _pybind_state as runtime

    from matexport.graph.encoding import BLOCK, PARTS, Encoding
    from matexport.onnx.weights import _in_threads

    rows = np.random.default_rng(0).standard_normal((n, k), dtype=np.float32)
    found = {}
    for method, bits, theirs in (
        ("int4-block", 4, runtime.quantize_matmul_4bits), ("int8-block", 8, runtime.quantize_matmul_8bits),
    ):  # fmt: skip
        codes, zeros = np.zeros((n, k // BLOCK, BLOCK * bits // 8), np.uint8), np.zeros(n * k // BLOCK, np.uint8)
        scales, ratios = np.zeros(n * k // BLOCK, np.float32), []
        for _ in range(runs):
            started = time.perf_counter()
            mine = {
                part: np.concatenate(list(_in_threads(Encoding(method, part).encode, np.split(rows, 32))))
                for part in PARTS
            }
            middle = time.perf_counter()
            theirs(codes, np.ascontiguousarray(rows.T), scales, zeros[: len(zeros) * bits // 8], BLOCK, n, k, True)
            ratios.append((time.perf_counter() - middle) / (middle - started))
        if (mine["codes"] != codes).mean() > 1e-3 or not np.array_equal(mine["scales"].reshape(-1), scales):
            sys.exit(f"{method}: codes differ")
        found[method] = measuring.spread(ratios)
    return {"speed_over_onnxruntime": found}


def switching(folder: Path, size: str, runs: int) -> dict[str, Any]:
    from matexport import api

    layers = SIZES[size][1]
    source, bundle = make_source(folder, size, "F32"), folder / "bundle"
    shutil.rmtree(bundle, ignore_errors=True)
    api.export_bundle([api.plan(source, row) for row in ROWS], bundle)
    verify_bundle(bundle)
    found: dict[str, Any] = {"model": size, "layers": layers, "rows": {}}
    for row in ROWS[1:]:
        weights = sum(int(p["length"]) for p in places(bundle / f"{row}.onnx"))
        mapped, packed = [], []
        for k in range(runs):
            measuring.say(f"{size}, {row}: round {k + 1} of {runs}")
            mapped.append(child("switch", str(bundle), "full", row, "0"))
            packed.append(child("switch", str(bundle), "full", row, "1"))
        pairs = list(zip(mapped, packed, strict=True))
        found["rows"][row] = {
            "open_time_over_limit": measuring.spread([m["seconds"] / LIMITS["open_seconds"][layers] for m in mapped]),
            "anonymous_over_weights": measuring.spread([m["added"] / weights for m in mapped]),
            "packed_anonymous_over_weights": measuring.spread([p["added"] / weights for p in packed]),
            "open_time_over_packed": measuring.spread([m["seconds"] / p["seconds"] for m, p in pairs]),
            "step_time_over_packed": measuring.spread([m["step"] / p["step"] for m, p in pairs]),
            "prompt_128_time_over_packed": measuring.spread([m["prompt"] / p["prompt"] for m, p in pairs]),
        }
    shutil.rmtree(bundle)
    shutil.rmtree(source)
    return found


def places(model: Path) -> list[dict[str, str]]:
    import onnx

    graph = onnx.load(model, load_external_data=False).graph
    return [{e.key: e.value for e in i.external_data} for i in graph.initializer if i.external_data]


def verify_bundle(bundle: Path) -> None:
    """Every row lies in the one file, which is no larger than the widest row needs."""
    full = sum(int(place["length"]) for place in places(bundle / "full.onnx"))
    if (bundle / "model.onnx_data").stat().st_size > 1.01 * full + (1 << 20):
        sys.exit("the bundle stores weights twice")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="work there, and leave the 1.4B source for other runs"
    )
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return globals()[args.child[0]](*args.child[1:])
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.keep or ".") as temporary:
        folder = Path(args.keep or temporary)
        report = {
            "runs": args.runs,
            "machine": measuring.machine(folder),
            "versions": measuring.versions("matexport", "numpy", "onnx", "onnxruntime"),
            "quantising": quantising(args.runs),
            "switching": [switching(Path(temporary), size, args.runs) for size in ("130M", "370M")],
            "writing": writing(folder, args.runs),
        }
    print(json.dumps(report, indent=1))
    measuring.say(f"written: {measuring.write_results('export-matmamba.json', report)}")


if __name__ == "__main__":
    main()
