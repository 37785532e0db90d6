"""MatMamba in plain PyTorch: Mamba-2 blocks with nested heads; the language and the vision model made of them.

Papers: MatMamba (arXiv 2410.06718); Mamba-2 / state space duality, "SSD" (arXiv 2405.21060).
One self-contained file: it is also written beside every slice as its custom code, so it imports
nothing but torch and transformers. Parameter names are those of the released checkpoints (but for
`embeddings`, which is transformers' name).

Symbols, in the order in which they appear in shapes:
    b batch   l length   c chunks   q chunk length (indices i, j)
    h heads   g groups of B and C   r = h / g heads per group
    n state size   p head dim   w = h * p inner width   d model width   k convolution kernel
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils.generic import ModelOutput

Submodel = Sequence[tuple[int, Sequence[int] | None]]  # layers to run, and the heads of each (None: all)


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


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, state: Tensor | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution and SiLU (Mamba-2 paper, section 7.1).

    Args:
        x: (b, l, channels).
        weight, bias: (channels, 1, k) and (channels).
        state: (b, channels, k - 1), the last inputs before x; zeros if None.
        mask: (b, l) of bool; a step with False is left out, its y is unspecified.
    Returns:
        y (b, l, channels) and the last k - 1 inputs (b, channels, k - 1).
    """
    k = weight.shape[-1]
    x = x.transpose(1, 2)
    x = F.pad(x, (k - 1, 0)) if state is None else torch.cat([state, x], -1)
    if mask is not None:  # masked steps first, then the state and the real steps side by side
        order = F.pad(mask, (k - 1, 0), value=True).int().argsort(dim=1, stable=True)
        x = x.gather(2, order[:, None].expand_as(x))
    y = F.conv1d(x, weight, bias, groups=weight.shape[0])
    if mask is not None:
        place = (order.argsort(1)[:, k - 1 :] - (k - 1)).clamp(min=0)
        y = y.gather(2, place[:, None].expand_as(y))
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


class MixerState(NamedTuple):
    """What a mixer remembers between calls."""

    conv: Tensor  # (b, w + 2gn, k - 1)
    scan: Tensor  # (b, h, n, p), fp32


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
        self.norm = nn.ParameterDict({"weight": torch.ones(w)})
        self.out_proj = nn.Linear(w, d_model, bias=False)

    def weights(self, heads: Sequence[int] | None = None) -> MixerWeights:
        """The parameters of the heads whose indices are given (all by default), equally many of each group."""
        assert self.conv1d.bias is not None
        full = MixerWeights(
            self.in_proj.weight, self.conv1d.weight, self.conv1d.bias, self.dt_bias, self.A_log, self.D,
            self.norm["weight"], self.out_proj.weight,
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

    def forward(
        self, u: Tensor, heads: Sequence[int] | None = None, state: MixerState | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, MixerState]:
        """u: (b, l, d) -> (b, l, d) and the state after it, computed by the given heads only (all by default).

        One function serves prefill, continuation from a state, and decoding (l = 1). A step whose mask
        (b, l) is False leaves the state as it was.
        """
        W = self.weights(heads)
        b, l, _ = u.shape
        g, n, p, h = self.ngroups, self.d_state, self.head_dim, W.D.shape[0]
        w = h * p
        z, xBC, dt = F.linear(u, W.in_proj).split([w, w + 2 * g * n, h], -1)
        xBC, conv = causal_conv1d(xBC, W.conv_weight, W.conv_bias, state and state.conv, mask)
        x, B, C = xBC.split([w, g * n, g * n], -1)
        dt = F.softplus(dt.float() + W.dt_bias.float()).clamp(*self.dt_limit)
        y, scan = ssd_scan(
            x.view(b, l, h, p).float(),
            dt if mask is None else dt * mask[..., None],
            -torch.exp(W.A_log.float()),
            B.view(b, l, g, n).float(),
            C.view(b, l, g, n).float(),
            W.D.float(),
            self.chunk_size,
            state and state.scan,
        )
        # gate first, then an RMS norm over the width in use (each group by itself)
        y = y.reshape(b, l, g, w // g) * F.silu(z.float()).view(b, l, g, w // g)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.norm_eps)
        return F.linear((y.view(b, l, w) * W.norm.float()).to(u.dtype), W.out_proj), MixerState(conv, scan)


class MatMambaBaseConfig(PretrainedConfig):
    """What both models have: the released keys, plus `num_heads`, the heads of each layer (64 unless sliced)."""

    attribute_map = {"hidden_size": "d_model", "num_hidden_layers": "n_layer"}

    def __init__(
        self, d_model: int = 768, n_layer: int = 24, ssm_cfg: dict[str, Any] | None = None, norm_epsilon: float = 1e-5,
        rms_norm: bool = True, residual_in_fp32: bool = True, head_dim: int | None = None,
        num_heads: Sequence[int] | None = None, **kwargs: Any,
    ):  # fmt: skip
        self.d_model, self.n_layer, self.ssm_cfg = d_model, n_layer, ssm_cfg or {}
        self.norm_epsilon, self.rms_norm, self.residual_in_fp32 = norm_epsilon, rms_norm, residual_in_fp32
        self.head_dim = head_dim or d_model // 32
        self.num_heads = list(num_heads or [2 * d_model // self.head_dim] * n_layer)
        super().__init__(**kwargs)


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: MatMambaBaseConfig, heads: int):
        super().__init__()
        self.norm = make_norm(config)
        self.mixer = MatMamba2(config.d_model, heads, config.head_dim, **config.ssm_cfg)

    def forward(self, x: Tensor, *mixer: Any) -> tuple[Tensor, MixerState]:
        y, state = self.mixer(self.norm(x.to(self.mixer.D.dtype)), *mixer)
        return x + y, state


def make_norm(config: MatMambaBaseConfig) -> nn.Module:
    return (nn.RMSNorm if config.rms_norm else nn.LayerNorm)(config.d_model, eps=config.norm_epsilon)


class MatMambaPreTrainedModel(PreTrainedModel):
    """Every module initialises its own parameters; transformers must not do it again."""

    config_class = MatMambaBaseConfig

    def _init_weights(self, module: nn.Module) -> None:
        pass


# -------------------------------------------------------------------------------- the language model
class MatMambaConfig(MatMambaBaseConfig):
    model_type = "matmamba"

    def __init__(self, vocab_size: int = 50280, tie_word_embeddings: bool = True, **kwargs: Any):
        self.vocab_size = vocab_size
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


class MatMambaCache:
    """The states of all layers between calls, and how many tokens they have seen."""

    is_compileable = False

    def __init__(self, layers: int):
        self.states: list[MixerState | None] = [None] * layers
        self.seen = 0

    def get_seq_length(self) -> int:
        return self.seen

    def reorder_cache(self, beams: Tensor) -> None:
        self.states = [s and MixerState(s.conv[beams], s.scan[beams]) for s in self.states]


@dataclass
class MatMambaOutput(ModelOutput):
    """Logits (b, l, vocabulary) and the cache to pass on."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache_params: MatMambaCache | None = None


class MatMambaBackbone(nn.Module):
    def __init__(self, config: MatMambaConfig):
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config, heads) for heads in config.num_heads)
        self.norm_f = make_norm(config)


class MatMambaForCausalLM(MatMambaPreTrainedModel, GenerationMixin):
    """MatMamba language model: embedding, Mamba-2 blocks, head tied to the embedding."""

    config_class = MatMambaConfig
    _is_stateful = True

    def __init__(self, config: MatMambaConfig):
        super().__init__(config)
        self.backbone = MatMambaBackbone(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.embeddings

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes its own

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, cache_params: MatMambaCache | None = None, attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None, use_cache: bool | None = None, **_: Any,
    ) -> dict[str, Any]:  # fmt: skip
        if inputs_embeds is not None and cache_params is None:
            return {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, "use_cache": use_cache}
        if cache_params is not None:
            input_ids = input_ids[:, -1:] if inputs_embeds is not None else input_ids[:, cache_params.seen :]
        options = {"attention_mask": attention_mask, "use_cache": use_cache, "cache_params": cache_params}
        return {"input_ids": input_ids, **options}

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        cache_params: MatMambaCache | None = None, labels: Tensor | None = None, inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None, logits_to_keep: int = 0, submodel: Submodel | None = None, **_: Any,
    ) -> MatMambaOutput:  # fmt: skip
        """input_ids: (b, l), after the tokens that `cache_params` has seen -> logits (b, l, vocabulary).

        attention_mask: (b, l) or (b, all tokens so far); steps with 0 are exact no-ops, at either side.
        submodel: runs a part of the model only, see `Submodel`.
        """
        x = self.backbone.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        x = x.float() if self.config.residual_in_fp32 else x
        mask = None if attention_mask is None or attention_mask.all() else attention_mask[:, -x.shape[1] :].bool()
        cache = cache_params or MatMambaCache(len(self.backbone.layers))
        for index, heads in [(i, None) for i in range(len(cache.states))] if submodel is None else submodel:
            x, cache.states[index] = self.backbone.layers[index](x, heads, cache.states[index], mask)
        cache.seen += x.shape[1]
        head = self.backbone.embeddings if self.config.tie_word_embeddings else self.lm_head
        x = self.backbone.norm_f(x[:, -logits_to_keep:].to(head.weight.dtype))
        logits = F.linear(x, head.weight).float()
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return MatMambaOutput(loss=loss, logits=logits, cache_params=None if use_cache is False else cache)


# ---------------------------------------------------------------------------------- the vision model
class MatMambaVisionConfig(MatMambaBaseConfig):
    model_type = "matmamba_vision"

    def __init__(
        self, n_classes: int = 1000, patch_size: int = 16, image_size: int = 224, pool: str = "cls",
        rms_norm: bool = False, residual_in_fp32: bool = False, **kwargs: Any,
    ):  # fmt: skip
        self.n_classes, self.patch_size, self.image_size, self.pool = n_classes, patch_size, image_size, pool
        kwargs.setdefault("num_labels", n_classes)
        super().__init__(rms_norm=rms_norm, residual_in_fp32=residual_in_fp32, **kwargs)


class MatMambaVisionForImageClassification(MatMambaPreTrainedModel):
    """MatMamba-Vision: patches, the class token *after* them, Mamba-2 blocks, one linear head."""

    config_class = MatMambaVisionConfig
    main_input_name = "pixel_values"

    def __init__(self, config: MatMambaVisionConfig):
        super().__init__(config)
        patches = (config.image_size // config.patch_size) ** 2
        proj = nn.Conv2d(3, config.d_model, config.patch_size, config.patch_size)
        self.patch_embed = nn.ModuleDict({"proj": proj})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.d_model))
        self.pos_embed = nn.Parameter(torch.randn(1, patches + 1, config.d_model) * 0.02)
        self.layers = nn.ModuleList(Block(config, heads) for heads in config.num_heads)
        self.norm_f = make_norm(config)
        self.head = nn.Linear(config.d_model, config.n_classes)
        self.post_init()

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, submodel: Submodel | None = None, **_: Any
    ) -> ImageClassifierOutput:
        """pixel_values: (b, 3, image_size, image_size) -> logits (b, n_classes).

        submodel: runs a part of the model only, see `Submodel`.
        """
        x = self.patch_embed["proj"](pixel_values).flatten(2).transpose(1, 2)  # (b, patches, d) in raster order
        x = torch.cat([x, self.cls_token.expand(x.shape[0], -1, -1)], 1) + self.pos_embed
        x = x.float() if self.config.residual_in_fp32 else x
        for index, heads in [(i, None) for i in range(len(self.layers))] if submodel is None else submodel:
            x, _state = self.layers[index](x, heads)
        x = self.norm_f(x.to(self.norm_f.weight.dtype))
        logits = self.head(x[:, -1] if self.config.pool == "cls" else x[:, :-1].mean(1))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)
