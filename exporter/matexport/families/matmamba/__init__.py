"""The MatMamba family: Mamba-2 blocks nested in whole heads (arXiv 2410.06718). Vision models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matexport.checkpoint import Checkpoint
from matexport.families.matmamba.layout import packaged_table, plan_slice, recognises
from matexport.planning import KeptLayer, Plan
from matexport.slice_table import MAMBA

if TYPE_CHECKING:
    import numpy as np

    from matexport.graph.builder import Graph

NAME = "matmamba"
COLUMN = MAMBA

__all__ = [
    "COLUMN", "NAME", "build_graph", "card", "custom_code", "load_oracle", "load_slice", "packaged_table",
    "plan_slice", "recognises", "sample_inputs",
]  # fmt: skip


def custom_code() -> dict[str, bytes]:
    return {"modeling_matmamba.py": (Path(__file__).parent / "modeling.py").read_bytes()}


def card(plan: Plan) -> dict[str, Any]:
    usage = (
        "from transformers import AutoModelForImageClassification\n\n"
        "import matexport.hf  # or pass trust_remote_code=True instead\n\n"
        "model = AutoModelForImageClassification.from_pretrained(FOLDER)\n"
        "logits = model(pixel_values).logits"
    )
    return {"pipeline_tag": "image-classification", "tags": ["mamba", "matmamba"], "usage": usage}


def build_graph(plan: Plan) -> Graph:
    from matexport.families.matmamba.graph import vision_graph

    return vision_graph(plan)


def sample_inputs(config: dict[str, Any], count: int, seed: int) -> dict[str, np.ndarray]:
    import numpy as np

    size = config["image_size"]
    return {"pixel_values": np.random.default_rng(seed).standard_normal((count, 3, size, size), dtype=np.float32)}


def load_oracle(
    checkpoint: Checkpoint, layers: Sequence[KeptLayer]
) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    from matexport.families.matmamba import oracle

    return oracle.load_oracle(checkpoint, layers)


def load_slice(checkpoint: Checkpoint) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    from matexport.families.matmamba import oracle

    return oracle.load_slice(checkpoint)
