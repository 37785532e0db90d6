"""MatMamba in plain PyTorch: Mamba-2 blocks with nested heads, and the vision model made of them.

Papers: MatMamba (arXiv 2410.06718); Mamba-2 / state space duality, "SSD" (arXiv 2405.21060).
One self-contained file: it is also written beside every slice as its custom code, so it imports
nothing but torch and transformers. Parameter names are those of the released checkpoints.

Symbols, in the order in which they appear in shapes:
    b batch   l length   c chunks   q chunk length (indices i, j)
    h heads   g groups of B and C   r = h / g heads per group
    n state size   p head dim   w = h * p inner width   d model width   k convolution kernel
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput


# ------------------------------------------------------------------------------------ the two ops
def ssd_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, chunk: int, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The Mamba-2 scan by chunks of matrix products (SSD paper, section 6 and listing 1).

    Computes S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T and y_t = C_t S_t + D x_t.

    Args:
        x: (b, l, h, p).
        dt: (b, l, h), after softplus, >= 0; a step with dt = 0 leaves the state as it was.
        A, D: (h); A < 0.
        B, C: (b, l, g, n); head i uses group i // r.
        chunk: longest q; any l >= 1 is allowed.
        state: (b, h, n, p), the state before the first step; zeros if None.
    Returns:
        y (b, l, h, p) and the final state (b, h, n, p).
    """
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    r, q = h // g, min(chunk, l)
    c = -(-l // q)
    tail = c * q - l  # the ragged end is filled with dt = 0 steps

    def chunked(t: Tensor, *heads: int) -> Tensor:  # (b, l, ...) -> (b, c, q, *heads)
        return F.pad(t, (0, 0) * (t.dim() - 2) + (0, tail)).view(b, c, q, *heads)

    X = chunked(x * dt[..., None], g, r, p)
    B, C = chunked(B, g, n), chunked(C, g, n)
    a = chunked(dt * A, g, r)  # log of each step's decay, <= 0

    # 1. inside each chunk: y_i = sum over j <= i of (C_i . B_j) exp(a_{j+1} + ... + a_i) dt_j x_j.
    # The sums are taken one by one ("segsum"): differences of cumulative sums would cancel.
    i = torch.arange(q, device=x.device)[:, None, None, None]
    j = i.transpose(0, 1)
    sums = torch.where(i > j, a[:, :, :, None], 0.0).cumsum(2)  # (b, c, i, j, g, r)
    decay = torch.exp(torch.where(i >= j, sums, -math.inf))
    scores = torch.einsum("bcign,bcjgn->bcijg", C, B)[..., None] * decay
    y = torch.einsum("bcijgr,bcjgrp->bcigrp", scores, X)

    # 2. what each chunk adds to the state by its end
    added = torch.einsum("bcjgn,bcjgrp->bcgrnp", B, X * decay[:, :, -1, :, ..., None])

    # 3. the state before each chunk
    S = x.new_zeros(b, g, r, n, p) if state is None else state.view(b, g, r, n, p)
    before = []
    for k in range(c):
        before.append(S)
        S = torch.exp(a[:, k].sum(1))[..., None, None] * S + added[:, k]

    # 4. what that state contributes inside the chunk
    carried = torch.einsum("bcign,bcgrnp->bcigrp", C, torch.stack(before, 1))
    y = y + torch.exp(a.cumsum(2))[..., None] * carried
    y = y.reshape(b, c * q, h, p)[:, :l] + D[:, None] * x
    return y, S.reshape(b, h, n, p)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution and SiLU.

    Args:
        x: (b, l, channels).
        weight, bias: (channels, 1, k) and (channels).
        state: (b, channels, k - 1), the last inputs before x; zeros if None.
    Returns:
        y (b, l, channels) and the last k - 1 inputs (b, channels, k - 1).
    """
    k = weight.shape[-1]
    x = x.transpose(1, 2)
    x = F.pad(x, (k - 1, 0)) if state is None else torch.cat([state, x], -1)
    y = F.conv1d(x, weight, bias, groups=weight.shape[0])
    return F.silu(y.transpose(1, 2)), x[..., x.shape[-1] - (k - 1) :]


# ------------------------------------------------------------------------------------- the block
class MixerWeights(NamedTuple):
    """The parameters of one mixer at one width; the fields are named as in the checkpoint."""

    in_proj: Tensor  # (2w + 2gn + h, d), rows z, x, B, C, dt
    conv_weight: Tensor  # (w + 2gn, 1, k), channels x, B, C
    conv_bias: Tensor  # (w + 2gn)
    dt_bias: Tensor  # (h)
    A_log: Tensor  # (h)
    D: Tensor  # (h)
    norm: Tensor  # (w)
    out_proj: Tensor  # (d, w)


class MatMamba2(nn.Module):
    """The Mamba-2 mixer of MatMamba: any subset of its heads is a smaller mixer (MatMamba paper, section 3)."""

    def __init__(
        self, d_model: int, heads: int, head_dim: int, d_state: int = 128, d_conv: int = 4, ngroups: int = 1,
        chunk_size: int = 256, dt_limit: Sequence[float] = (0.0, math.inf), norm_eps: float = 1e-5,
    ):  # fmt: skip
        super().__init__()
        self.head_dim, self.ngroups, self.d_state = head_dim, ngroups, d_state
        self.chunk_size, self.dt_limit, self.norm_eps = chunk_size, tuple(dt_limit), norm_eps
        w, gn = heads * head_dim, ngroups * d_state
        self.in_proj = nn.Linear(d_model, 2 * w + 2 * gn + heads, bias=False)
        self.conv1d = nn.Conv1d(w + 2 * gn, w + 2 * gn, d_conv, groups=w + 2 * gn)
        dt = torch.exp(torch.rand(heads) * math.log(100.0) + math.log(0.001))  # 0.001 .. 0.1
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.A_log = nn.Parameter(torch.log(torch.empty(heads).uniform_(1, 16)))
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = Gain(w)
        self.out_proj = nn.Linear(w, d_model, bias=False)

    def weights(self, heads: Sequence[int] | None = None) -> MixerWeights:
        """The parameters of the heads whose indices are given (all by default), equally many of each group."""
        assert self.conv1d.bias is not None
        full = MixerWeights(
            self.in_proj.weight, self.conv1d.weight, self.conv1d.bias, self.dt_bias, self.A_log, self.D,
            self.norm.weight, self.out_proj.weight,
        )  # fmt: skip
        if heads is None:
            return full
        head = torch.as_tensor(heads, device=full.D.device)
        channel = (head[:, None] * self.head_dim + torch.arange(self.head_dim, device=head.device)).flatten()
        w, gn = full.norm.shape[0], self.ngroups * self.d_state
        z, x, B, C, dt = full.in_proj.split([w, w, gn, gn, full.D.shape[0]])
        return MixerWeights(
            in_proj=torch.cat([z[channel], x[channel], B, C, dt[head]]),
            conv_weight=torch.cat([full.conv_weight[:w][channel], full.conv_weight[w:]]),
            conv_bias=torch.cat([full.conv_bias[:w][channel], full.conv_bias[w:]]),
            dt_bias=full.dt_bias[head],
            A_log=full.A_log[head],
            D=full.D[head],
            norm=full.norm[channel],
            out_proj=full.out_proj[:, channel].contiguous(),
        )

    def forward(self, u: Tensor, heads: Sequence[int] | None = None) -> Tensor:
        """u: (b, l, d) -> (b, l, d), computed by the given heads only (all by default)."""
        W = self.weights(heads)
        b, l, _ = u.shape
        g, n, p, h = self.ngroups, self.d_state, self.head_dim, W.D.shape[0]
        w = h * p
        z, xBC, dt = F.linear(u, W.in_proj).split([w, w + 2 * g * n, h], -1)
        xBC, _ = causal_conv1d(xBC, W.conv_weight, W.conv_bias)
        x, B, C = xBC.split([w, g * n, g * n], -1)
        y, _ = ssd_scan(
            x.view(b, l, h, p).float(),
            F.softplus(dt.float() + W.dt_bias.float()).clamp(*self.dt_limit),
            -torch.exp(W.A_log.float()),
            B.view(b, l, g, n).float(),
            C.view(b, l, g, n).float(),
            W.D.float(),
            self.chunk_size,
        )
        # gate first, then an RMS norm over the width in use (each group by itself)
        y = y.reshape(b, l, g, w // g) * F.silu(z.float()).view(b, l, g, w // g)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.norm_eps)
        return F.linear((y.view(b, l, w) * W.norm.float()).to(u.dtype), W.out_proj)


class Gain(nn.Module):
    """The weight of a norm, kept in a module of its own so that its name ends in `norm.weight`."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


# ---------------------------------------------------------------------------------- the vision model
class MatMambaVisionConfig(PretrainedConfig):
    """Configuration in the released keys, plus `num_heads`: the heads of each layer (64 unless sliced)."""

    model_type = "matmamba_vision"
    attribute_map = {"hidden_size": "d_model", "num_hidden_layers": "n_layer"}

    def __init__(
        self, d_model: int = 512, n_layer: int = 20, n_classes: int = 1000, patch_size: int = 16,
        image_size: int = 224, ssm_cfg: dict[str, Any] | None = None, norm_epsilon: float = 1e-5,
        rms_norm: bool = False, pool: str = "cls", head_dim: int | None = None,
        num_heads: Sequence[int] | None = None, **kwargs: Any,
    ):  # fmt: skip
        self.d_model, self.n_layer, self.n_classes = d_model, n_layer, n_classes
        self.patch_size, self.image_size = patch_size, image_size
        self.ssm_cfg, self.norm_epsilon, self.rms_norm, self.pool = ssm_cfg or {}, norm_epsilon, rms_norm, pool
        self.head_dim = head_dim or d_model // 32
        self.num_heads = list(num_heads or [2 * d_model // self.head_dim] * n_layer)
        kwargs.setdefault("num_labels", n_classes)
        super().__init__(**kwargs)


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: MatMambaVisionConfig, heads: int):
        super().__init__()
        self.norm = make_norm(config)
        self.mixer = MatMamba2(config.d_model, heads, config.head_dim, **config.ssm_cfg)

    def forward(self, x: Tensor, heads: Sequence[int] | None = None) -> Tensor:
        return x + self.mixer(self.norm(x), heads)


def make_norm(config: MatMambaVisionConfig) -> nn.Module:
    return (nn.RMSNorm if config.rms_norm else nn.LayerNorm)(config.d_model, eps=config.norm_epsilon)


class PatchEmbed(nn.Module):
    """Images (b, 3, s, s) to patches (b, (s / patch)^2, d) in raster order."""

    def __init__(self, config: MatMambaVisionConfig):
        super().__init__()
        self.proj = nn.Conv2d(3, config.d_model, config.patch_size, config.patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels).flatten(2).transpose(1, 2)


class MatMambaVisionForImageClassification(PreTrainedModel):
    """MatMamba-Vision: patches, the class token *after* them, Mamba-2 blocks, one linear head."""

    config_class = MatMambaVisionConfig
    main_input_name = "pixel_values"

    def __init__(self, config: MatMambaVisionConfig):
        super().__init__(config)
        patches = (config.image_size // config.patch_size) ** 2
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.d_model))
        self.pos_embed = nn.Parameter(torch.randn(1, patches + 1, config.d_model) * 0.02)
        self.layers = nn.ModuleList(Block(config, heads) for heads in config.num_heads)
        self.norm_f = make_norm(config)
        self.head = nn.Linear(config.d_model, config.n_classes)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Every module initialises its own parameters; transformers must not do it again."""

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None,
        submodel: Sequence[tuple[int, Sequence[int] | None]] | None = None, **_: Any,
    ) -> ImageClassifierOutput:  # fmt: skip
        """pixel_values: (b, 3, image_size, image_size) -> logits (b, n_classes).

        `submodel` runs a part of the model only: for each layer to run, in order, its index and the
        indices of its heads (None for all of them).
        """
        x = self.patch_embed(pixel_values)
        x = torch.cat([x, self.cls_token.expand(x.shape[0], -1, -1)], 1) + self.pos_embed
        for index, heads in submodel or [(i, None) for i in range(len(self.layers))]:
            x = self.layers[index](x, heads)
        x = self.norm_f(x)
        logits = self.head(x[:, -1] if self.config.pool == "cls" else x[:, :-1].mean(1))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)
