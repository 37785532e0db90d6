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


def language_config(*, d_model: int = 64, n_layer: int = 3, vocab_size: int = 101, **ssm: Any) -> dict[str, Any]:
    """A config.json in the released keys; 101 tokens are padded to 104."""
    return {
        "d_model": d_model, "d_intermediate": 0, "n_layer": n_layer, "vocab_size": vocab_size,
        "ssm_cfg": {"d_state": 8, **ssm}, "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True,
        "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8, "tie_embeddings": True,
    }  # fmt: skip


class Random:
    """Random weights, every parameter randomised: zeros and ones hide bugs."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> np.ndarray:
        return (mean + scale * self.rng.standard_normal(shape)).astype(np.float32)

    def norm(self, name: str, width: int, rms: bool) -> dict[str, np.ndarray]:
        bias = {} if rms else {f"{name}.bias": self.normal(width, scale=0.1)}
        return {f"{name}.weight": self.normal(width, scale=0.2, mean=1), **bias}

    def mixer(self, m: str, config: dict[str, Any], heads: int) -> dict[str, np.ndarray]:
        d, ssm = config["d_model"], config["ssm_cfg"]
        w, gn = 2 * d, ssm.get("ngroups", 1) * ssm["d_state"]
        return {
            m + "in_proj.weight": self.normal(2 * w + 2 * gn + heads, d, scale=d**-0.5),
            m + "conv1d.weight": self.normal(w + 2 * gn, 1, ssm.get("d_conv", 4), scale=0.5),
            m + "conv1d.bias": self.normal(w + 2 * gn, scale=0.1),
            m + "dt_bias": self.normal(heads, mean=-3),
            m + "A_log": np.log(self.rng.uniform(1, 16, heads)).astype(np.float32),
            m + "D": self.normal(heads, scale=0.2, mean=1),
            m + "norm.weight": self.normal(w, scale=0.2, mean=1),
            m + "out_proj.weight": self.normal(d, w, scale=w**-0.5),
        }

    def layers(self, prefix: str, config: dict[str, Any], heads: int) -> dict[str, np.ndarray]:
        tensors = {}
        for i in range(config["n_layer"]):
            tensors |= self.norm(f"{prefix}layers.{i}.norm", config["d_model"], config["rms_norm"])
            tensors |= self.mixer(f"{prefix}layers.{i}.mixer.", config, heads)
        return tensors


def vision_tensors(config: dict[str, Any], *, seed: int = 0, heads: int = 64) -> dict[str, np.ndarray]:
    """Random weights of a vision model."""
    make, d = Random(seed), config["d_model"]
    patches = (config["image_size"] // config["patch_size"]) ** 2
    return {
        "patch_embed.proj.weight": make.normal(d, 3, config["patch_size"], config["patch_size"], scale=0.2),
        "patch_embed.proj.bias": make.normal(d, scale=0.1),
        "cls_token": make.normal(1, 1, d),
        "pos_embed": make.normal(1, patches + 1, d, scale=0.5),
        **make.norm("norm_f", d, config["rms_norm"]),
        "head.weight": make.normal(config["n_classes"], d, scale=d**-0.5),
        "head.bias": make.normal(config["n_classes"], scale=0.1),
        **make.layers("", config, heads),
    }


def language_tensors(config: dict[str, Any], *, seed: int = 0, heads: int = 64) -> dict[str, np.ndarray]:
    """Random weights of a language model, under the released names, with its tied head."""
    make, d = Random(seed), config["d_model"]
    rows = -(-config["vocab_size"] // 8) * 8
    embedding = make.normal(rows, d, scale=0.5)
    return {
        "backbone.embedding.weight": embedding,
        **make.layers("backbone.", config, heads),
        **make.norm("backbone.norm_f", d, config["rms_norm"]),
        "lm_head.weight": embedding.copy(),
    }


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


def language_checkpoint(folder: Path, **options: Any) -> Path:
    """A random MatMamba language model."""
    config = language_config(**options)
    return write_checkpoint(folder, config, language_tensors(config))


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
