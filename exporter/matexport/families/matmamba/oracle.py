"""The truth for MatMamba: the whole source model in PyTorch with the slice applied at run time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from matexport.checkpoint import Checkpoint
from matexport.errors import CheckpointError, InputError
from matexport.families import splits
from matexport.families.matmamba.containers import EMBEDDINGS, EXPAND, HEAD, SSM_KEYS, is_tied
from matexport.families.matmamba.layout import leading_heads, read_model
from matexport.families.matmamba.modeling import (
    MatMambaCache,
    MatMambaConfig,
    MatMambaForCausalLM,
    MatMambaVisionConfig,
    MatMambaVisionForImageClassification,
    MixerState,
    Submodel,
)
from matexport.planning import KeptLayer
from matexport.tensors import numpy_dtype

Forward = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


def load_model(
    checkpoint: Checkpoint, dtype: str | None = None
) -> MatMambaForCausalLM | MatMambaVisionForImageClassification:
    """The checkpoint in our class and fp32, rounded to `dtype` first; every parameter used, none missing or left over.

    Raises:
        CheckpointError: a tied head that is not the embedding.
    """
    source = read_model(checkpoint)
    keys = ("norm_epsilon", "rms_norm", "pool", "n_classes", "patch_size", "image_size")
    options: dict[str, Any] = {key: checkpoint.config[key] for key in keys if key in checkpoint.config}
    ssm = {key: value for key, value in (checkpoint.config.get("ssm_cfg") or {}).items() if key in SSM_KEYS}
    options |= {
        "d_model": source.d_model,
        "n_layer": len(source.mixers),
        "num_heads": [mixer.heads for mixer in source.mixers],
        "head_dim": source.head_dim,
        "ssm_cfg": {**ssm, "d_state": source.mixers[0].state, "d_conv": source.mixers[0].kernel},
    }
    # copies: the alignment of a mapped file can change the last bits of a matrix product
    state = {name: _tensor(_rounded(checkpoint.read(name), dtype)).float().clone() for name in checkpoint.tensors}
    model: MatMambaForCausalLM | MatMambaVisionForImageClassification
    if source.kind == "vision":
        model = MatMambaVisionForImageClassification(MatMambaVisionConfig(**options))
    else:
        embedding = next(state.pop(name) for name in EMBEDDINGS if name in state)
        state[EMBEDDINGS[1]] = embedding
        tied = is_tied(checkpoint.config)
        if tied and not torch.equal(state.pop(HEAD, embedding), embedding):
            what = f"config.json ties {HEAD!r} to the embedding, but they differ"
            raise CheckpointError(what, where=str(checkpoint.path), fix="set tie_embeddings to false in config.json")
        model = MatMambaForCausalLM(MatMambaConfig(vocab_size=embedding.shape[0], tie_word_embeddings=tied, **options))
    model.float().load_state_dict(state, strict=True)
    return model.eval()


def load_oracle(checkpoint: Checkpoint, layers: Sequence[KeptLayer], dtype: str | None = None) -> Forward:
    """The full model of `checkpoint`, of which only the given layers and their leading heads compute.

    Args:
        dtype: what the slice's weights were cast to; they are rounded to it here too.
    """
    mixers = read_model(checkpoint).mixers
    submodel = []
    for layer in layers:
        mixer = mixers[layer.source]
        submodel.append((layer.source, leading_heads(mixer, EXPAND * layer.width // mixer.head_dim)))
    return _forward(load_model(checkpoint, dtype), submodel)


def load_slice(checkpoint: Checkpoint) -> Forward:
    """A standalone slice as it is, in our class."""
    return _forward(load_model(checkpoint), None)


def load_stock(checkpoint: Checkpoint) -> Forward | None:
    """A standalone slice in transformers' own class, by its own loader; None where it needs ours."""
    if checkpoint.config.get("model_type") != "mamba2":
        return None
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32, output_loading_info=True)
    model, info = loaded
    problems = {key: sorted(map(str, value)) for key, value in info.items() if value}
    if problems:
        raise CheckpointError(f"transformers reports {problems}", where=str(checkpoint.path), fix="slice it again")
    model.eval()

    @torch.no_grad()
    def forward(inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        ids = np.array(inputs["input_ids"])
        return _language_outputs(model, torch.from_numpy(ids), {}, [ids.shape[1] // 2])

    return forward


def _forward(model: Any, submodel: Submodel | None) -> Forward:
    @torch.no_grad()
    def forward(inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        if isinstance(model, MatMambaForCausalLM):
            ids, rows = np.array(inputs["input_ids"]), model.config.vocab_size
            if ids.shape[1] < 2 or ids.min() < 0 or ids.max() >= rows:
                fix = f"give rows of at least two ids from 0 to {rows - 1}"
                raise InputError("input 'input_ids' is out of range", where="--inputs", fix=fix)
            # every step of the oracle is one of the whole model: of a slice, more are tried
            chosen = splits(ids.shape[1]) if submodel is None else [ids.shape[1] // 2]
            return _language_outputs(model, torch.from_numpy(ids), {"submodel": submodel}, chosen)
        pixels = torch.from_numpy(np.array(inputs["pixel_values"], np.float32))
        return {"logits": model(pixels, submodel=submodel).logits.numpy()}

    return forward


def _language_outputs(
    model: Any, ids: torch.Tensor, options: dict[str, Any], splits: Sequence[int]
) -> dict[str, np.ndarray]:
    """Logits and states of one run, and of prefills of some of the tokens followed by single steps."""
    out = model(ids, use_cache=True, **options)
    found = {"logits": out.logits, **_states(out.cache_params)}
    for split in splits:
        out = model(ids[:, :split], use_cache=True, **options)
        pieces = [out.logits]
        for t in range(split, ids.shape[1]):
            out = model(ids[:, t : t + 1], cache_params=out.cache_params, use_cache=True, **options)
            pieces.append(out.logits)
        found[f"decode@{split}.logits"] = torch.cat(pieces, 1)
        found |= {f"decode@{split}.{name}": states for name, states in _states(out.cache_params).items()}
    return {name: value.numpy() for name, value in found.items()}


def _states(cache: Any) -> dict[str, torch.Tensor]:
    """Of all layers that ran; of transformers' own class none, which keeps them in another shape."""
    if not isinstance(cache, MatMambaCache):
        return {}
    states = [state for state in cache.states if state is not None]
    return {f"states.{kind}": torch.cat([getattr(s, kind).flatten() for s in states]) for kind in MixerState._fields}


def _rounded(array: np.ndarray, dtype: str | None) -> np.ndarray:
    return array if dtype is None else array.astype(numpy_dtype(dtype))


def _tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())
