"""What onnxruntime-genai needs beside a model with states: `genai_config.json`, and our kernels.

It finds the states of the first `num_hidden_layers` layers by their names, sizes all as the first one's, and gives
zeros, or nothing, at the start. The type `decoder` wants no particular ones. Run with its version 0.18.
"""

from __future__ import annotations

import matexport_plugins
from matexport.errors import UsageError
from matexport.graph.builder import Graph
from matexport.manifest import json_bytes
from matexport.planning import Plan

CONTEXT, LENGTH = 1 << 20, 2048  # tokens: there is no limit, and what a generation stops at by itself
TOKENS = ("input_ids", "attention_mask", "position_ids")
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def genai_files(plan: Plan, graph: Graph, form: str) -> dict[str, bytes]:
    """The files to put beside the model, by name.

    Raises:
        UsageError: it is no model with states, or its layers differ in width.
    """
    shapes = [
        tuple(value.shape)[1:]
        for value in graph.inputs
        if value.shape is not None and str(value.name).endswith((".recurrent_state", ".key"))
    ]
    if not shapes:
        raise UsageError("target 'genai' writes language models, and this is none", fix="use --target cpu")
    if len(set(shapes)) > 1:
        what = (
            f"the layers of {plan.name!r} differ in width, and onnxruntime-genai takes the states of all as the first's"
        )
        raise UsageError(what, fix="use a row of one width, or --target cpu")
    heads, _, head_dim = shapes[0]
    logits = graph.outputs[0].shape
    assert logits is not None
    rows = int(logits[2])  # type: ignore[arg-type]
    text = {**plan.config.get("text_config", {}), **plan.config}
    ids = {key: value for key in IDS if (value := text.get(key)) is not None}
    # what equals pad_token_id at the end of a prompt is masked, and token 0 if there is no such id. Where it is none,
    # or one that prompts hold, it is the last row of the embedding, which is there to fill it up
    begin, end = ids.get("bos_token_id"), ids.get("eos_token_id")
    if ids.get("pad_token_id") in (None, begin, *(end if isinstance(end, list) else [end])):
        ids["pad_token_id"] = rows - 1
    session: dict[str, object] = {"log_id": "onnxruntime-genai", "provider_options": []}
    library = matexport_plugins.ort_library() if form == "custom" and graph.functions else None
    if library:
        session["custom_ops_library"] = library.name
    config = {
        "model": {
            "type": "decoder",
            "vocab_size": rows,
            "context_length": text.get("max_position_embeddings", CONTEXT),
            **ids,
            "decoder": {
                "session_options": session,
                "filename": "model.onnx",
                "hidden_size": text.get("d_model") or text["hidden_size"],
                "head_size": head_dim,
                "num_attention_heads": text.get("num_attention_heads", heads),
                "num_key_value_heads": heads,
                "num_hidden_layers": len(shapes),  # with states of their own
                "inputs": {name: name for name in TOKENS if name in {value.name for value in graph.inputs}},
                "outputs": {"logits": "logits"},
            },
        },
        "search": {"do_sample": False, "max_length": LENGTH, "num_beams": 1, "past_present_share_buffer": False},
    }
    files = {"genai_config.json": json_bytes(config)}
    return files | ({library.name: library.read_bytes()} if library else {})
