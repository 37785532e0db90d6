"""MatMamba's nested forward as its authors wrote it, in NumPy float64, one step at a time.

The independent truth for our oracle: it splits, cuts and concatenates like the released training code
(facts in docs/decisions.md), and shares nothing with matexport but the reference of the scan. The
keyword arguments after `dims` break one rule each, for the negative controls.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from matexport_plugins.causal_conv1d.reference import causal_conv1d
from matexport_plugins.mamba2_scan.reference import mamba2_scan


def forward(
    pixels: np.ndarray,
    tensors: dict[str, np.ndarray],
    config: dict[str, Any],
    dims: list[int | None],
    *,
    conv_from_tail: bool = False,
    norm_over_full_width: bool = False,
    heads_from_tail: bool = False,
) -> np.ndarray:
    """Logits of the model whose layer i has inner width 2 * dims[i]; None leaves the layer out."""
    T = {name: array.astype(np.float64) for name, array in tensors.items()}
    d, patch, size = config["d_model"], config["patch_size"], config["image_size"]
    n, d_inner = config["ssm_cfg"]["d_state"], 2 * d
    nheads = T["layers.0.mixer.A_log"].shape[0]
    headdim = d_inner // nheads

    def layer_norm(x: np.ndarray, name: str) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * T[f"{name}.weight"] + T[f"{name}.bias"]

    def mixer(u: np.ndarray, m: str, dim: int) -> np.ndarray:
        w, h = 2 * dim, 2 * dim // headdim
        z, x, B, C, dt = np.split(T[m + "in_proj.weight"], np.cumsum([d_inner, d_inner, n, n]))
        dt = dt[-h:] if heads_from_tail else dt[:h]
        zxbcdt = u @ np.concatenate([z[:w], x[:w], B, C, dt]).T
        z, xbc, dt = np.split(zxbcdt, np.cumsum([w, w + 2 * n]), -1)
        cut = slice(-(w + 2 * n), None) if conv_from_tail else np.r_[:w, d_inner : d_inner + 2 * n]
        xbc, _ = causal_conv1d(xbc, T[m + "conv1d.weight"][cut], T[m + "conv1d.bias"][cut])
        x, B, C = np.split(xbc, np.cumsum([w, n]), -1)
        A = -np.exp(T[m + "A_log"][:h])
        y, _ = mamba2_scan(x, dt, A, B, C, T[m + "D"][:h], T[m + "dt_bias"][:h], z=z)
        mean = (y * y).sum(-1, keepdims=True) / (d_inner if norm_over_full_width else w)
        return (y / np.sqrt(mean + 1e-5) * T[m + "norm.weight"][:w]) @ T[m + "out_proj.weight"][:, :w].T

    b, side = len(pixels), size // patch
    patches = pixels.astype(np.float64).reshape(b, 3, side, patch, side, patch).transpose(0, 2, 4, 1, 3, 5)
    x = patches.reshape(b, side * side, -1) @ T["patch_embed.proj.weight"].reshape(d, -1).T + T["patch_embed.proj.bias"]
    x = np.concatenate([x, np.broadcast_to(T["cls_token"], (b, 1, d))], 1) + T["pos_embed"]
    for i, dim in enumerate(dims):
        if dim is not None:
            x = x + mixer(layer_norm(x, f"layers.{i}.norm"), f"layers.{i}.mixer.", dim)
    return layer_norm(x, "norm_f")[:, -1] @ T["head.weight"].T + T["head.bias"]
