"""MatMamba checkpoints: their sizes, and which part of each tensor a narrower model is.

A mixer is nested in whole heads (MatMamba paper, section 3.1): the narrower model keeps some heads of
every layer, and of each tensor the rows or columns of those heads. B, C, norms over the residual
stream and everything outside the mixers stay as they are. Widths in a slice table are in units of
d_model, as in the authors' `mixnmatch_dims`: a width of `dims` has 2 * dims channels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from matexport.checkpoint import Checkpoint
from matexport.errors import CheckpointError, TableError
from matexport.families.matmamba import containers
from matexport.families.matmamba.containers import EMBEDDINGS, EXPAND, HEAD, is_tied, size_of
from matexport.families.rows import kept_layers, widths_of
from matexport.planning import KeptLayer, Plan, PlannedTensor, View, blocks, part, whole
from matexport.slice_table import MAMBA, TITLES, Row, Table
from matexport.tensors import Tensor

PACKAGED = {  # (kind, d_model, layers) -> table
    ("vision", 64, 4): "matmamba-digits.csv",
    ("vision", 512, 20): "matmamba-vision-35m.csv",
    ("vision", 1024, 20): "matmamba-vision-135m.csv",
    ("lm", 768, 24): "matmamba-lm-130m.csv",
    ("lm", 1024, 48): "matmamba-lm-370m.csv",
    ("lm", 1536, 48): "matmamba-lm-790m.csv",
    ("lm", 2048, 48): "matmamba-lm-1.4b.csv",
}
PREFIXES = {"vision": "", "lm": "backbone."}  # of the layers' tensors

_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Mixer:
    """The sizes of one mixer, from its tensors' shapes: heads h, head dim p, groups g, state n, kernel k."""

    heads: int
    head_dim: int
    groups: int
    state: int
    kernel: int

    @property
    def width(self) -> int:
        """The inner width w, in channels."""
        return self.heads * self.head_dim

    @property
    def bc(self) -> int:
        """Channels of B and C together."""
        return 2 * self.groups * self.state

    def shapes(self, d_model: int) -> dict[str, tuple[int, ...]]:
        """Every tensor of the mixer and its shape."""
        w, h, conv = self.width, self.heads, self.width + self.bc
        return {
            "in_proj.weight": (2 * w + self.bc + h, d_model),
            "conv1d.weight": (conv, 1, self.kernel),
            "conv1d.bias": (conv,),
            "dt_bias": (h,),
            "A_log": (h,),
            "D": (h,),
            "norm.weight": (w,),
            "out_proj.weight": (d_model, w),
        }


@dataclass(frozen=True)
class Model:
    """The sizes of a MatMamba model: `kind` is "lm" or "vision"."""

    kind: str
    d_model: int
    mixers: tuple[Mixer, ...]

    @property
    def head_dim(self) -> int:
        return self.mixers[0].head_dim

    @property
    def prefix(self) -> str:
        """Of the names of the layers' tensors."""
        return PREFIXES[self.kind]


# ----------------------------------------------------------------------------------------- reading
def kind_of(checkpoint: Checkpoint) -> str | None:
    """The kind of model, "lm" or "vision", or None if the checkpoint is no MatMamba."""
    names = checkpoint.tensors.keys()
    if {"layers.0.mixer.in_proj.weight", "patch_embed.proj.weight"} <= names:
        return "vision"
    # dt_bias is what Mamba-2 has and Mamba-1 has not
    if "backbone.layers.0.mixer.dt_bias" in names and names & set(EMBEDDINGS):
        return "lm"
    return None


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint is MatMamba, language model or vision, whole or sliced."""
    return kind_of(checkpoint) is not None and "d_model" in checkpoint.config


def packaged_table(checkpoint: Checkpoint) -> str | None:
    """The name of the packaged slice table for a model of this kind and size."""
    model = read_model(checkpoint)
    if any(mixer.width != EXPAND * model.d_model for mixer in model.mixers):
        return None  # a slice: the rows are those of its source
    return PACKAGED.get((model.kind, model.d_model, len(model.mixers)))


def read_model(checkpoint: Checkpoint) -> Model:
    """The sizes of a checkpoint, each tensor's name and shape checked against them.

    Raises:
        CheckpointError: an option that is another architecture, a tensor that is missing, unknown or of
            another shape.
    """
    where, kind = str(checkpoint.path), kind_of(checkpoint)
    assert kind is not None
    containers.check_options(checkpoint)
    ssm = checkpoint.config.get("ssm_cfg") or {}
    d_model, n_layer = size_of(checkpoint, "d_model"), size_of(checkpoint, "n_layer")
    mixers = tuple(_mixer(checkpoint, f"{PREFIXES[kind]}layers.{i}.mixer.", ssm) for i in range(n_layer))
    if len({(mixer.head_dim, mixer.state, mixer.kernel) for mixer in mixers}) > 1:
        what = "has layers of different head dim, state size or kernel"
        raise CheckpointError(what, where=where, fix="this is not a MatMamba checkpoint")
    model = Model(kind, d_model, mixers)
    _check(checkpoint, _expected(checkpoint, model))
    return model


def _mixer(checkpoint: Checkpoint, prefix: str, ssm: dict[str, Any]) -> Mixer:
    def shape(name: str, rank: int) -> tuple[int, ...]:
        tensor = checkpoint.tensors.get(prefix + name)
        if tensor is None:
            fix = "config.json says so (n_layer): download both again"
            raise CheckpointError(f"tensor {prefix + name!r} is missing", where=str(checkpoint.path), fix=fix)
        if len(tensor.shape) != rank or 0 in tensor.shape:
            raise _misshapen(tensor, f"{rank} axes")
        return tensor.shape

    heads, width = shape("A_log", 1)[0], shape("out_proj.weight", 2)[1]
    conv, _, kernel = shape("conv1d.weight", 3)
    groups = ssm.get("ngroups", 1)
    fits = type(groups) is int and groups > 0 and heads % groups == 0 and width % heads == 0 and width % EXPAND == 0
    if not fits or conv <= width or (conv - width) % (2 * groups):
        what = f"{prefix}*: {heads} heads, {groups} groups, {width} and {conv} channels do not fit together"
        raise CheckpointError(what, where=str(checkpoint.path), fix="correct ngroups in ssm_cfg")
    return Mixer(heads, width // heads, groups, (conv - width) // (2 * groups), kernel)


def _expected(checkpoint: Checkpoint, model: Model) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model and its shape."""
    d, prefix = model.d_model, model.prefix
    around = containers.language_shapes if model.kind == "lm" else containers.vision_shapes
    norm = ["weight"] if checkpoint.config.get("rms_norm", model.kind == "lm") else ["weight", "bias"]
    shapes = around(checkpoint, d) | {f"{prefix}norm_f.{name}": (d,) for name in norm}
    for i, mixer in enumerate(model.mixers):
        shapes |= {f"{prefix}layers.{i}.norm.{name}": (d,) for name in norm}
        shapes |= {f"{prefix}layers.{i}.mixer.{name}": shape for name, shape in mixer.shapes(d).items()}
    return shapes


def _check(checkpoint: Checkpoint, expected: dict[str, tuple[int, ...]]) -> None:
    missing, extra = expected.keys() - checkpoint.tensors.keys(), checkpoint.tensors.keys() - expected.keys()
    if missing or extra:
        what = f"tensors do not fit config.json: missing {sorted(missing)[:5]}, unknown {sorted(extra)[:5]}"
        raise CheckpointError(what, where=str(checkpoint.path), fix="download config.json and weights of one revision")
    for name, shape in expected.items():
        tensor = checkpoint.tensors[name]
        if tensor.shape != shape:
            raise _misshapen(tensor, str(shape))
        if tensor.dtype not in ("F16", "BF16", "F32", "F64"):
            what = f"tensor {name!r} has dtype {tensor.dtype}"
            raise CheckpointError(what, where=str(tensor.file), fix="only float weights can be sliced")


def _misshapen(tensor: Tensor, wanted: str) -> CheckpointError:
    what = f"tensor {tensor.name!r} has shape {tensor.shape}, {wanted} expected"
    return CheckpointError(what, where=str(tensor.file), fix="download config.json and weights of one revision")


# ----------------------------------------------------------------------------------------- slicing
def mixer_views(tensors: dict[str, Tensor], mixer: Mixer, heads: Sequence[int]) -> dict[str, View]:
    """What the mixer of the given heads is, tensor by tensor.

    Args:
        tensors: the full mixer's tensors by their name inside the mixer.
        heads: indices of the heads kept, in their new order; equally many of each group, group by group.
    """
    w, p = mixer.width, mixer.head_dim
    rows = [  # of in_proj: z, x, B, C, dt
        *blocks(heads, p), *blocks(heads, p, w), (2 * w, 2 * w + mixer.bc), *blocks(heads, 1, 2 * w + mixer.bc),
    ]  # fmt: skip
    channels = [*blocks(heads, p), (w, w + mixer.bc)]  # of the convolution: x, B, C
    cuts: dict[str, tuple[int, Iterable[tuple[int, int]]]] = {
        "in_proj.weight": (0, rows),
        "conv1d.weight": (0, channels),
        "conv1d.bias": (0, channels),
        "dt_bias": (0, blocks(heads)),
        "A_log": (0, blocks(heads)),
        "D": (0, blocks(heads)),
        "norm.weight": (0, blocks(heads, p)),
        "out_proj.weight": (1, blocks(heads, p)),
    }
    return {name: part(tensors[name], axis, ranges) for name, (axis, ranges) in cuts.items()}


def leading_heads(mixer: Mixer, count: int) -> list[int]:
    """The first `count` heads, equally many of each group."""
    size = mixer.heads // mixer.groups
    return [group * size + i for group in range(mixer.groups) for i in range(count // mixer.groups)]


def plan_slice(checkpoint: Checkpoint, row: Row, trained: Table | None = None) -> Plan:
    """Plans one row; `trained` is the table of the widths that the model was trained at, for the notes.

    Raises:
        TableError: a width that is not a whole number of heads, wider than the source, or a wrong list.
    """
    model = read_model(checkpoint)
    kept = kept_layers(row, len(model.mixers))
    full = tuple(model.mixers[i].width // EXPAND for i in kept)
    widths = widths_of(row, MAMBA, kept, full)
    layers = tuple(KeptLayer(index, width) for index, width in zip(kept, widths, strict=True))
    for layer in layers:
        _check_width(row, model.mixers[layer.source], layer)
    tensors = _tensors(checkpoint, model, layers)
    heads = [EXPAND * width // model.head_dim for width in widths]
    sizes = (model.head_dim, model.mixers[0].state, model.mixers[0].kernel)
    if model.kind == "vision":
        config = containers.vision_config(checkpoint.config, heads, *sizes)
    else:
        rows = tensors[EMBEDDINGS[1]].shape[0]
        config = containers.language_config(checkpoint.config, heads, *sizes, rows)
    stored = {tensor.dtype for tensor in tensors.values()}
    config["dtype"] = containers.DTYPES[min(stored, key=list(containers.DTYPES).index)]
    count = sum(math.prod(tensor.shape) for tensor in tensors.values())
    notes = _notes(checkpoint.config, row, full, widths, trained)
    return Plan("matmamba", row.name, layers, row.skipped, tensors, config, count, notes=notes)


def _tensors(checkpoint: Checkpoint, model: Model, layers: Sequence[KeptLayer]) -> dict[str, PlannedTensor]:
    """Every tensor of the slice: mixers cut, layers renumbered, everything else as it is."""
    new_index = {layer.source: i for i, layer in enumerate(layers)}
    cut: dict[str, View] = {}
    for layer in layers:
        mixer, prefix = model.mixers[layer.source], f"{model.prefix}layers.{layer.source}.mixer."
        own = {name: checkpoint.tensors[prefix + name] for name in mixer.shapes(model.d_model)}
        heads = leading_heads(mixer, EXPAND * layer.width // mixer.head_dim)
        cut |= {prefix + name: view for name, view in mixer_views(own, mixer, heads).items()}
    tensors = {}
    for name, tensor in checkpoint.tensors.items():
        match = _LAYER.fullmatch(name.removeprefix(model.prefix))
        if match and int(match[1]) not in new_index:
            continue
        if name == HEAD and is_tied(checkpoint.config):
            continue  # stored once, as the embedding
        new = f"{model.prefix}layers.{new_index[int(match[1])]}.{match[2]}" if match else name
        new = EMBEDDINGS[1] if new in EMBEDDINGS else new
        tensors[new] = PlannedTensor(tensor.dtype, cut.get(name, whole(tensor)))
    return tensors


def _check_width(row: Row, mixer: Mixer, layer: KeptLayer) -> None:
    width = layer.width
    step = mixer.head_dim * mixer.groups  # channels of one head in every group
    if not 0 < EXPAND * width <= mixer.width or EXPAND * width % step:
        legal = [n * step // EXPAND for n in range(1, mixer.width // step + 1) if n * step % EXPAND == 0]
        some = ", ".join(map(str, legal if len(legal) <= 8 else [*legal[:3], "...", *legal[-2:]]))
        heads = f"at most {mixer.heads} of {mixer.head_dim} channels"
        what = f"width {width} of layer {layer.source} is not made of whole heads, {heads}"
        where = f"{row.where or row.name}, column {TITLES[MAMBA]!r}"
        raise TableError(what, where=where, fix=f"legal widths: {some}")


def _notes(
    config: dict[str, Any], row: Row, full: tuple[int, ...], widths: tuple[int, ...], trained: Table | None
) -> tuple[str, ...]:
    notes = []
    code = config.get("auto_map") or {}
    if not isinstance(code, dict) or not all(str(value).startswith("modeling") for value in code.values()):
        notes.append("the source's config.json names custom code (auto_map): it was neither run nor copied")
    known = set(full)
    for other in trained.rows if trained else ():
        if not other.skipped and other.mamba is not None and other.mamba.uniform is not None:
            known.add(other.mamba.uniform)
    unknown = sorted(set(widths) - known)
    if trained and unknown:
        notes.append(f"widths {unknown} were not trained (trained: {sorted(known)})")
    if row.skipped:
        notes.append(f"MatMamba is trained at full depth: skipping {list(row.skipped)} costs quality")
    return tuple(notes)
