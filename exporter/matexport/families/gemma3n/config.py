"""Gemma 3n's config.json: read with transformers' defaults, edited as raw JSON, repaired.

Nothing here goes through a config class: transformers 5 rewrites keys that 4.x and other runtimes read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matexport.errors import CheckpointError

SLIDING, FULL = "sliding_attention", "full_attention"

# what a config.json may leave out: transformers' Gemma3nTextConfig, which is the E4B model
DEFAULTS: dict[str, Any] = {
    "num_hidden_layers": 35, "num_kv_shared_layers": 15, "hidden_size": 2048, "hidden_size_per_layer_input": 256,
    "intermediate_size": 16384, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256,
    "vocab_size": 262_400, "vocab_size_per_layer_input": 262_144, "altup_num_inputs": 4, "altup_active_idx": 0,
    "laurel_rank": 64,
    "sliding_window": 512, "tie_word_embeddings": True, "attention_bias": False,
}  # fmt: skip
MAX_LAYERS = 10_000
MAY_BE_ZERO = ("num_kv_shared_layers", "altup_active_idx")
CODE = "auto_map"  # where a config.json names code that nobody has read: it does not travel
SPARSE = 10  # layers that are sparse where the config does not say which, if there are more than that


@dataclass(frozen=True)
class TextConfig:
    """The language model's sizes; the lists are over its layers.

    Attributes:
        shared: number of layers, the last ones, that read another layer's keys and values.
        per_layer: width of the per-layer inputs.
        widths: FFN widths.
        sparsity: share of the FFN's activations that is cut to zero.
        active: which of the AltUp inputs computes.
    """

    layers: int
    shared: int
    hidden: int
    per_layer: int
    widths: tuple[int, ...]
    types: tuple[str, ...]
    sparsity: tuple[float, ...]
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    per_layer_vocab: int
    altup: int
    active: int
    laurel: int

    @property
    def first(self) -> int:
        """The first layer that has no keys and values of its own."""
        return self.layers - self.shared

    def donors(self) -> dict[int, int]:
        """Sharing layer -> the layer whose keys and values it reads: the last unshared one of its type."""
        last = {kind: i for i, kind in enumerate(self.types[: self.first])}
        return {i: last[self.types[i]] for i in range(self.first, self.layers)}


def is_composite(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of the multimodal model, with the language model's inside."""
    return isinstance(config.get("text_config"), dict)


def text_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's part of a config.json, multimodal or text-only."""
    return dict(config["text_config"] if is_composite(config) else config)


def read_config(config: Mapping[str, Any], where: str) -> TextConfig:
    """The sizes that a config.json declares.

    Raises:
        CheckpointError: a value that is missing its meaning, a list of another length than the layers, a
            sharing layer without a donor, an option that is another architecture.
    """
    text = text_of(config)
    if text.get("attention_bias"):
        raise CheckpointError("has attention_bias, which no Gemma 3n has", where=where, fix="use a released checkpoint")
    if text.get("quantization_config"):
        fix = "use the unquantised (bf16) checkpoint"
        raise CheckpointError("is quantised ('quantization_config')", where=where, fix=fix)
    counted = [key for key, value in DEFAULTS.items() if type(value) is int and key != "intermediate_size"]
    sizes = {key: _count(text, key, where) for key in counted}
    layers, shared = sizes["num_hidden_layers"], sizes["num_kv_shared_layers"]
    for key in ("num_hidden_layers", "altup_num_inputs"):
        if sizes[key] > MAX_LAYERS:
            raise CheckpointError(f"{key} is {sizes[key]}", where=where, fix=f"it cannot be more than {MAX_LAYERS}")
    if not 0 <= shared < layers:
        what = f"num_kv_shared_layers is {shared} of {layers} layers"
        raise CheckpointError(what, where=where, fix="at least one layer must have keys and values of its own")
    if sizes["altup_active_idx"] >= sizes["altup_num_inputs"]:
        what = f"altup_active_idx is {sizes['altup_active_idx']} of {sizes['altup_num_inputs']} inputs"
        raise CheckpointError(what, where=where, fix="it must be one of them")
    widths, types = _widths(text, layers, where), layer_types(text, layers)
    sparsity = sparsity_of(text, layers)
    if len(types) != layers or len(sparsity) != layers:
        lengths = f"layer_types has {len(types)} entries and activation_sparsity_pattern {len(sparsity)}"
        fix = "matexport slice --repair, if the MatFormer Lab notebook wrote it; else correct config.json"
        raise CheckpointError(f"{lengths} for {layers} layers", where=where, fix=fix)
    wrong = set(types[layers - shared :]) - set(types[: layers - shared])
    if wrong:
        what = f"layers of type {', '.join(sorted(wrong))} share keys and values, but no layer of it has any"
        raise CheckpointError(what, where=where, fix="correct layer_types or num_kv_shared_layers")
    return TextConfig(
        layers, shared, sizes["hidden_size"], sizes["hidden_size_per_layer_input"], widths, types, sparsity,
        sizes["num_attention_heads"], sizes["num_key_value_heads"], sizes["head_dim"], sizes["vocab_size"],
        sizes["vocab_size_per_layer_input"], sizes["altup_num_inputs"], sizes["altup_active_idx"],
        sizes["laurel_rank"],
    )  # fmt: skip


def _count(text: Mapping[str, Any], key: str, where: str) -> int:
    value = text.get(key, DEFAULTS[key])
    if type(value) is not int or not 0 <= value < 2**31 or (value == 0 and key not in MAY_BE_ZERO):
        raise CheckpointError(f"{key} is {value!r:.40}", where=where, fix="it must be a positive number")
    return value


def _widths(text: Mapping[str, Any], layers: int, where: str) -> tuple[int, ...]:
    value = text.get("intermediate_size", DEFAULTS["intermediate_size"])
    widths = value if isinstance(value, list) else [value] * layers
    if len(widths) != layers:
        what = f"intermediate_size has {len(widths)} entries for {layers} layers"
        raise CheckpointError(what, where=where, fix="correct config.json")
    if not all(type(width) is int and width > 0 for width in widths):
        raise CheckpointError("intermediate_size holds no widths", where=where, fix="correct config.json")
    return tuple(widths)


def layer_types(text: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    """`layer_types`, by default every fifth one full; of whatever length the config has."""
    types = text.get("layer_types")
    if types is None:
        return tuple(FULL if (i + 1) % 5 == 0 else SLIDING for i in range(min(layers, MAX_LAYERS)))
    known = isinstance(types, list) and all(kind in (SLIDING, FULL) for kind in types)
    return tuple(types) if known else ()


def sparsity_of(text: Mapping[str, Any], layers: int) -> tuple[float, ...]:
    """`activation_sparsity_pattern` in floats, by default the first ten layers of more than ten at 0.95."""
    pattern = text.get("activation_sparsity_pattern")
    if pattern is None:
        layers = min(layers, MAX_LAYERS)
        sparse = SPARSE if layers > SPARSE else 0
        return (0.95,) * sparse + (0.0,) * (layers - sparse)
    if isinstance(pattern, float) and 0 <= pattern < 1:
        return (pattern,) * min(layers, MAX_LAYERS)
    known = isinstance(pattern, list) and all(type(p) in (int, float) and 0 <= p < 1 for p in pattern)
    return tuple(map(float, pattern)) if known else ()


# ------------------------------------------------------------------------------------------- editing
def sliced_config(
    config: Mapping[str, Any], text: TextConfig, kept: Sequence[int], widths: Sequence[int]
) -> dict[str, Any]:
    """The config.json of the kept layers at these FFN widths; nothing else in it changes."""
    config = {key: value for key, value in config.items() if key != CODE}
    edits = {
        "num_hidden_layers": len(kept),
        "num_kv_shared_layers": sum(i >= text.first for i in kept),
        "layer_types": [text.types[i] for i in kept],
        "activation_sparsity_pattern": [text.sparsity[i] for i in kept],
        "intermediate_size": list(widths),
    }
    if is_composite(config):
        inner = {key: value for key, value in config["text_config"].items() if key != CODE}
        return {**config, "text_config": {**inner, **edits}}
    return {**config, **edits}


def text_only_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the language model alone, from that of the multimodal model."""
    if not is_composite(config):
        return dict(config)
    outer = (
        "torch_dtype", "dtype", "transformers_version", "pad_token_id", "bos_token_id", "eos_token_id",
        "tie_word_embeddings",
    )  # fmt: skip
    return {
        "architectures": ["Gemma3nForCausalLM"],
        **config["text_config"],
        **{key: config[key] for key in outer if key in config},
        "model_type": "gemma3n_text",
    }


# ----------------------------------------------------------------------------------------- repairing
def faults(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What a notebook that slices Gemma 3n is known to leave wrong in a config.json; empty if nothing is."""
    text, found = text_of(config), []
    layers = text.get("num_hidden_layers")
    types, pattern = text.get("layer_types"), text.get("activation_sparsity_pattern")
    if isinstance(types, list) and type(layers) is int and len(types) > layers:
        found.append(f"layer_types is that of the {len(types)} layers of the source, not of the {layers} kept")
    if isinstance(pattern, list) and any(type(p) is int for p in pattern):
        found.append("activation_sparsity_pattern holds integers: transformers 5 refuses to load it")
    return tuple(found)


def repaired_config(config: Mapping[str, Any], kept: Sequence[int] | None, where: str) -> dict[str, Any]:
    """The config.json that the notebook should have written.

    Args:
        kept: the source layers that were kept; None to infer them.

    Raises:
        CheckpointError: the kept layers cannot be inferred, or are not those of the checkpoint.
    """
    text = text_of(config)
    layers = _count(text, "num_hidden_layers", where)
    types, sparsity = layer_types(text, layers), sparsity_of(text, layers)
    if kept is not None and len(kept) != layers:
        fix = "name the row that it was cut with: -s ROW"
        raise CheckpointError(f"the row keeps {len(kept)} layers, {layers} are there", where=where, fix=fix)
    if len(types) < layers:
        raise CheckpointError("layer_types is too short to be repaired", where=where, fix="slice the source again")
    if len(types) > layers:
        shared, given = _count(text, "num_kv_shared_layers", where), kept
        kept = _inferred(len(types), layers, shared, sparsity) if given is None else given
        if kept is None:
            fix = "name the row that it was cut with: -s ROW"
            raise CheckpointError("which layers were skipped cannot be inferred", where=where, fix=fix)
        first = len(types) - FIRST_FROM_END
        if len(kept) != layers or max(kept) >= len(types) or sum(i >= first for i in kept) != shared:
            what = f"the row keeps {len(kept)} layers, {layers} with {shared} shared ones are there"
            raise CheckpointError(what, where=where, fix="name the row that it was cut with: -s ROW")
        types = tuple(types[i] for i in kept)
    edits = {"layer_types": list(types), "activation_sparsity_pattern": list(sparsity)}
    if is_composite(config):
        return {**config, "text_config": {**config["text_config"], **edits}}
    return {**config, **edits}


FIRST_FROM_END = 15  # the notebook takes the last 15 layers of its source, E4B, for the sharing ones


def _inferred(source: int, layers: int, shared: int, sparsity: Sequence[float]) -> list[int] | None:
    """The kept layers, if each of the sparse, dense and sharing ones was kept or skipped as a whole."""
    first = source - FIRST_FROM_END
    sparse = sum(p > 0 for p in sparsity)
    groups = [(0, SPARSE, sparse), (SPARSE, first, layers - shared - sparse), (first, source, shared)]
    if any(count not in (0, stop - start) for start, stop, count in groups):
        return None
    return [i for start, stop, count in groups if count for i in range(start, stop)]
