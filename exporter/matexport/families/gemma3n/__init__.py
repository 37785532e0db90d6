"""The Gemma 3n family: MatFormer FFNs (arXiv 2310.07707) with per-layer embeddings and shared keys and values."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matexport.checkpoint import Checkpoint
from matexport.errors import MissingError
from matexport.families.gemma3n.compatibility import verdicts
from matexport.families.gemma3n.config import DEFAULTS, faults, text_of
from matexport.families.gemma3n.layout import NAME, OPTIONS, packaged_table, plan_slice, recognises
from matexport.families.gemma3n.repair import repair
from matexport.families.loaders import Verdict
from matexport.graph.options import GraphOptions
from matexport.planning import KeptLayer, Plan
from matexport.slice_table import FFN

if TYPE_CHECKING:
    import numpy as np

    from matexport.graph.builder import Graph

COLUMN = FFN
OPSETS = (21, 23)
TOKENS = 75  # of the sample inputs: after one of them, more than 64 steps

__all__ = [
    "COLUMN", "NAME", "OPSETS", "OPTIONS", "build_graph", "build_split", "card", "damage", "extra_files",
    "load_oracle", "load_slice", "load_stock", "loaders", "packaged_table", "plan_slice", "recognises", "repair",
    "sample_inputs",
]  # fmt: skip

Forward = Callable[[Mapping[str, Any]], Mapping[str, Any]]

# The Gemma Terms of Use, section 3.1, ask for this sentence in a file called Notice, for a copy of the
# terms, and for a mark on modified files.
NOTICE = """Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms

This is a Model Derivative of Gemma 3n. These files were modified by matexport: config.json and every
*.safetensors file (slice {name!r}: {layers} layers, FFN widths {widths}).
matexport.json records which part of which original tensor each tensor is.
Whoever passes these files on must pass on a copy of the terms and this notice with them.
"""


def extra_files(plan: Plan) -> dict[str, bytes]:
    widths = sorted({layer.width for layer in plan.layers})
    text = NOTICE.format(name=plan.name, layers=len(plan.layers), widths=", ".join(map(str, widths)))
    return {"NOTICE": text.encode()}


def card(plan: Plan) -> dict[str, Any]:
    usage = (
        "from transformers import Gemma3nForCausalLM\n\n"
        "model = Gemma3nForCausalLM.from_pretrained(FOLDER)\ntokens = model.generate(input_ids)"
    )
    terms = {"license": "gemma", "license_link": "https://ai.google.dev/gemma/terms"}
    task = "image-text-to-text" if "vision_config" in plan.config else "text-generation"
    return {"pipeline_tag": task, "tags": ["gemma3n", "matformer"], "usage": usage, **terms}


def loaders(checkpoint: Checkpoint) -> list[Verdict]:
    return verdicts(checkpoint.config, checkpoint.tensors.keys())


def damage(checkpoint: Checkpoint) -> tuple[str, ...]:
    return faults(checkpoint.config)


def build_graph(plan: Plan, options: GraphOptions) -> Graph:
    from matexport.families.gemma3n.graph import decoder_graph

    return decoder_graph(plan, options)


def build_split(plan: Plan, options: GraphOptions) -> dict[str, Graph]:
    from matexport.families.gemma3n.graph import split_graphs

    return split_graphs(plan, options)


def sample_inputs(config: dict[str, Any], count: int, seed: int) -> dict[str, np.ndarray]:
    """Token ids, of which some lie above the per-layer table, and longer than a short sliding window."""
    import numpy as np

    text = {**DEFAULTS, **text_of(config)}
    length = max(TOKENS, text["sliding_window"] + 5) if text["sliding_window"] <= 64 else TOKENS
    ids = np.random.default_rng(seed).integers(0, text["vocab_size"], (count, length))
    if text["vocab_size"] > text["vocab_size_per_layer_input"]:
        ids[:, 3] = text["vocab_size_per_layer_input"] + np.arange(count) % (
            text["vocab_size"] - text["vocab_size_per_layer_input"]
        )
    return {"input_ids": ids}


def load_oracle(checkpoint: Checkpoint, layers: Sequence[KeptLayer], dtype: str | None = None) -> Forward:
    found: Forward = _oracle().load_oracle(checkpoint, layers, dtype)
    return found


def load_slice(checkpoint: Checkpoint) -> Forward:
    found: Forward = _oracle().load_slice(checkpoint)
    return found


def load_stock(checkpoint: Checkpoint) -> Forward | None:
    return None  # transformers' class is the one that `load_slice` runs


def _oracle() -> Any:
    """The module that needs torch and transformers. Raises MissingError."""
    try:
        return importlib.import_module("matexport.families.gemma3n.oracle")
    except ImportError as e:
        what = f"the oracle needs torch and transformers 5: {e}"
        raise MissingError(what, fix="pip install 'matexport[torch]' 'transformers>=5'") from None
