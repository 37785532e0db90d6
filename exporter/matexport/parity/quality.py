"""What outputs are worth, where inputs say what they should be: the source's figure beside the artefact's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Quality:
    """One figure of the source and of an artefact, on the same inputs.

    Attributes:
        metric: "accuracy", the share of images whose largest logit is at their label, or "perplexity", exp of the
            mean negative log likelihood (nats) of each token after those before it.
    """

    metric: str
    source: float
    artefact: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.metric} {self.artefact:.4g}, the source's {self.source:.4g}"


def quality(
    inputs: Mapping[str, np.ndarray], labels: np.ndarray | None, got: np.ndarray, want: np.ndarray
) -> Quality | None:
    """Of logits (batch, classes) with labels (batch,), or (batch, length, vocabulary) of a language model."""
    if got.shape != want.shape:
        return None
    if labels is not None and got.ndim == 2:
        source, artefact = (float((x.argmax(-1) == labels).mean()) for x in (want, got))
        return Quality("accuracy", source, artefact)
    if "input_ids" in inputs and got.ndim == 3 and got.shape[1] > 1:
        source, artefact = (_perplexity(x, inputs["input_ids"]) for x in (want, got))
        return Quality("perplexity", source, artefact)
    return None


def _perplexity(logits: np.ndarray, ids: np.ndarray) -> float:
    total = 0.0
    for row, tokens in zip(logits, ids, strict=True):  # one sequence in float64 at a time
        x = row[:-1].astype(np.float64)
        x -= x.max(-1, keepdims=True)
        chosen = np.take_along_axis(x, tokens[1:, None].astype(np.int64), -1)[:, 0]
        total += float((np.log(np.exp(x).sum(-1)) - chosen).mean())
    return float(np.exp(total / len(ids)))
