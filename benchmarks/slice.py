"""Slicing at scale: a MatMamba-LM 1.4B shape to level 4, against copying the same bytes and against torch.

Sources are synthetic (random bytes in the released names and shapes): an fp32 `pytorch_model.bin`, as
released, and bf16 safetensors. Every way runs in a process of its own, interleaved; outputs are
compared tensor by tensor before anything is timed. All ways end with fsync. Ratios and peak memory
(VmHWM) go to benchmarks/results/slice.json.

    python benchmarks/slice.py                  # 1.4B: 8 GB of disk, about ten minutes
    python benchmarks/slice.py --model 130M --runs 3
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SIZES = {"130M": (768, 24), "370M": (1024, 48), "790M": (1536, 48), "1.4B": (2048, 48)}
HEADS, STATE, ROWS = 64, 128, 50280


def shapes(d: int, layers: int) -> dict[str, tuple[int, ...]]:
    w = 2 * d
    found: dict[str, tuple[int, ...]] = {"backbone.embedding.weight": (ROWS, d)}
    for i in range(layers):
        m = f"backbone.layers.{i}.mixer."
        found |= {
            f"backbone.layers.{i}.norm.weight": (d,),
            m + "dt_bias": (HEADS,),
            m + "A_log": (HEADS,),
            m + "D": (HEADS,),
            m + "in_proj.weight": (2 * w + 2 * STATE + HEADS, d),
            m + "conv1d.weight": (w + 2 * STATE, 1, 4),
            m + "conv1d.bias": (w + 2 * STATE,),
            m + "norm.weight": (w,),
            m + "out_proj.weight": (d, w),
        }
    return {**found, "backbone.norm_f.weight": (d,)}


def make_sources(folder: Path, model: str) -> dict[str, Path]:
    """Both sources, with the same kind of values."""
    import torch
    from safetensors.torch import save_file

    d, layers = SIZES[model]
    config = {
        "d_model": d, "d_intermediate": 0, "n_layer": layers, "vocab_size": 50277, "ssm_cfg": {}, "attn_layer_idx": [],
        "attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True,
        "pad_vocab_size_multiple": 8, "tie_embeddings": True,
    }  # fmt: skip
    rng = np.random.default_rng(0)
    found = {}
    for name, dtype in (("pickle-fp32", torch.float32), ("safetensors-bf16", torch.bfloat16)):
        found[name] = folder / name
        found[name].mkdir()
        (found[name] / "config.json").write_text(json.dumps(config))
        state = {
            key: torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).to(dtype)
            for key, shape in shapes(d, layers).items()
        }
        if dtype is torch.float32:
            state["lm_head.weight"] = state["backbone.embedding.weight"]
            torch.save(state, found[name] / "pytorch_model.bin")
        else:
            save_file(state, found[name] / "model.safetensors", metadata={"format": "pt"})
    return found


# ------------------------------------------------------------------------- the ways, one process each
def ours(source: Path, output: Path, _: Path) -> None:
    import matexport as mx

    mx.plan(source, "quarter", allow_pickle=True).write(output)


def torch_slice(source: Path, output: Path, _: Path) -> None:
    """What a script does today: load everything, slice, save."""
    import torch
    from safetensors.torch import load_file, save_file

    pickled = source / "pytorch_model.bin"
    state = torch.load(pickled, weights_only=True) if pickled.exists() else load_file(source / "model.safetensors")
    d, d_inner = state["backbone.norm_f.weight"].shape[0], state["backbone.layers.0.mixer.norm.weight"].shape[0]
    w, h = d_inner // 4, HEADS // 4
    out = {}
    for name, t in state.items():
        part = name.split("mixer.")[-1]
        if name == "lm_head.weight":
            continue
        if part == "in_proj.weight":
            z, x, bc, dt = t.split([d_inner, d_inner, 2 * STATE, HEADS])
            t = torch.cat([z[:w], x[:w], bc, dt[:h]])
        elif part.startswith("conv1d."):
            t = torch.cat([t[:w], t[d_inner:]])
        elif part in ("dt_bias", "A_log", "D"):
            t = t[:h]
        elif part == "norm.weight" and "mixer" in name:
            t = t[:w]
        elif part == "out_proj.weight":
            t = t[:, :w]
        out[name.replace("embedding.", "embeddings.")] = t.contiguous()
    assert d == out["backbone.norm_f.weight"].shape[0]
    output.mkdir()
    save_file(out, output / "model.safetensors", metadata={"format": "pt"})
    sync(output / "model.safetensors")


def copy(_: Path, output: Path, ready: Path) -> None:
    """A copy of the same output bytes."""
    output.mkdir()
    shutil.copyfile(ready / "model.safetensors", output / "model.safetensors")
    sync(output / "model.safetensors")


def sync(path: Path) -> None:
    for target in (path, path.parent):
        fd = os.open(target, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


WAYS = {"matexport": ours, "torch": torch_slice, "copy": copy}


def run(way: str, source: Path, output: Path, ready: Path) -> dict[str, float]:
    """One run in a process of its own, after the page cache was warmed and old writes synced."""
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    command = [sys.executable, __file__, "--one", way, str(source), str(output), str(ready)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def one(way: str, source: str, output: str, ready: str) -> None:
    started = time.perf_counter()
    WAYS[way](Path(source), Path(output), Path(ready))
    seconds = time.perf_counter() - started
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(line for line in status if line.startswith("VmHWM"))
    print(json.dumps({"seconds": seconds, "peak_mib": int(peak.split()[1]) / 1024}))


def same(a: Path, b: Path) -> bool:
    from matexport.checkpoint import read_header

    first, second = read_header(a / "model.safetensors"), read_header(b / "model.safetensors")

    def content(tensors: dict, name: str) -> bytes:
        with tensors[name].file.open("rb") as f:
            f.seek(tensors[name].start)
            return f.read(tensors[name].nbytes)

    return first.keys() == second.keys() and all(content(first, name) == content(second, name) for name in first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="1.4B")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return one(*args.one)
    report: dict[str, object] = {"model": args.model, "row": "quarter", "runs": args.runs, "sources": {}}
    with tempfile.TemporaryDirectory(dir=".") as temporary:
        folder = Path(temporary)
        for name, source in make_sources(folder, args.model).items():
            ready, theirs = folder / "ready", folder / "theirs"
            run("matexport", source, ready, ready)
            run("torch", source, theirs, ready)
            assert same(ready, theirs), f"{name}: outputs differ"
            shutil.rmtree(theirs)
            runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
            for _ in range(args.runs):
                for way in WAYS:
                    runs[way].append(run(way, source, folder / "out", ready))
            ratios = {
                way: [
                    ours["seconds"] / other["seconds"] for ours, other in zip(runs["matexport"], runs[way], strict=True)
                ]
                for way in WAYS
            }
            report["sources"][name] = {  # type: ignore[index]
                "output_bytes": (ready / "model.safetensors").stat().st_size,
                "time_relative_to": {
                    way: {"median": round(statistics.median(r), 3), "range": [round(min(r), 3), round(max(r), 3)]}
                    for way, r in ratios.items()
                    if way != "matexport"
                },
                "peak_mib": {way: round(max(r["peak_mib"] for r in found)) for way, found in runs.items()},
            }
            print(name, json.dumps(report["sources"][name]), flush=True)  # type: ignore[index]
            shutil.rmtree(ready)
    results = Path(__file__).parent / "results" / f"slice-{args.model}.json"
    results.parent.mkdir(exist_ok=True)
    results.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
