"""What stands around the mixers: tensors and config.json of the language and the vision model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matexport.checkpoint import Checkpoint
from matexport.errors import CheckpointError
from matexport.families.loaders import Loader, Verdict, judge

EXPAND = 2  # channels per unit of width; fixed in the authors' code, whatever `expand` says
CODE = "modeling_matmamba"  # the module that goes along with slices that need it
DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # torch's names, widest first
EMBEDDINGS = ("backbone.embedding.weight", "backbone.embeddings.weight")  # released name, transformers' name
HEAD = "lm_head.weight"

# what ssm_cfg may say: passed on, or required to be this because another value is another function
SSM_KEYS = ("d_state", "d_conv", "ngroups", "chunk_size", "dt_limit")
SSM_REQUIRED = {
    "layer": "MatMamba2", "expand": EXPAND, "d_ssm": None, "D_has_hdim": False, "rmsnorm": True,
    "norm_before_gate": False, "bias": False, "conv_bias": True,
}  # fmt: skip

SSM_IGNORED = {  # of training, or of kernels: they change no output
    "headdim", "conv_init", "A_init_range", "dt_min", "dt_max", "dt_init_floor", "proj_drop_rate", "use_mem_eff_path",
    "layer_idx", "process_group", "sequence_parallel", "device", "dtype",
}  # fmt: skip

_ONE_SIZE = ("uniform", "whole expand", "rms norm")
LOADERS = {
    "lm": (
        Loader("matexport (import matexport.hf)", (), "this project"),
        Loader("transformers Mamba2ForCausalLM", _ONE_SIZE, "run with transformers 5.23"),
        Loader("mamba_ssm Mamba2", ("uniform", "whole expand"), "state-spaces/mamba e9594ce, modules/mamba2.py"),
        Loader("vLLM mamba2", _ONE_SIZE, "its source: one state shape for all layers"),
        Loader("llama.cpp (converter)", ("uniform", "expand 2", "rms norm"), "its source: d_inner == 2 * d_model"),
    ),
    "vision": (
        Loader("matexport (import matexport.hf)", (), "this project"),
        Loader("MatMamba's own class", ("64 heads",), "ScaledFoundations/MatMamba c17e162, matmamba2_vision.py"),
    ),
}


def size_of(checkpoint: Checkpoint, key: str) -> int:
    """A size in config.json. Raises CheckpointError."""
    value = checkpoint.config.get(key)
    if type(value) is not int or not 0 < value <= 1 << 20:
        where = str(checkpoint.path / "config.json")
        raise CheckpointError(f"{key} = {value!r} is no size", where=where, fix="correct it")
    return value


def is_tied(config: dict[str, Any]) -> bool:
    """Whether a language model's head is its embedding."""
    return bool(config.get("tie_word_embeddings", config.get("tie_embeddings", True)))


def vision_shapes(checkpoint: Checkpoint, d: int) -> dict[str, tuple[int, ...]]:
    """Every tensor outside the layers of the vision model, and its shape."""
    patch, image, classes = (size_of(checkpoint, key) for key in ("patch_size", "image_size", "n_classes"))
    if image % patch:
        what = f"image_size {image} is no multiple of patch_size {patch}"
        raise CheckpointError(what, where=str(checkpoint.path / "config.json"), fix="correct it")
    return {
        "patch_embed.proj.weight": (d, 3, patch, patch),
        "patch_embed.proj.bias": (d,),
        "cls_token": (1, 1, d),
        "pos_embed": (1, (image // patch) ** 2 + 1, d),
        "head.weight": (classes, d),
        "head.bias": (classes,),
    }


def language_shapes(checkpoint: Checkpoint, d: int) -> dict[str, tuple[int, ...]]:
    """Every tensor outside the layers of the language model, and its shape; a tied head may be missing."""
    multiple = checkpoint.config.get("pad_vocab_size_multiple") or 1
    vocabulary = size_of(checkpoint, "vocab_size")
    rows = -(-vocabulary // multiple) * multiple if type(multiple) is int and multiple > 0 else vocabulary
    name = next(name for name in EMBEDDINGS if name in checkpoint.tensors)
    shapes: dict[str, tuple[int, ...]] = {name: (rows, d)}
    if HEAD in checkpoint.tensors or not is_tied(checkpoint.config):
        shapes[HEAD] = (rows, d)
    return shapes


def vision_config(
    source: dict[str, Any], heads: Sequence[int], head_dim: int, state: int, kernel: int
) -> dict[str, Any]:
    """The source's config.json with what the slice changes, and the names of its class."""
    return {
        **_common(source, heads, head_dim, state, kernel),
        "model_type": "matmamba_vision",
        "architectures": ["MatMambaVisionForImageClassification"],
        "auto_map": {
            "AutoConfig": f"{CODE}.MatMambaVisionConfig",
            "AutoModelForImageClassification": f"{CODE}.MatMambaVisionForImageClassification",
        },
    }


def language_config(
    source: dict[str, Any], heads: Sequence[int], head_dim: int, state: int, kernel: int, rows: int
) -> dict[str, Any]:
    """The same for the language model: transformers' own `mamba2` where it can say this slice, else our class."""
    d, ssm = source["d_model"], _ssm(source)
    config = {
        **{key: value for key, value in _common(source, heads, head_dim, state, kernel).items() if key != "auto_map"},
        "vocab_size": rows,
        "tie_word_embeddings": is_tied(source),
        **{key: source.get(key) for key in ("pad_token_id", "bos_token_id", "eos_token_id")},
    }
    if unmet_facts(source, heads, head_dim).keys() & {"uniform", "whole expand", "rms norm"}:
        return {
            **config,
            "model_type": "matmamba",
            "architectures": ["MatMambaForCausalLM"],
            "auto_map": {
                "AutoConfig": f"{CODE}.MatMambaConfig",
                "AutoModelForCausalLM": f"{CODE}.MatMambaForCausalLM",
            },
        }
    limit = {"time_step_limit": ssm["dt_limit"]} if "dt_limit" in ssm else {}
    return {
        **config,
        "model_type": "mamba2",
        "architectures": ["Mamba2ForCausalLM"],
        "num_heads": heads[0],
        "hidden_size": d,
        "num_hidden_layers": len(heads),
        "expand": heads[0] * head_dim // d,
        "state_size": state,
        "n_groups": ssm.get("ngroups", 1),
        "conv_kernel": kernel,
        "chunk_size": ssm.get("chunk_size", 256),
        "layer_norm_epsilon": source.get("norm_epsilon", 1e-5),
        "residual_in_fp32": source.get("residual_in_fp32", True),
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": "silu",
        **limit,
    }


def _common(source: dict[str, Any], heads: Sequence[int], head_dim: int, state: int, kernel: int) -> dict[str, Any]:
    """What both models' configs get; sizes come from shapes, whatever the source's config leaves out."""
    ssm = {**_ssm(source), "d_state": state, "d_conv": kernel}
    return {**source, "n_layer": len(heads), "num_heads": list(heads), "head_dim": head_dim, "ssm_cfg": ssm}


def _ssm(source: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in (source.get("ssm_cfg") or {}).items() if key in SSM_KEYS}


def check_options(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError for a value in config.json that is another function, or none at all."""
    config, where = checkpoint.config, str(checkpoint.path / "config.json")
    ssm = config.get("ssm_cfg") or {}

    def refuse(key: str, value: Any, fix: str) -> None:
        raise CheckpointError(f"{key} = {value!r}", where=where, fix=fix)

    if not isinstance(ssm, dict):
        refuse("ssm_cfg", ssm, "it must be an object")
    for key, value in SSM_REQUIRED.items():
        if ssm.get(key, value) != value:
            refuse(f"ssm_cfg {key}", ssm[key], f"only {key} = {value!r} is nested")
    for key in ssm.keys() - SSM_REQUIRED.keys() - SSM_IGNORED - set(SSM_KEYS):
        refuse(f"ssm_cfg {key}", ssm[key], "this option is not known")
    chunk, limit = ssm.get("chunk_size", 256), ssm.get("dt_limit", [0.0, math.inf])
    if type(chunk) is not int or not 0 < chunk <= 1 << 20:
        refuse("ssm_cfg chunk_size", chunk, "it must be a size")
    if not isinstance(limit, list) or len(limit) != 2 or not all(type(v) in (int, float) for v in limit):
        refuse("ssm_cfg dt_limit", limit, "it must be two numbers")
    for key in ("d_intermediate", "attn_layer_idx"):
        if config.get(key):
            refuse(key, config[key], "only pure MatMamba blocks can be sliced")
    epsilon = config.get("norm_epsilon", 1e-5)
    if type(epsilon) is not float or not 0 < epsilon < 1:
        refuse("norm_epsilon", epsilon, "it must be a small number")
    if config.get("pool", "cls") not in ("cls", "avg"):
        refuse("pool", config["pool"], "it must be 'cls' or 'avg'")
    if config.get("rms_norm") not in (True, False, None):
        refuse("rms_norm", config["rms_norm"], "it must be true or false")


def unmet_facts(config: dict[str, Any], heads: Sequence[int], head_dim: int) -> dict[str, str]:
    """What does not hold of a slice of these heads, and why: for `LOADERS`."""
    unmet = {}
    expand = heads[0] * head_dim / config["d_model"]
    if len(set(heads)) > 1:
        unmet["uniform"] = "its layers differ in width, and it has one size for all"
    if len(set(heads)) > 1 or not expand.is_integer():
        unmet["whole expand"] = f"inner width / d_model is {expand:g}, and it must be a whole number"
    if len(set(heads)) > 1 or expand != EXPAND:
        unmet["expand 2"] = f"inner width / d_model is {expand:g}, and it must be 2"
    if set(heads) != {64}:
        unmet["64 heads"] = "it builds 64 heads in every layer"
    if not config.get("rms_norm", True):
        unmet["rms norm"] = "its layers have RMS norms, this model LayerNorms"
    return unmet


def verdicts(kind: str, config: dict[str, Any], heads: Sequence[int], head_dim: int) -> list[Verdict]:
    """Which programs load a slice of these heads."""
    return judge(LOADERS[kind], unmet_facts(config, heads, head_dim))
