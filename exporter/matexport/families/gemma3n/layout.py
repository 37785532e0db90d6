"""Gemma 3n checkpoints: their tensors, and which part of each of them a smaller model is.

A MatFormer (arXiv 2310.07707, section 3.2) is nested along the FFN width of each layer: the smaller
model keeps the first neurons. In depth, whole layers go, and with each its part of the per-layer
embeddings. The towers of the multimodal model are copied.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from matexport.checkpoint import Checkpoint
from matexport.errors import CheckpointError, TableError
from matexport.families.gemma3n.compatibility import depth_notes, needing
from matexport.families.gemma3n.config import (
    CODE,
    TextConfig,
    faults,
    layer_types,
    read_config,
    sliced_config,
    text_of,
    text_only_config,
)
from matexport.families.rows import count_notes, kept_layers, widths_of
from matexport.planning import KeptLayer, Plan, PlannedTensor, View, blocks, part, whole
from matexport.slice_table import FFN, SKIPPED, TITLES, Row, Table
from matexport.tensors import Tensor

NAME = "gemma3n"
INNER, TEXT = "model.language_model.", "model."  # the language model's prefix, in the multimodal model and alone
TOWERS = ("model.vision_tower.", "model.audio_tower.", "model.embed_vision.", "model.embed_audio.")
HEAD, EMBEDDING, PER_LAYER_TABLE = "lm_head.weight", "embed_tokens.weight", "embed_tokens_per_layer.weight"
PER_LAYER_PROJECTION = "per_layer_model_projection.weight"
KEYS_AND_VALUES = ("self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.k_norm.weight")

_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Model:
    """A Gemma 3n checkpoint: its sizes, and the prefix of its language model's tensors."""

    text: TextConfig
    prefix: str


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint is Gemma 3n, multimodal or text-only, whole or sliced."""
    kinds = (checkpoint.config.get("model_type"), text_of(checkpoint.config).get("model_type"))
    return bool({"gemma3n", "gemma3n_text"} & set(map(str, kinds)))


def packaged_table(checkpoint: Checkpoint) -> str | None:
    """The published rows, for a model of E4B's shape, or for what the notebook made of one."""
    if len(layer_types(text_of(checkpoint.config), 0)) == 35 and faults(checkpoint.config):
        return "gemma3n.csv"
    text = read_config(checkpoint.config, str(checkpoint.path / "config.json"))
    return "gemma3n.csv" if text.layers == 35 and set(text.widths) == {16384} else None


def layer_shapes(text: TextConfig, width: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of one layer and its shape, at an FFN width."""
    h, p, a, q, kv = text.hidden, text.per_layer, text.altup, text.heads * text.head_dim, text.kv_heads * text.head_dim
    norms = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    return {
        "self_attn.q_proj.weight": (q, h),
        "self_attn.k_proj.weight": (kv, h),
        "self_attn.v_proj.weight": (kv, h),
        "self_attn.o_proj.weight": (h, q),
        "self_attn.q_norm.weight": (text.head_dim,),
        "self_attn.k_norm.weight": (text.head_dim,),
        "mlp.gate_proj.weight": (width, h),
        "mlp.up_proj.weight": (width, h),
        "mlp.down_proj.weight": (h, width),
        **{f"{norm}.weight": (h,) for norm in norms},
        "altup.correct_output_scale": (h,),
        "altup.correction_coefs.weight": (a, a),
        "altup.prediction_coefs.weight": (a * a, a),
        "altup.modality_router.weight": (a, h),
        "altup.router_norm.weight": (h,),
        "laurel.linear_left.weight": (text.laurel, h),
        "laurel.linear_right.weight": (h, text.laurel),
        "laurel.post_laurel_norm.weight": (h,),
        "per_layer_input_gate.weight": (p, h),
        "per_layer_projection.weight": (h, p),
        "post_per_layer_input_norm.weight": (h,),
    }


def shared_shapes(text: TextConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor outside the layers and its shape."""
    h, p, n = text.hidden, text.per_layer, text.layers
    return {
        EMBEDDING: (text.vocab, h),
        PER_LAYER_TABLE: (text.per_layer_vocab, n * p),
        PER_LAYER_PROJECTION: (n * p, h),
        "per_layer_projection_norm.weight": (p,),
        "norm.weight": (h,),
        **{f"altup_projections.{i}.weight": (h, h) for i in range(text.altup - 1)},
        **{f"altup_unembed_projections.{i}.weight": (h, h) for i in range(text.altup - 1)},
    }


# ----------------------------------------------------------------------------------------- reading
def read_model(checkpoint: Checkpoint) -> Model:
    """The sizes of a checkpoint, the name and shape of each of its tensors checked against them.

    Raises:
        CheckpointError: a config.json that contradicts itself; a tensor that is missing, unknown or of
            another shape or dtype.
    """
    text = read_config(checkpoint.config, str(checkpoint.path / "config.json"))
    prefix = INNER if INNER + EMBEDDING in checkpoint.tensors else TEXT
    expected = {prefix + name: shape for name, shape in shared_shapes(text).items()}
    optional = set()
    for i, width in enumerate(text.widths):
        expected |= {f"{prefix}layers.{i}.{name}": shape for name, shape in layer_shapes(text, width).items()}
        if i >= text.first:
            optional |= {f"{prefix}layers.{i}.{name}" for name in KEYS_AND_VALUES}  # never used
    if HEAD in checkpoint.tensors:
        expected[HEAD] = (text.vocab, text.hidden)
    found = {name for name in checkpoint.tensors if not name.startswith(TOWERS)}
    missing, extra = expected.keys() - found - optional, found - expected.keys()
    if missing or extra:
        what = f"tensors do not fit config.json: missing {sorted(missing)[:5]}, unknown {sorted(extra)[:5]}"
        fix = "download config.json and weights of one revision"
        raise CheckpointError(what, where=str(checkpoint.path), fix=fix)
    for name in found:
        _check(checkpoint.tensors[name], expected[name])
    return Model(text, prefix)


def _check(tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        what, fix = f"has shape {tensor.shape}, {shape} expected", "download config.json and weights of one revision"
    elif tensor.dtype not in ("F16", "BF16", "F32", "F64"):
        what, fix = f"has dtype {tensor.dtype}", "only float weights can be sliced: use the bf16 checkpoint"
    else:
        return
    raise CheckpointError(f"tensor {tensor.name!r} {what}", where=str(tensor.file), fix=fix)


# ----------------------------------------------------------------------------------------- slicing
def plan_slice(checkpoint: Checkpoint, row: Row, trained: Table | None = None) -> Plan:
    """Plans one row; `trained` is the table of the rows that the model was trained for, for the notes.

    Raises:
        TableError: a width above the source's or zero, a list of the wrong length, a skipped layer whose
            keys and values a kept one reads.
        CheckpointError: see `read_model`.
    """
    model = read_model(checkpoint)
    text = model.text
    kept = kept_layers(row, text.layers)
    check_donors(row, text, kept)
    widths = widths_of(row, FFN, kept, tuple(text.widths[i] for i in kept))
    layers = tuple(KeptLayer(index, width) for index, width in zip(kept, widths, strict=True))
    for layer in layers:
        if not 0 < layer.width <= text.widths[layer.source]:
            what = f"width {layer.width} of layer {layer.source} is not between 1 and {text.widths[layer.source]}"
            where = f"{row.where or row.name}, column {TITLES[FFN]!r}"
            raise TableError(what, where=where, fix="a slice keeps the first neurons of a layer: no more than it has")
    config = sliced_config(checkpoint.config, text, kept, widths)
    plan = Plan(NAME, row.name, layers, row.skipped, _tensors(checkpoint, model, layers), config, 0)
    plan, custom = _counted(plan), CODE in {**text_of(checkpoint.config), **checkpoint.config}
    notes = (
        *(f"the source: {fault}; corrected here" for fault in faults(checkpoint.config)),
        *(["config.json names custom code (auto_map): it was neither run nor copied"] if custom else []),
        *count_notes(row, plan.effective_parameters),
        *_training_notes(row, text, kept, widths, trained),
        *depth_notes(config),
    )
    return replace(plan, notes=notes)


def check_donors(row: Row, text: TextConfig, kept: Sequence[int]) -> None:
    """Refuses to skip a layer whose keys and values a kept layer reads: transformers would take others, silently.

    Raises:
        TableError: names the layer, its readers, and what may be skipped instead.
    """
    donors = text.donors()
    readers = {donor: [i for i in donors if donors[i] == donor] for donor in sorted(set(donors.values()))}
    for donor, reading in readers.items():
        orphans = [i for i in reading if i in kept]
        if donor not in kept and orphans:
            reserved = " and ".join(map(str, readers))
            what = (
                f"Layers {reserved} are reserved: layer {donor} holds the keys and values that layers {reading} read, "
                f"and of these {orphans} are kept"
            )
            fix = f"keep layer {donor}, or skip {sorted({donor, *reading})} together"
            raise TableError(what, where=f"{row.where or row.name}, column {TITLES[SKIPPED]!r}", fix=fix)


def _tensors(checkpoint: Checkpoint, model: Model, layers: Sequence[KeptLayer]) -> dict[str, PlannedTensor]:
    """Every tensor of the slice: FFNs and per-layer embeddings cut, layers renumbered, the rest as it is."""
    text, prefix = model.text, model.prefix
    new_index = {layer.source: i for i, layer in enumerate(layers)}
    kept, full = [layer.source for layer in layers], len(layers) == text.layers
    tied = text_of(checkpoint.config).get("tie_word_embeddings", checkpoint.config.get("tie_word_embeddings", True))
    tensors = {}
    for name, tensor in checkpoint.tensors.items():
        inner = name.removeprefix(prefix)
        match = _LAYER.fullmatch(inner) if name.startswith(prefix) else None
        new, view = name, None
        if match:
            index = int(match[1])
            if index not in new_index:
                continue
            new, width = f"{prefix}layers.{new_index[index]}.{match[2]}", layers[new_index[index]].width
            if match[2] in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
                view = part(tensor, 0, [(0, width)])
            elif match[2] == "mlp.down_proj.weight":
                view = part(tensor, 1, [(0, width)])
        elif name == HEAD and tied:
            continue  # stored once, as the embedding
        elif inner == PER_LAYER_PROJECTION and not full:
            view = part(tensor, 0, blocks(kept, text.per_layer))
        elif inner == PER_LAYER_TABLE and not full:
            rows, p = text.per_layer_vocab, text.per_layer
            ranges = (((0, rows),), blocks(kept), ((0, p),))
            view = View(name, (rows, text.layers, p), ranges, (rows, len(kept) * p))
        tensors[new] = PlannedTensor(tensor.dtype, view or whole(tensor))
    return tensors


def _counted(plan: Plan) -> Plan:
    """The plan with its parameters counted: "effective" leaves out the embeddings, which need no fast memory."""
    tables = (EMBEDDING, PER_LAYER_TABLE, HEAD)
    towers = sum(math.prod(tensor.shape) for name, tensor in plan.tensors.items() if name.startswith(TOWERS))
    looked_up = sum(math.prod(t.shape) for name, t in plan.tensors.items() if name.endswith(tables))
    return replace(plan, tower_parameters=towers, effective_parameters=plan.parameters - towers - looked_up)


def _training_notes(
    row: Row, text: TextConfig, kept: Sequence[int], widths: Sequence[int], trained: Table | None
) -> list[str]:
    """What was never trained, as far as the model's own table says."""
    if trained is None:
        return []
    notes = []
    known = {width for other in trained.rows if other.ffn for width in (*other.ffn.head, other.ffn.fill) if width}
    outside = sorted({width for width in widths if known and not min(known) <= width <= max(known)})
    if outside:
        notes.append(f"widths {outside} were never trained (trained: {min(known)} to {max(known)})")
    depths = {tuple(sorted(other.skipped)) for other in trained.rows}
    if row.skipped and tuple(sorted(row.skipped)) not in depths:
        rows = ", ".join(str(list(skipped)) for skipped in sorted(depths) if skipped) or "none"
        notes.append(f"skipping {sorted(row.skipped)} was never trained (trained: {rows})")
    return notes


# ----------------------------------------------------------------------------------------- options
def text_only(plan: Plan) -> Plan:
    """The language model alone, under its own names: `Gemma3nForCausalLM`."""
    tensors = {
        TEXT + name.removeprefix(INNER) if name.startswith(INNER) else name: tensor
        for name, tensor in plan.tensors.items()
        if not name.startswith(TOWERS)
    }
    return _counted(replace(plan, tensors=tensors, config=text_only_config(plan.config)))


def drop_dead_kv(plan: Plan) -> Plan:
    """Without the keys and values of the sharing layers, which nothing computes with."""
    text = text_of(plan.config)
    first = text["num_hidden_layers"] - text["num_kv_shared_layers"]

    def is_dead(name: str) -> bool:
        match = re.search(r"^model\.(?:language_model\.)?layers\.(\d+)\.(.+)", name)
        return match is not None and int(match[1]) >= first and match[2] in KEYS_AND_VALUES

    tensors = {name: tensor for name, tensor in plan.tensors.items() if not is_dead(name)}
    dropped = len(plan.tensors) - len(tensors)
    if not dropped:
        return plan
    note = f"{dropped} unused key and value tensors are left out; they are missed by {', '.join(needing('unused K/V'))}"
    return _counted(replace(plan, tensors=tensors, notes=(*plan.notes, note)))


OPTIONS = {"text_only": text_only, "drop_dead_kv": drop_dead_kv}
