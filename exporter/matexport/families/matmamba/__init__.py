"""The MatMamba family: Mamba-2 blocks nested in whole heads (arXiv 2410.06718), language models and vision."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matexport.checkpoint import Checkpoint
from matexport.errors import MissingError, UsageError
from matexport.families.loaders import Verdict
from matexport.families.matmamba.containers import verdicts
from matexport.families.matmamba.layout import packaged_table, plan_slice, read_model, recognises
from matexport.graph.options import GraphOptions
from matexport.planning import KeptLayer, Plan
from matexport.slice_table import MAMBA, Row

if TYPE_CHECKING:
    import numpy as np

    from matexport.graph.builder import Graph

NAME = "matmamba"
COLUMN = MAMBA
OPTIONS: Mapping[str, Callable[[Plan], Plan]] = {}
OPSETS = (21, 23)
TOKENS = 37  # of the sample inputs: no multiple of anything

__all__ = [
    "COLUMN", "NAME", "OPSETS", "OPTIONS", "build_graph", "build_split", "card", "damage", "extra_files",
    "load_oracle", "load_slice", "load_stock", "loaders", "packaged_table", "plan_slice", "recognises", "repair",
    "sample_inputs",
]  # fmt: skip

Forward = Callable[[Mapping[str, Any]], Mapping[str, Any]]


def extra_files(plan: Plan) -> dict[str, bytes]:
    if "auto_map" not in plan.config:
        return {}
    return {"modeling_matmamba.py": (Path(__file__).parent / "modeling.py").read_bytes()}


def card(plan: Plan) -> dict[str, Any]:
    task = "ImageClassification" if plan.config["model_type"] == "matmamba_vision" else "CausalLM"
    own = "import matexport.hf  # or pass trust_remote_code=True instead\n" if "auto_map" in plan.config else ""
    call = "logits = model(pixel_values).logits" if task != "CausalLM" else "tokens = model.generate(input_ids)"
    usage = (
        f"{own}from transformers import AutoModelFor{task}\n\n"
        f"model = AutoModelFor{task}.from_pretrained(FOLDER)\n{call}"
    )
    pipeline = "text-generation" if task == "CausalLM" else "image-classification"
    return {"pipeline_tag": pipeline, "tags": ["mamba", "matmamba"], "usage": usage}


def loaders(checkpoint: Checkpoint) -> list[Verdict]:
    model = read_model(checkpoint)
    return verdicts(model.kind, checkpoint.config, [mixer.heads for mixer in model.mixers], model.head_dim)


def damage(checkpoint: Checkpoint) -> tuple[str, ...]:
    return ()


def repair(checkpoint: Checkpoint, row: Row | None) -> Checkpoint:
    raise UsageError("no tool is known to damage MatMamba checkpoints", fix="leave out --repair")


def build_graph(plan: Plan, options: GraphOptions) -> Graph:
    from matexport.families.matmamba.graph import language_graph, vision_graph
    from matexport.graph.builder import Graph

    vision = plan.config["model_type"] == "matmamba_vision"
    g = Graph("matmamba_vision" if vision else "matmamba_lm", options)
    return (vision_graph if vision else language_graph)(g, plan)


def build_split(plan: Plan, options: GraphOptions) -> dict[str, Graph]:
    return {}


def sample_inputs(config: dict[str, Any], count: int, seed: int) -> dict[str, np.ndarray]:
    import numpy as np

    rng = np.random.default_rng(seed)
    if "image_size" in config:
        size = config["image_size"]
        return {"pixel_values": rng.standard_normal((count, 3, size, size), dtype=np.float32)}
    return {"input_ids": rng.integers(0, config["vocab_size"], (count, TOKENS))}


def load_oracle(checkpoint: Checkpoint, layers: Sequence[KeptLayer], dtype: str | None = None) -> Forward:
    found: Forward = _oracle().load_oracle(checkpoint, layers, dtype)
    return found


def load_slice(checkpoint: Checkpoint) -> Forward:
    found: Forward = _oracle().load_slice(checkpoint)
    return found


def load_stock(checkpoint: Checkpoint) -> Forward | None:
    found: Forward | None = _oracle().load_stock(checkpoint)
    return found


def _oracle() -> Any:
    """The module that needs torch. Raises MissingError."""
    try:
        return importlib.import_module("matexport.families.matmamba.oracle")
    except ImportError as e:
        what = f"the oracle needs torch and transformers: {e}"
        raise MissingError(what, fix="pip install 'matexport[torch]'") from None
