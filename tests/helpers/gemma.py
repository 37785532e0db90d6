"""Small random Gemma 3n checkpoints, and headers of the real size without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from matexport.families.gemma3n.config import read_config
from matexport.families.gemma3n.layout import layer_shapes, shared_shapes

SLIDING, FULL = "sliding_attention", "full_attention"
TYPES = {"s": SLIDING, "f": FULL}
INNER = "model.language_model."

# The example of mistral.rs' page on MatFormer, "Creating Custom Configurations"
TINY = (
    "name,# Layers,# Effective Params (B),FFN Hidden Dims,Layers Skipped\n"
    'Tiny,15,0.8,"[4096, 4096, ...]","[5,6,7,10,11,12,15,16,17,20,21,22,25,26,27,30,31,32,33,34]"\n'
)


def text_config(types: str = "sfssfsfssf", *, shared: int = 4, width: int = 64, **options: Any) -> dict[str, Any]:
    """A text config in the released keys. By default no skip is periodic with the layer types.

    First sharing layer 6; donors: sliding 5 (read by 7, 8), full 4 (read by 6 and 9, if `types` is the default).
    """
    n = len(types)
    return {
        "activation_sparsity_pattern": [0.95, 0.95, 0.5][:n] + [0.0] * (n - 3), "altup_active_idx": 0,
        "altup_coef_clip": 120.0, "altup_correct_scale": True, "altup_num_inputs": 4, "attention_bias": False,
        "attention_dropout": 0.0, "final_logit_softcapping": 30.0, "head_dim": 16,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 64, "hidden_size_per_layer_input": 8,
        "intermediate_size": [width] * n, "laurel_rank": 4, "layer_types": [TYPES[t] for t in types],
        "max_position_embeddings": 128, "model_type": "gemma3n_text", "num_attention_heads": 4,
        "num_hidden_layers": n, "num_key_value_heads": 2, "num_kv_shared_layers": shared, "rms_norm_eps": 1e-6,
        "rope_local_base_freq": 10000.0, "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": 4,
        "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 97, "vocab_size_per_layer_input": 89,
        "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, **options,
    }  # fmt: skip


def multimodal_config(text: dict[str, Any]) -> dict[str, Any]:
    """A config.json around a text config, in the released keys."""
    return {
        "architectures": ["Gemma3nForConditionalGeneration"], "model_type": "gemma3n", "eos_token_id": [1, 3],
        "text_config": text, "vision_config": {"model_type": "gemma3n_vision", "hidden_size": 8},
        "audio_config": {"model_type": "gemma3n_audio", "hidden_size": 8}, "torch_dtype": "bfloat16",
        "transformers_version": "4.53.0",
    }  # fmt: skip


TOWERS = {
    "model.vision_tower.timm_model.blocks.0.0.conv_exp.weight": (6, 3, 3, 3),
    "model.vision_tower.timm_model.blocks.3.layers.1.weight": (5, 4),  # a name that holds a layer's number
    "model.audio_tower.conformer.0.attention.post.weight": (8, 8),
    "model.embed_vision.embedding.weight": (12, 8),
    "model.embed_audio.embedding_projection.weight": (8, 8),
}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every stored tensor, with the unused keys and values of the sharing layers."""
    text = read_config(config, "config.json")
    prefix = INNER if "text_config" in config else "model."
    found = {prefix + name: shape for name, shape in shared_shapes(text).items()}
    for i, width in enumerate(text.widths):
        found |= {f"{prefix}layers.{i}.{name}": shape for name, shape in layer_shapes(text, width).items()}
    return found | (TOWERS if "text_config" in config else {})


def tensors(config: dict[str, Any], *, seed: int = 0, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Random weights, every one: zeros and ones hide bugs.

    As in a trained model, scores before the softmax are of order one, and a layer changes the stream by less than its
    size: else dozens of layers amplify rounding until fp32 says nothing.
    """
    rng, found = np.random.default_rng(seed), {}
    for name, shape in shapes(config).items():
        scale = 0.3 if len(shape) == 1 else 1.5 / shape[-1] ** 0.5
        mean = 1.0 if "norm" in name else 0.0
        size = (
            shape[0] ** -0.25 if name.endswith(("q_norm.weight", "k_norm.weight")) else 0.3 if ".post_" in name else 1
        )
        found[name] = (size * (mean + scale * rng.standard_normal(shape))).astype(np.float32).astype(dtype)
    return found


def write_gemma(
    folder: Path, config: dict[str, Any], weights: dict[str, np.ndarray] | None = None, *, shards: int = 1
) -> Path:
    """A checkpoint folder, written by the safetensors library, its tensors dealt out in order over the shards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    weights = tensors(config) if weights is None else weights
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names, weight_map = list(weights), {}
    for k in range(shards):
        file = f"model-{k + 1:05d}-of-{shards:05d}.safetensors"
        chosen = names[k * len(names) // shards : (k + 1) * len(names) // shards]
        save_file({name: weights[name] for name in chosen}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(chosen, file)
    index = {"metadata": {"total_size": sum(w.nbytes for w in weights.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def text_checkpoint(folder: Path, types: str = "sfssfsfssf", **options: Any) -> Path:
    """A text-only checkpoint in fp32."""
    return write_gemma(folder, {"architectures": ["Gemma3nForCausalLM"], **text_config(types, **options)})


def multimodal_checkpoint(folder: Path, types: str = "sfssfsfssf", *, shards: int = 2, **options: Any) -> Path:
    """A multimodal checkpoint in bf16 shards, with licence and tokenizer files beside it."""
    config = multimodal_config(text_config(types, **options))
    write_gemma(folder, config, tensors(config, dtype=ml_dtypes.bfloat16), shards=shards)
    for name in ("LICENSE", "tokenizer.json", "generation_config.json", "chat_template.jinja"):
        (folder / name).write_text("{}")
    return folder


def e4b_config() -> dict[str, Any]:
    """The released E4B's language model, as the multimodal config.json has it."""
    text = text_config("ssssf" * 7, shared=15, width=16384)
    sizes = {
        "hidden_size": 2048, "hidden_size_per_layer_input": 256, "head_dim": 256, "num_attention_heads": 8,
        "vocab_size": 262_400, "vocab_size_per_layer_input": 262_144, "laurel_rank": 64, "sliding_window": 512,
        "max_position_embeddings": 32768, "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 25,
    }  # fmt: skip
    return multimodal_config({**text, **sizes})


def write_hollow(folder: Path, config: dict[str, Any], *, shards: int = 4) -> Path:
    """A checkpoint of any size whose files are holes: headers and sizes are real, every weight is zero."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names, weight_map = list(shapes(config).items()), {}
    for k in range(shards):
        file = f"model-{k + 1:05d}-of-{shards:05d}.safetensors"
        header, end = {}, 0
        for name, shape in names[k * len(names) // shards : (k + 1) * len(names) // shards]:
            start, end = end, end + 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
            weight_map[name] = file
        raw = json.dumps(header).encode()
        with (folder / file).open("wb") as f:
            f.write(len(raw).to_bytes(8, "little") + raw)
            f.truncate(8 + len(raw) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder
