"""The truth for Gemma 3n: transformers' own model of the whole source, with the slice applied at run time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig, __version__

from matexport.checkpoint import Checkpoint
from matexport.errors import CheckpointError, InputError
from matexport.families.gemma3n.config import text_of
from matexport.families.gemma3n.layout import HEAD, TOWERS, read_model
from matexport.planning import KeptLayer
from matexport.tensors import numpy_dtype

if int(__version__.split(".")[0]) < 5:  # before, sharing layers computed keys and values of their own without a cache
    raise ImportError(f"transformers {__version__} is installed")

Forward = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]
SMALL = 10**9  # parameters up to which a model is also run in float64


class Bypass(nn.Module):
    """A skipped layer: the identity on the whole AltUp stack, shape (inputs, batch, length, hidden)."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states


def load_oracle(checkpoint: Checkpoint, layers: Sequence[KeptLayer], dtype: str | None = None) -> Forward:
    """The full model of `checkpoint` in fp32, of which the given layers compute, with their first FFN neurons.

    Args:
        dtype: what the slice's weights were cast to; they are rounded to it here too.
    """
    model = _load_whole(checkpoint, dtype)
    kept = {layer.source: layer.width for layer in layers}
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            if i not in kept:
                model.model.layers[i] = Bypass()
                continue
            for linear, axis in ((layer.mlp.gate_proj, 0), (layer.mlp.up_proj, 0), (layer.mlp.down_proj, 1)):
                linear.weight = nn.Parameter(linear.weight.narrow(axis, 0, kept[i]).clone())
    return _forward(model, decode=False)


def load_slice(checkpoint: Checkpoint) -> Forward:
    """A standalone slice in fp32, by transformers' own loader.

    Raises:
        CheckpointError: transformers misses a parameter, or has one of another shape.
    """
    loaded: Any = Gemma3nForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32, output_loading_info=True)
    model, info = loaded
    problems = {key: sorted(map(str, value)) for key, value in info.items() if value}
    unexpected = [name for name in problems.pop("unexpected_keys", []) if not name.startswith(TOWERS)]
    if problems or unexpected:
        found = {**problems, **({"unexpected_keys": unexpected} if unexpected else {})}
        raise CheckpointError(f"transformers reports {found}", where=str(checkpoint.path), fix="slice it again")
    with torch.no_grad():  # the alignment of a mapped file can change the last bits of a matrix product
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return _forward(model.eval(), decode=True)


def _load_whole(checkpoint: Checkpoint, dtype: str | None) -> Any:
    """The whole language model, every parameter used, none missing."""
    source = read_model(checkpoint)
    text = source.text
    options = {key: value for key, value in text_of(checkpoint.config).items() if key not in ("architectures", "dtype")}
    options |= {
        "num_hidden_layers": text.layers, "intermediate_size": list(text.widths), "layer_types": list(text.types),
        "activation_sparsity_pattern": list(text.sparsity),
    }  # fmt: skip
    model = Gemma3nForCausalLM(Gemma3nTextConfig(**options)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            stored = source.prefix + name.removeprefix("model.") if name != HEAD else name
            if stored not in checkpoint.tensors:
                raise CheckpointError(f"tensor {stored!r} is missing", where=str(checkpoint.path), fix="download it")
            array = checkpoint.read(stored)
            array = array if dtype is None else array.astype(numpy_dtype(dtype))
            parameter.copy_(torch.from_numpy(array.astype(np.float32)))
    return model.eval()


def _forward(model: Any, *, decode: bool) -> Forward:
    """Logits without a cache, in float64 too where the model is small enough; with `decode` also those of a prefill of
    half of the tokens and single steps, in the higher precision: in fp32, dozens of layers that change the stream by
    more than its size, as with random weights, turn another order of summation into 0.7 % of the largest logit.
    """

    @torch.no_grad()
    def forward(inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        ids, rows = torch.from_numpy(np.array(inputs["input_ids"])), model.config.vocab_size
        if ids.shape[1] < 2 or int(ids.min()) < 0 or int(ids.max()) >= rows:
            fix = f"give rows of at least two ids from 0 to {rows - 1}"
            raise InputError("input 'input_ids' is out of range", where="--inputs", fix=fix)
        found = {"logits": model.float()(input_ids=ids, use_cache=False).logits.numpy()}
        if model.num_parameters() < SMALL:
            found["whole.logits"] = model.double()(input_ids=ids, use_cache=False).logits.numpy()
        if decode:
            found["decode.logits"] = _decode(model, ids)
        return found

    return forward


def _decode(model: Any, ids: torch.Tensor) -> np.ndarray:
    split = ids.shape[1] // 2
    out = model(input_ids=ids[:, :split], use_cache=True)
    pieces = [out.logits]
    for t in range(split, ids.shape[1]):
        out = model(input_ids=ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
        pieces.append(out.logits)
    return np.asarray(torch.cat(pieces, 1).numpy())
