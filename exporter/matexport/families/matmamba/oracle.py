"""The truth for MatMamba: the whole source model in PyTorch with the slice applied at run time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from matexport.checkpoint import Checkpoint
from matexport.errors import CheckpointError
from matexport.families.matmamba.layout import EXPAND, leading_heads, read_model, sliced_config
from matexport.families.matmamba.modeling import MatMambaVisionConfig, MatMambaVisionForImageClassification
from matexport.planning import KeptLayer

Forward = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]
Submodel = Sequence[tuple[int, Sequence[int] | None]]


def load_model(checkpoint: Checkpoint) -> MatMambaVisionForImageClassification:
    """The checkpoint as it is, in fp32; every parameter a tensor of its own, none missing, none left over."""
    heads = [mixer.heads for mixer in read_model(checkpoint).mixers]
    config = MatMambaVisionConfig(**sliced_config(checkpoint.config, heads, read_model(checkpoint).head_dim))
    model = MatMambaVisionForImageClassification(config).float()
    # copies: the alignment of a mapped file can change the last bits of a matrix product
    state = {name: _tensor(checkpoint.read(name)).float().clone() for name in checkpoint.tensors}
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as e:
        raise CheckpointError(str(e), where=str(checkpoint.path), fix="this checkpoint is damaged") from None
    return model.eval()


def load_oracle(checkpoint: Checkpoint, layers: Sequence[KeptLayer]) -> Forward:
    """The full model of `checkpoint`, of which only the given layers and their leading heads compute."""
    mixers = read_model(checkpoint).mixers
    submodel = []
    for layer in layers:
        mixer = mixers[layer.source]
        submodel.append((layer.source, leading_heads(mixer, EXPAND * layer.width // mixer.head_dim)))
    return _forward(load_model(checkpoint), submodel)


def load_slice(checkpoint: Checkpoint) -> Forward:
    """A standalone slice as it is."""
    return _forward(load_model(checkpoint), None)


def _forward(model: MatMambaVisionForImageClassification, submodel: Submodel | None) -> Forward:
    @torch.no_grad()
    def forward(inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        pixels = torch.from_numpy(np.array(inputs["pixel_values"], np.float32))
        return {"logits": model(pixels, submodel=submodel).logits.numpy()}

    return forward


def _tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())
