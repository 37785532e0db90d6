"""Gemma 3n in ONNX in other ways, and its own truth; each run in a process of its own by export_gemma3n.py.

onnxscript and mobius-onnx are not among what matexport is tested with: a folder with them is put on PYTHONPATH.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

Work = Callable[[], None]
Arrays = dict[str, np.ndarray]


def trace(source: str, output: str) -> Work:
    """`torch.onnx.export(dynamo=True)` of transformers' class with its cache, batch and lengths dynamic.

    As it is, the export fails: `prims.erf_inv` of the sparsity threshold has no ONNX form. Its quantile is a constant.
    """
    import torch
    from transformers import DynamicCache, Gemma3nForCausalLM
    from transformers.models.gemma3n import modeling_gemma3n

    def sparsified(self: Any, x: torch.Tensor) -> torch.Tensor:
        std, mean = torch.std_mean(x, dim=-1, keepdim=True, correction=0)
        return torch.relu(x - mean - NormalDist().inv_cdf(self.activation_sparsity) * std)

    class Cached(torch.nn.Module):
        def __init__(self, model: Any):
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, *past: Any) -> Any:
            cache = DynamicCache()
            for i in range(0, len(past), 2):
                cache.update(past[i], past[i + 1], i // 2)
            named = {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": cache}
            out = self.model(input_ids=input_ids, use_cache=True, **named)
            layers = out.past_key_values.layers[: len(past) // 2]
            return out.logits, *(part for layer in layers for part in (layer.keys, layer.values))

    def work() -> None:
        modeling_gemma3n.Gemma3nTextMLP._gaussian_topk = sparsified
        model = Gemma3nForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        config, dynamic = model.config, torch.export.Dim.DYNAMIC
        own = config.num_hidden_layers - config.num_kv_shared_layers
        ids = torch.arange(10).reshape(2, 5)
        past = [torch.randn(2, config.num_key_value_heads, 3, config.head_dim) for _ in range(2 * own)]
        inputs = (ids, torch.ones(2, 8, dtype=torch.int64), torch.arange(3, 8).tile(2, 1), *past)
        names = [f"{i}.{kind}" for i in range(own) for kind in ("key", "value")]
        tokens: dict[int, Any] = {0: dynamic, 1: dynamic}
        with torch.no_grad():
            program = torch.onnx.export(
                Cached(model), inputs, dynamo=True, verbose=False,
                input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{n}" for n in names)],
                output_names=["logits", *(f"present.{n}" for n in names)],
                dynamic_shapes=(tokens, tokens, tokens, tuple({0: dynamic, 2: dynamic} for _ in past)),
            )  # fmt: skip
        Path(output).mkdir()
        program.save(f"{output}/model.onnx", external_data=True)

    return work


def mobius(source: str, output: str, provider: str) -> Work:
    """mobius-onnx, for a model of one FFN width; what its command line leaves out of the config is put in."""
    import onnx_ir as ir
    import safetensors.torch
    import transformers
    from mobius import Gemma3nConfig, apply_weights, build_from_module
    from mobius.models.gemma3n import Gemma3nCausalLMModel

    def work() -> None:
        config = transformers.AutoConfig.from_pretrained(source)
        (config.__dict__["intermediate_size"],) = set(config.intermediate_size)
        built = Gemma3nConfig.from_transformers(config)
        built = dataclasses.replace(built, dtype=ir.DataType.FLOAT, attn_qk_norm=True)
        module = Gemma3nCausalLMModel(built)
        package = build_from_module(module, built, execution_provider=provider)
        state = {}
        for path in sorted(Path(source).glob("*.safetensors")):
            state |= {name: tensor.float() for name, tensor in safetensors.torch.load_file(path).items()}
        apply_weights(package["model"], module.preprocess_weights(state))
        package.save(output)

    return work


def quantizer(model: str, output: str) -> Work:
    """ONNX Runtime's own quantiser of a float32 model: products and tables, blocks of 32."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    def work() -> None:
        config = DefaultWeightOnlyQuantConfig(
            block_size=32, is_symmetric=True, accuracy_level=4, op_types_to_quantize=("MatMul", "Gather")
        )
        quantiser = MatMulNBitsQuantizer(onnx.load(model), algo_config=config)
        quantiser.process()
        Path(output).mkdir()
        quantiser.model.save_model_to_file(f"{output}/model.onnx", use_external_data_format=True)

    return work


def torch_logits(source: str, ids: np.ndarray, *, capped: bool) -> np.ndarray:
    """What transformers computes in float32, of all tokens at once."""
    import torch
    from transformers import Gemma3nForCausalLM

    model = Gemma3nForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        hidden = model.model(input_ids=torch.from_numpy(ids), use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)
        if capped:
            cap = model.config.final_logit_softcapping
            logits = torch.tanh(logits / cap) * cap
    return np.asarray(logits.numpy())


def onnx_logits(model: Path, ids: np.ndarray, first: int, threads: int = 2) -> np.ndarray:
    """Logits of a prompt of `first` tokens and of single steps after it."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    shapes, names = {i.name: i.shape for i in session.get_inputs()}, [o.name for o in session.get_outputs()]
    past = {n: np.zeros([len(ids), s[1], 0, s[3]], np.float32) for n, s in shapes.items() if n.startswith("past_")}
    pieces, done = [], 0
    while done < ids.shape[1]:
        new = ids[:, done : done + 1] if done else ids[:, :first]
        end = done + new.shape[1]
        feed: Arrays = {"input_ids": new, "attention_mask": np.ones((len(ids), end), np.int64), **past}
        if "position_ids" in shapes:
            feed["position_ids"] = np.tile(np.arange(done, end), (len(ids), 1))
        out = dict(zip(names, session.run(names, feed), strict=True))
        past = {name: out[name.replace("past_key_values", "present")] for name in past}
        pieces.append(out["logits"])
        done = end
    return np.concatenate(pieces, 1)
