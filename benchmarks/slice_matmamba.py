"""`slice.py --model 1.4B`: a MatMamba-LM shape to level 4, against copying the same bytes and against torch.

Sources are synthetic (random weights in the released names and shapes): an fp32 `pytorch_model.bin`, as
released, and bf16 safetensors. The clock includes imports; all ways end with fsync.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import measuring

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
    import numpy as np
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
    measuring.sync_folder(output)


def copy(_: Path, output: Path, ready: Path) -> None:
    """A copy of the same output bytes."""
    output.mkdir()
    shutil.copyfile(ready / "model.safetensors", output / "model.safetensors")
    measuring.sync_folder(output)


WAYS: dict[str, Callable[[Path, Path, Path], None]] = {"matexport": ours, "torch": torch_slice, "copy": copy}


def prepared(way: str, job: dict[str, str]) -> Callable[[], None]:
    """The work of one way, for `measuring.report`."""
    return partial(WAYS[way], Path(job["source"]), Path(job["output"]), Path(job["ready"]))


# ----------------------------------------------------------------------------------------- the parent
def run(script: Path, way: str, source: Path, output: Path, ready: Path) -> dict[str, float]:
    job = {"kind": "matmamba", "source": str(source), "output": str(output), "ready": str(ready)}
    warm = measuring.files_of(source, *([ready] if ready.exists() else []))
    found: dict[str, float] = measuring.run(
        [sys.executable, str(script), "--one", way, json.dumps(job)], output, warm=warm
    )
    return found


def same(a: Path, b: Path) -> bool:
    from matexport.checkpoint import read_header

    first, second = read_header(a / "model.safetensors"), read_header(b / "model.safetensors")

    def content(tensors: dict[str, Any], name: str) -> bytes:
        with tensors[name].file.open("rb") as f:
            f.seek(tensors[name].start)
            return bytes(f.read(tensors[name].nbytes))

    return first.keys() == second.keys() and all(content(first, name) == content(second, name) for name in first)


def benchmark(script: Path, folder: Path, model: str, runs: int) -> dict[str, Any]:
    """Both sources, verified, then measured."""
    found: dict[str, Any] = {"model": model, "row": "quarter", "runs": runs, "sources": {}}
    for name, source in make_sources(folder, model).items():
        ready, theirs = folder / "ready", folder / "theirs"
        run(script, "matexport", source, ready, theirs)
        run(script, "torch", source, theirs, ready)
        if not same(ready, theirs):
            sys.exit(f"{name}: outputs differ")
        shutil.rmtree(theirs)
        timed = measuring.rounds(
            tuple(WAYS), runs, lambda way, s=source, r=ready: run(script, way, s, folder / "out", r), name
        )
        relative = {way: measuring.ratios(timed, "matexport", way) for way in WAYS if way != "matexport"}
        found["sources"][name] = {
            "output_bytes": (ready / "model.safetensors").stat().st_size,
            "time_relative_to": {
                way: {"median": r["median"], "range": [r["min"], r["max"]]} for way, r in relative.items()
            },
            "peak_mib": {way: round(max(r["peak_mib"] for r in measured)) for way, measured in timed.items()},
        }
        print(name, json.dumps(found["sources"][name]), flush=True)
        shutil.rmtree(ready)
    return found
