"""MatMamba's nested forward as its authors wrote it, in NumPy float64, one step at a time.

The independent truth for our oracle: it splits, cuts and concatenates like the released training code,
and shares nothing with matexport but the references of the two ops. `broken` breaks one rule, for the
negative controls: "conv from tail", "norm over full width", "heads from tail", "stale dt".
"""

from __future__ import annotations

from typing import Any

import numpy as np

from matexport_plugins.causal_conv1d.reference import causal_conv1d
from matexport_plugins.mamba2_scan.reference import mamba2_scan

BROKEN = ("conv from tail", "norm over full width", "heads from tail", "stale dt")
Tensors = dict[str, np.ndarray]


def norm(x: np.ndarray, T: Tensors, name: str) -> np.ndarray:
    """LayerNorm where there is a bias, else RMS norm."""
    if f"{name}.bias" in T:
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * T[f"{name}.weight"]
    return x + T.get(f"{name}.bias", 0.0)


def mixer(u: np.ndarray, T: Tensors, m: str, dim: int, d: int, n: int, broken: str) -> np.ndarray:
    """One mixer at inner width 2 * dim."""
    d_inner, nheads = 2 * d, T[m + "A_log"].shape[0]
    headdim = d_inner // nheads
    w, h = 2 * dim, 2 * dim // headdim
    z, x, B, C, dt = np.split(T[m + "in_proj.weight"], np.cumsum([d_inner, d_inner, n, n]))
    dt = dt[-h:] if broken == "heads from tail" else dt[:h]
    zxbcdt = u @ np.concatenate([z[:w], x[:w], B, C, dt]).T
    z, xbc, dt = np.split(zxbcdt, np.cumsum([w, w + 2 * n]), -1)
    cut = slice(-(w + 2 * n), None) if broken == "conv from tail" else np.r_[:w, d_inner : d_inner + 2 * n]
    xbc, _ = causal_conv1d(xbc, T[m + "conv1d.weight"][cut], T[m + "conv1d.bias"][cut])
    x, B, C = np.split(xbc, np.cumsum([w, n]), -1)
    A = -np.exp(T[m + "A_log"][:h])
    dt = np.roll(dt, 1, axis=1) if broken == "stale dt" else dt
    y, _ = mamba2_scan(x, dt, A, B, C, T[m + "D"][:h], T[m + "dt_bias"][:h], z=z)
    mean = (y * y).sum(-1, keepdims=True) / (d_inner if broken == "norm over full width" else w)
    return (y / np.sqrt(mean + 1e-5) * T[m + "norm.weight"][:w]) @ T[m + "out_proj.weight"][:, :w].T


def layers(
    x: np.ndarray, T: Tensors, prefix: str, config: dict[str, Any], dims: list[int | None], broken: str
) -> np.ndarray:
    """The residual stream after all layers; layer i has inner width 2 * dims[i], None leaves it out."""
    for i, dim in enumerate(dims):
        if dim is not None:
            name, sizes = f"{prefix}layers.{i}", (config["d_model"], config["ssm_cfg"]["d_state"])
            x = x + mixer(norm(x, T, f"{name}.norm"), T, f"{name}.mixer.", dim, *sizes, broken)
    return norm(x, T, f"{prefix}norm_f")


def vision(
    pixels: np.ndarray, tensors: Tensors, config: dict[str, Any], dims: list[int | None], broken: str = ""
) -> np.ndarray:
    """Logits (b, classes) of the vision model."""
    T = {name: array.astype(np.float64) for name, array in tensors.items()}
    d, patch = config["d_model"], config["patch_size"]
    b, side = len(pixels), config["image_size"] // patch
    patches = pixels.astype(np.float64).reshape(b, 3, side, patch, side, patch).transpose(0, 2, 4, 1, 3, 5)
    x = patches.reshape(b, side * side, -1) @ T["patch_embed.proj.weight"].reshape(d, -1).T + T["patch_embed.proj.bias"]
    x = np.concatenate([x, np.broadcast_to(T["cls_token"], (b, 1, d))], 1) + T["pos_embed"]
    return layers(x, T, "", config, dims, broken)[:, -1] @ T["head.weight"].T + T["head.bias"]


def language(
    ids: np.ndarray, tensors: Tensors, config: dict[str, Any], dims: list[int | None], broken: str = ""
) -> np.ndarray:
    """Logits (b, l, vocabulary) of the language model."""
    T = {name: array.astype(np.float64) for name, array in tensors.items()}
    x = layers(T["backbone.embedding.weight"][ids], T, "backbone.", config, dims, broken)
    return x @ T["lm_head.weight"].T
