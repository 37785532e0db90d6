"""What the tests share: small random checkpoints, and the command line as a user would call it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from matexport.cli.main import main

REPOSITORY = Path(__file__).parents[2]
DIGITS = REPOSITORY / "examples" / "digits" / "checkpoint"


def vision_config(
    *, d_model: int = 64, n_layer: int = 3, image_size: int = 12, patch_size: int = 4, n_classes: int = 7, **ssm: Any
) -> dict[str, Any]:
    """A config.json in the released keys."""
    return {
        "d_model": d_model, "n_layer": n_layer, "d_intermediate": 0, "n_classes": n_classes,
        "patch_size": patch_size, "image_size": image_size, "ssm_cfg": {"d_state": 8, **ssm}, "attn_layer_idx": [],
        "attn_cfg": {}, "norm_epsilon": 1e-5, "rms_norm": False, "initializer_cfg": {}, "fused_add_norm": False,
        "residual_in_fp32": True, "drop_rate": 0.0, "drop_path_rate": 0.0, "proj_drop_rate": 0.0, "pool": "cls",
        "device": None, "dtype": None,
    }  # fmt: skip


def vision_tensors(config: dict[str, Any], *, seed: int = 0, heads: int = 64) -> dict[str, np.ndarray]:
    """Random weights for a config, every parameter randomised: zeros and ones hide bugs."""
    rng = np.random.default_rng(seed)
    d, ssm = config["d_model"], config["ssm_cfg"]
    w, gn = 2 * d, ssm.get("ngroups", 1) * ssm["d_state"]
    patches = (config["image_size"] // config["patch_size"]) ** 2

    def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> np.ndarray:
        return (mean + scale * rng.standard_normal(shape)).astype(np.float32)

    def norm(name: str) -> dict[str, np.ndarray]:
        bias = {} if config["rms_norm"] else {f"{name}.bias": normal(d, scale=0.1)}
        return {f"{name}.weight": normal(d, scale=0.2, mean=1), **bias}

    tensors = {
        "patch_embed.proj.weight": normal(d, 3, config["patch_size"], config["patch_size"], scale=0.2),
        "patch_embed.proj.bias": normal(d, scale=0.1),
        "cls_token": normal(1, 1, d),
        "pos_embed": normal(1, patches + 1, d, scale=0.5),
        **norm("norm_f"),
        "head.weight": normal(config["n_classes"], d, scale=d**-0.5),
        "head.bias": normal(config["n_classes"], scale=0.1),
    }
    for i in range(config["n_layer"]):
        m = f"layers.{i}.mixer."
        tensors |= norm(f"layers.{i}.norm")
        tensors |= {
            m + "in_proj.weight": normal(2 * w + 2 * gn + heads, d, scale=d**-0.5),
            m + "conv1d.weight": normal(w + 2 * gn, 1, ssm.get("d_conv", 4), scale=0.5),
            m + "conv1d.bias": normal(w + 2 * gn, scale=0.1),
            m + "dt_bias": normal(heads, mean=-3),
            m + "A_log": np.log(rng.uniform(1, 16, heads)).astype(np.float32),
            m + "D": normal(heads, scale=0.2, mean=1),
            m + "norm.weight": normal(w, scale=0.2, mean=1),
            m + "out_proj.weight": normal(d, w, scale=w**-0.5),
        }
    return tensors


def write_checkpoint(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    """A checkpoint folder, written by the safetensors library."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def vision_checkpoint(folder: Path, **options: Any) -> Path:
    """A random MatMamba-Vision checkpoint."""
    config = vision_config(**options)
    return write_checkpoint(folder, config, vision_tensors(config))


@dataclass(frozen=True)
class Result:
    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


def matexport(*arguments: str | Path) -> Result:
    """Runs the command line in this process: torch is imported once for all tests."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = main([str(argument) for argument in arguments])
    return Result(code, stdout.getvalue(), stderr.getvalue())


def matexport_process(*arguments: str | Path, **environment: str) -> Result:
    """Runs the command line in a process of its own, as a shell would."""
    command = [sys.executable, "-m", "matexport.cli.main", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    return Result(done.returncode, done.stdout, done.stderr)


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
