"""A language model as transformers.js takes it: its names for states, and a config.json that its `generate()` accepts.

transformers.js 4.3 has no type for a model of Mamba layers alone. `nemotron_h` mixes Mamba and attention layers, so the
folder says that it is one, with an attention layer at the end whose cache is a single number a token: its length is
how `generate()` counts the tokens so far.

Of Gemma 3n it knows the multimodal model only, whose embeddings are a graph of their own: it takes the text model alone
for that if config.json says so, and feeds the keys and values that a graph asks for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from matexport.graph.builder import Graph
from matexport.planning import Plan

NAMES = {"conv_state": "conv", "recurrent_state": "ssm"}
BATCH = "batch_size"  # the one symbol that transformers.js knows; a state with another one would be empty


def rename_states(graph: Graph) -> int:
    """Gives the states of a graph transformers.js's names; returns the number of Mamba layers.

    To Mamba layers the cache that counts is added. A graph without states is left as it is.
    """
    layers = 0
    for value in [*graph.inputs, *graph.outputs]:
        kind, _, rest = str(value.name).partition(".")
        layer, _, state = rest.partition(".")
        if state in NAMES:
            prefix = "past" if kind == "past_key_values" else kind
            value.name = f"{prefix}_{NAMES[state]}.{layer}"
            layers = max(layers, int(layer) + 1)
    for name in ("key", "value") if layers else ():
        past = graph.input(f"past_key_values.{layers}.{name}", "F32", [BATCH, 1, "past_sequence_length", 1])
        with graph.scope(f"count.{name}"):
            new = graph.op(
                "Unsqueeze", graph.op("Cast", graph.inputs[0], to=int(ir.DataType.FLOAT)), graph.constant([1, 3])
            )
            present = graph.op("Concat", past, new, axis=2)
        graph.output(present, f"present.{layers}.{name}", "F32", [BATCH, 1, "total_sequence", 1])
    stateful = any(str(value.name).startswith("past_") for value in graph.inputs)
    for value in [*graph.inputs, *graph.outputs] if stateful else ():
        assert value.shape is not None
        value.shape = ir.Shape([BATCH if size == "batch" else size for size in value.shape])
    return layers


def web_config(plan: Plan, layers: int, data_files: Mapping[str, int]) -> dict[str, Any]:
    """config.json: that of the slice, and what transformers.js reads."""
    config = {key: value for key, value in plan.config.items() if key != "auto_map" and _is_strict(value)}
    js = {"dtype": "fp32", "use_external_data_format": dict(data_files)}
    if layers:
        config |= {
            "model_type": "nemotron_h",
            "architectures": ["NemotronHForCausalLM"],
            "num_hidden_layers": layers + 1,
            "layers_block_type": ["mamba"] * layers + ["attention"],
            "num_key_value_heads": 1,
            "head_dim": 1,
        }
    elif plan.family == "gemma3n":
        text = config.get("text_config", config)
        config = {"text_config": text, **{key: value for key, value in config.items() if key.endswith("_token_id")}}
        config |= {"model_type": "gemma3n", "architectures": ["Gemma3nForConditionalGeneration"]}
    return {**config, "transformers.js_config": js}


def _is_strict(value: Any) -> bool:
    """Whether a browser can read it: Python writes infinity, a limit that is none, as a word that JSON has not."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True
