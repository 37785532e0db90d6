"""Which runtimes load a Gemma 3n checkpoint, and why another one does not: a table and the facts it needs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from matexport.families.gemma3n.config import (
    DEFAULTS,
    FULL,
    SLIDING,
    faults,
    is_composite,
    layer_types,
    sparsity_of,
    text_of,
)
from matexport.families.loaders import Loader, Verdict, judge

LOADERS = (
    Loader("transformers >= 5", ("lists fit", "floats"), "Gemma3nTextConfig, modeling_gemma3n.py at 5.23: run"),
    Loader("transformers 4.57", ("lists fit", "unused K/V"), "the same at 4.57.6: run"),
    Loader("transformers 4.53", ("types fit", "unused K/V"), "the same at 4.53.3: run; takes the first layer_types"),
    Loader("vLLM", ("lists fit", "unused K/V", "donor offsets"), "models/gemma3n.py: donors at first-2 and first-1"),
    Loader(
        "mlx-lm",
        ("lists fit", "multimodal names", "rope keys"),
        "models/gemma3n.py at d78bf58: text_config and model.language_model.* only",
    ),
    Loader(
        "mistral.rs",
        ("lists fit", "unused K/V", "multimodal names"),
        "vision_models/gemma3n at 9e92262: K/V of every layer, the multimodal class only",
    ),
    Loader(
        "llama.cpp",
        ("lists fit", "unused K/V", "one width", "first shared 20", "period 5", "sparse 10", "multimodal names"),
        "src/models/gemma3n.cpp at 3688fa8 and its converter: constants, one n_ff",
    ),
    Loader("onnxruntime-genai builder, optimum-onnx", ("never",), "no Gemma 3n at a0c04eb, 1939f27"),
)
ROPE_KEYS = ("rope_theta", "rope_local_base_freq")


def verdicts(config: Mapping[str, Any], names: Collection[str]) -> list[Verdict]:
    """Each runtime's verdict on a checkpoint of this config.json and these tensors."""
    return judge(LOADERS, unmet(config, names))


def unmet(config: Mapping[str, Any], names: Collection[str]) -> dict[str, str]:
    """The facts of the table that do not hold, and why."""
    text = text_of(config)
    layers, shared = (_number(text, key) for key in ("num_hidden_layers", "num_kv_shared_layers"))
    types, widths = layer_types(text, layers), text.get("intermediate_size", 16384)
    sparsity, found = sparsity_of(text, layers), _depth(config)
    found["never"] = "has no Gemma 3n of this kind"
    stale = [fault for fault in faults(config) if "layer_types" in fault]
    if stale or not len(types) == len(sparsity) == layers:
        found["lists fit"] = found["types fit"] = "; ".join(stale) or "config.json's lists do not fit its layers"
    if any("integers" in fault for fault in faults(config)):
        found["floats"] = "activation_sparsity_pattern holds integers"
    if isinstance(widths, list) and not all(type(width) is int for width in widths):
        found["lists fit"] = found["types fit"] = "intermediate_size holds what is no width"
    elif isinstance(widths, list) and len(set(widths)) > 1:
        found["one width"] = f"the layers have different FFN widths ({', '.join(map(str, sorted(set(widths))))})"
    if not is_composite(config) or not any(name.startswith("model.language_model.") for name in names):
        found["multimodal names"] = "it takes the multimodal config and names only, this is the text model alone"
    if not all(key in text for key in ROPE_KEYS):
        found["rope keys"] = f"config.json has no {' and '.join(ROPE_KEYS)} (transformers 5 rewrote them)"
    parts = ("k_proj", "v_proj", "k_norm")
    keys = min(sum(name.endswith(f"self_attn.{part}.weight") for name in names) for part in parts)
    if keys < layers:
        found["unused K/V"] = f"the keys and values of {layers - keys} of {shared} sharing layers were left out"
    return found


def needing(fact: str) -> list[str]:
    """The runtimes that a fact matters to."""
    return [loader.name for loader in LOADERS if fact in loader.needs]


def depth_notes(config: Mapping[str, Any]) -> list[str]:
    """What runtimes with fixed layer offsets would misread in a sliced model."""
    found = _depth(config)
    text = text_of(config)
    takers = {"donor offsets": "vLLM"}
    by_runtime: dict[str, list[str]] = {}
    for fact, why in found.items():
        by_runtime.setdefault(takers.get(fact, "llama.cpp"), []).append(why)
    notes = [f"{runtime} would misread this model: {'; '.join(reasons)}" for runtime, reasons in by_runtime.items()]
    if _number(text, "num_kv_shared_layers") == 0:
        notes.append("no layer shares keys and values: transformers 4.57 cannot generate with a static cache")
    return notes


def _depth(config: Mapping[str, Any]) -> dict[str, str]:
    """The facts about the order of the layers that do not hold."""
    text = text_of(config)
    layers, shared = (_number(text, key) for key in ("num_hidden_layers", "num_kv_shared_layers"))
    types, sparsity, found = layer_types(text, layers), sparsity_of(text, layers), {}
    first = layers - shared
    last = {kind: i for i, kind in enumerate(types[:first])}
    for kind, offset in ((SLIDING, 2), (FULL, 1)):
        if kind in types[first:] and last.get(kind) != first - offset:
            found["donor offsets"] = f"it reads {kind} keys and values of layer {first - offset}, not {last.get(kind)}"
    if (layers > 20 and first != 20) or (shared and first != 20):
        found["first shared 20"] = f"it takes layer 20 for the first one without keys and values, not {first}"
    if any((kind == FULL) != ((i + 1) % 5 == 0) for i, kind in enumerate(types)):
        found["period 5"] = "it takes every fifth layer for a full one"
    if [p > 0 for p in sparsity] != [i < 10 for i in range(len(sparsity))]:
        found["sparse 10"] = "it takes the first 10 layers, and no others, for sparse ones"
    return found


def _number(text: Mapping[str, Any], key: str) -> int:
    value = text.get(key, DEFAULTS[key])
    return value if type(value) is int else 0
