"""The ONNX graph of Gemma 3n's text decoder, for any plan: prefill and decoding in one, keys and values in and out.

Sizes: b batch, T new tokens, S all tokens so far, N = b T, h hidden, p per-layer width, n layers, a AltUp inputs.
Tokens are rows: all between the embedding and the head is (N, h), or (N, a, h) for the AltUp stack, but for attention.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

import numpy as np
import onnx_ir as ir

from matexport.families.gemma3n.config import FULL, SLIDING, read_config, text_of
from matexport.families.gemma3n.layout import EMBEDDING, HEAD, INNER, PER_LAYER_PROJECTION, PER_LAYER_TABLE, TEXT
from matexport.graph import quantized
from matexport.graph.builder import DTYPES, Graph
from matexport.planning import Plan, PlannedTensor, View

BASES = {SLIDING: ("rope_local_base_freq", 10_000.0), FULL: ("rope_theta", 1_000_000.0)}
LOWEST = float(np.finfo(np.float32).min)


def decoder_graph(plan: Plan, *, elastic: bool = False, quantize: str | None = None, dtype: str = "F32") -> Graph:
    """`input_ids`, `position_ids` (b, T), `attention_mask` (b, S), `past_key_values.N.*` -> `logits`, `present.N.*`.

    Keys and values are those of the layers that have their own: (b, heads, S, head_dim), rotated. The mask covers all
    tokens so far; padding may stand on either side. Sliding layers keep all of theirs, and mask what is out of sight.
    """
    decoder = _Decoder(plan, elastic=elastic, quantize=quantize, dtype=dtype)
    with decoder.g.scope("model"):
        x = decoder.layers(*decoder.embed())
    decoder.head(x)
    return decoder.g


class _Decoder:
    def __init__(self, plan: Plan, *, elastic: bool, quantize: str | None, dtype: str):
        self.g = Graph("gemma3n", dtype)
        self.g.quantize = quantize
        self.config: Mapping[str, Any] = text_of(plan.config)
        self.text = read_config(plan.config, "config.json")
        self.tensors, self.elastic = plan.tensors, elastic
        self.prefix = INNER if INNER + EMBEDDING in plan.tensors else TEXT
        self.stored, self.used = self.text.layers, list(range(self.text.layers))  # of the per-layer tensors
        if elastic:  # rows that skip layers have the tensors of all layers too, as the widest row has them
            self.used = [layer.source for layer in plan.layers]
            self._store_all_layers()
        self.epsilon = float(self.config.get("rms_norm_eps", 1e-6))
        g = self.g
        self.ids = g.input("input_ids", "I64", ["batch", "sequence"])
        self.mask = g.input("attention_mask", "I64", ["batch", "total_sequence"])
        self.positions = g.input("position_ids", "I64", ["batch", "sequence"])
        self.kept: dict[int, tuple[ir.Value, ir.Value]] = {}  # layer -> all its keys and values so far

    # ---------------------------------------------------------------------------------------- parts
    def weight(self, name: str) -> ir.Value:
        return self.g.weight(self.prefix + name, self.tensors[self.prefix + name])

    def _store_all_layers(self) -> None:
        """Takes the per-layer table and projection of the source as they are."""
        projection = self.tensors[self.prefix + PER_LAYER_PROJECTION].view.view_shape
        self.stored = projection[0] // self.text.per_layer
        table = self.text.per_layer_vocab, projection[0]
        for inner, shape in ((PER_LAYER_TABLE, table), (PER_LAYER_PROJECTION, projection)):
            tensor = self.tensors[self.prefix + inner]
            view = View(tensor.view.source, shape, tuple(((0, n),) for n in shape), shape)
            self.tensors = {**self.tensors, self.prefix + inner: PlannedTensor(tensor.dtype, view)}

    def linear(self, x: ir.Value, name: str, *, inner: bool = False) -> ir.Value:
        """x (N, k) times a weight (n, k); `inner`: one whose columns are nested."""
        g, full = self.g, f"{self.prefix}{name}.weight"
        with g.scope(name.rpartition(".")[2]):
            if g.quantize:
                return quantized.linear(g, x, [(full, self.tensors[full])], g.quantize)[0]
            if inner and self.elastic:
                return g.op("MatMul", x, g.weight(full, self.tensors[full], transposed=True))
            return g.op("Gemm", x, g.weight(full, self.tensors[full]), transB=1)

    def norm(self, x: ir.Value, name: str | None) -> ir.Value:
        """RMSNorm over the last axis (Gemma3nRMSNorm), with a weight if there is one: as ONNX Runtime recognises it."""
        g = self.g
        with g.scope(name.rpartition(".")[2] if name else "v_norm"):
            mean = g.op("ReduceMean", g.op("Pow", x, g.constant(2.0, g.dtype)), g.constant([-1]), keepdims=1)
            y = g.op("Div", x, g.op("Sqrt", g.op("Add", mean, g.constant(self.epsilon, g.dtype))))
            return y if name is None else g.op("Mul", y, self.weight(f"{name}.weight"))

    def scaled(self, x: ir.Value, factor: float) -> ir.Value:
        return self.g.op("Mul", x, self.g.constant(factor, self.g.dtype))

    def magnitude(self, x: ir.Value, least: float | None = None) -> ir.Value:
        """Root of the mean square over the last axis, whose mean square is at least `least`."""
        g = self.g
        mean = g.op("ReduceMean", g.op("Mul", x, x), g.constant([-1]), keepdims=1)
        return g.op("Sqrt", mean if least is None else g.op("Max", mean, g.constant(least, g.dtype)))

    # ------------------------------------------------------------------------------------ embedding
    def embed(self) -> tuple[ir.Value, list[ir.Value]]:
        """The AltUp stack (N, a, h), and each layer's own input (N, p)."""
        g, text = self.g, self.text
        with g.scope("embed_tokens"):
            x = self.scaled(self._rows(self.ids, EMBEDDING), math.sqrt(text.hidden))
            x = g.op("Reshape", x, g.constant([-1, text.hidden]))
        with g.scope("embed_tokens_per_layer"):
            known = g.op("Less", self.ids, g.constant(text.per_layer_vocab))
            rows = self._rows(g.op("Where", known, self.ids, g.constant(0)), PER_LAYER_TABLE)
            shape = g.constant([-1, self.stored, text.per_layer])
            own = g.op("Reshape", self.scaled(rows, math.sqrt(text.per_layer)), shape)
        projected = self.scaled(self.linear(x, PER_LAYER_PROJECTION.removesuffix(".weight")), text.hidden**-0.5)
        projected = self.norm(g.op("Reshape", projected, shape), "per_layer_projection_norm")
        inputs = self.scaled(g.op("Add", projected, own), math.sqrt(0.5))
        parts = g.ops("Split", inputs, axis=1, num_outputs=self.stored, outputs=self.stored)
        target, stack = self.magnitude(x), [x]
        for i in range(text.altup - 1):
            y = self.linear(x, f"altup_projections.{i}")
            stack.append(g.op("Div", g.op("Mul", y, target), self.magnitude(y, 1e-5)))
        one = g.constant([1])
        stacked = g.op("Concat", *(g.op("Unsqueeze", y, one) for y in stack), axis=1)
        return stacked, [g.op("Squeeze", parts[i], one) for i in self.used]

    def _rows(self, ids: ir.Value, name: str) -> ir.Value:
        """Rows of a table, which is never cast or copied whole."""
        g, tensor = self.g, self.tensors[self.prefix + name]
        if quantized.gathers(tensor, g.quantize):
            assert g.quantize
            return quantized.gather(g, ids, self.prefix + name, tensor, g.quantize)
        return g.gather(self.prefix + name, tensor, ids)

    # --------------------------------------------------------------------------------------- layers
    def layers(self, stack: ir.Value, inputs: list[ir.Value]) -> ir.Value:
        """All layers, then the stack as one: (N, h)."""
        g, text = self.g, self.text
        seen, turned = self._sight(), self._rotations()
        for i in range(text.layers):
            with g.scope(f"layers.{i}"):
                stack = self._layer(i, stack, inputs[i], seen[text.types[i]], turned[text.types[i]])
        parts = [g.op("Gather", stack, g.constant(i), axis=1) for i in range(text.altup)]
        target = self.magnitude(parts[0])
        for i, part in enumerate(parts[1:]):
            y = self.linear(part, f"altup_unembed_projections.{i}")
            parts[i + 1] = g.op("Div", g.op("Mul", y, target), self.magnitude(y, 1e-5))
        return self.norm(g.op("Mean", *parts), "norm")

    def _layer(self, i: int, stack: ir.Value, own: ir.Value, seen: ir.Value, turned: list[ir.Value]) -> ir.Value:
        g, name, one = self.g, f"layers.{i}", self.g.constant([1])
        a = self.text.altup
        with g.scope("altup_predict"):  # each is itself and a mixture of all, as the active one says
            active = g.op("Gather", stack, g.constant(0), axis=1)
            mixture = self.linear(self._modalities(active, name), f"{name}.altup.prediction_coefs")
            mixture = g.op("Reshape", mixture, g.constant([-1, a, a]))
            stack = g.op("Add", g.op("MatMul", mixture, stack), stack)
            active = g.op("Gather", stack, g.constant(0), axis=1)
        x = self.norm(active, f"{name}.input_layernorm")
        with g.scope("laurel"):
            y = self.linear(self.linear(x, f"{name}.laurel.linear_left"), f"{name}.laurel.linear_right")
            laurel = g.op("Add", x, self.norm(y, f"{name}.laurel.post_laurel_norm"))
        with g.scope("self_attn"):
            attended = self._attention(i, x, seen, turned)
        attended = g.op("Add", active, self.norm(attended, f"{name}.post_attention_layernorm"))
        x = self.scaled(g.op("Add", attended, laurel), math.sqrt(0.5))
        with g.scope("mlp"):
            y = self._mlp(i, self.norm(x, f"{name}.pre_feedforward_layernorm"))
        x = g.op("Add", x, self.norm(y, f"{name}.post_feedforward_layernorm"))
        with g.scope("altup_correct"):
            innovation = g.op("Unsqueeze", g.op("Sub", x, active), one)
            share = self.linear(self._modalities(x, name), f"{name}.altup.correction_coefs")
            share = g.op("Unsqueeze", g.op("Add", share, g.constant(1.0, g.dtype)), g.constant([2]))
            stack = g.op("Add", g.op("Mul", innovation, share), stack)
        with g.scope("per_layer_input"):  # goes to all but the active one
            x = g.op("Gather", stack, g.constant(0), axis=1)
            if self.config.get("altup_correct_scale", True):
                x = g.op("Mul", x, self.weight(f"{name}.altup.correct_output_scale"))
            x = g.op("Gelu", self.linear(x, f"{name}.per_layer_input_gate"), approximate="tanh")
            x = self.linear(g.op("Mul", x, own), f"{name}.per_layer_projection")
            x = g.op("Unsqueeze", self.norm(x, f"{name}.post_per_layer_input_norm"), one)
            others = g.constant(np.array([0.0] + [1.0] * (a - 1))[:, None], g.dtype)
            return g.op("Add", stack, g.op("Mul", x, others))

    def _modalities(self, x: ir.Value, name: str) -> ir.Value:
        x = self.linear(self.norm(x, f"{name}.altup.router_norm"), f"{name}.altup.modality_router")
        return self.g.op("Tanh", self.scaled(x, 1 / self.text.hidden))

    def _mlp(self, i: int, x: ir.Value) -> ir.Value:
        g, name = self.g, f"layers.{i}.mlp"
        gate = self.linear(x, f"{name}.gate_proj")
        if self.text.sparsity[i] > 0:  # what lies above mean + k deviations, k the quantile of that share
            with g.scope("sparsity"):
                gate = g.op("Sub", gate, g.op("ReduceMean", gate, g.constant([-1]), keepdims=1))
                cutoff = self.scaled(self.magnitude(gate), NormalDist().inv_cdf(self.text.sparsity[i]))
                gate = g.op("Relu", g.op("Sub", gate, cutoff))
        gate = g.op("Gelu", gate, approximate="tanh")
        return self.linear(g.op("Mul", gate, self.linear(x, f"{name}.up_proj")), f"{name}.down_proj", inner=True)

    # ------------------------------------------------------------------------------------ attention
    def _sight(self) -> dict[str, ir.Value]:
        """For each kind of layer what is added to the scores: (b, 1, 1, T, S), 0 or the lowest number."""
        g, found = self.g, {}
        with g.scope("sight"):
            total = g.op("Shape", self.mask, start=1, end=2)
            keys = g.op("Range", g.constant(0), g.op("Squeeze", total), g.constant(1))
            new = g.op("Shape", self.ids, start=1, end=2)
            queries = g.op("Unsqueeze", g.op("Slice", keys, g.op("Neg", new), total), g.constant([1]))
            real = g.op("Unsqueeze", g.op("Cast", self.mask, to=int(ir.DataType.BOOL)), g.constant([1, 2, 3]))
            past = g.op("And", g.op("LessOrEqual", keys, queries), real)
            for kind in sorted(set(self.text.types)):
                allowed = past
                if kind == SLIDING:
                    window = g.constant(int(self.config.get("sliding_window", 512)))
                    allowed = g.op("And", past, g.op("Less", g.op("Sub", queries, keys), window))
                found[kind] = g.op("Where", allowed, g.constant(0.0, g.dtype), g.constant(LOWEST, g.dtype))
        return found

    def _rotations(self) -> dict[str, list[ir.Value]]:
        """For each kind of layer cosine and sine: (b, T, 1, head_dim)."""
        g, found, dim = self.g, {}, self.text.head_dim
        with g.scope("rotary_emb"):
            position = g.op("Unsqueeze", g.op("Cast", self.positions, to=int(ir.DataType.FLOAT)), g.constant([2, 3]))
            for kind in sorted(set(self.text.types)):
                base = rope_base(self.config, kind)
                steps = 1 / base ** (np.arange(0, dim, 2, dtype=np.float32) / dim)
                angle = g.op("Mul", position, g.constant(np.concatenate([steps, steps]), "F32"))
                found[kind] = [g.op("Cos", angle), g.op("Sin", angle)]
                if g.dtype != "F32":  # angles are computed in float32 whatever the model is
                    found[kind] = [g.op("Cast", part, to=int(DTYPES[g.dtype])) for part in found[kind]]
        return found

    def _rotate(self, x: ir.Value, turned: list[ir.Value]) -> ir.Value:
        g = self.g
        first, second = g.ops("Split", x, axis=3, num_outputs=2, outputs=2)
        half = g.op("Concat", g.op("Neg", second), first, axis=3)
        return g.op("Add", g.op("Mul", x, turned[0]), g.op("Mul", half, turned[1]))

    def _attention(self, i: int, x: ir.Value, seen: ir.Value, turned: list[ir.Value]) -> ir.Value:
        g, text, name = self.g, self.text, f"layers.{i}.self_attn"
        size, groups, each = text.head_dim, text.kv_heads, text.heads // text.kv_heads
        steps = g.op("Shape", self.ids)

        def heads(y: ir.Value, count: int) -> ir.Value:
            return g.op("Reshape", y, g.op("Concat", steps, g.constant([count, size]), axis=0))

        query = self.norm(heads(self.linear(x, f"{name}.q_proj"), text.heads), f"{name}.q_norm")
        query = g.op("Transpose", self._rotate(query, turned), perm=[0, 2, 1, 3])
        query = g.op("Reshape", query, g.constant([0, groups, each, -1, size]))
        if i < text.first:
            key = self.norm(heads(self.linear(x, f"{name}.k_proj"), groups), f"{name}.k_norm")
            value = self.norm(heads(self.linear(x, f"{name}.v_proj"), groups), None)
            new = {"key": self._rotate(key, turned), "value": value}
            shape: list[int | str] = ["batch", groups, "past_sequence", size]
            past = {kind: g.input(f"past_key_values.{i}.{kind}", g.dtype, shape) for kind in new}
            key, value = (
                g.op("Concat", past[kind], g.op("Transpose", new[kind], perm=[0, 2, 1, 3]), axis=2) for kind in new
            )
            self.kept[i] = key, value
        key, value = self.kept[i if i < text.first else text.donors()[i]]
        two = g.constant([2])
        turned_key = g.op("Unsqueeze", g.op("Transpose", key, perm=[0, 1, 3, 2]), two)
        scores = g.op("Add", g.op("MatMul", query, turned_key), seen)
        y = g.op("MatMul", g.op("Softmax", scores, axis=-1), g.op("Unsqueeze", value, two))
        y = g.op("Reshape", g.op("Transpose", y, perm=[0, 3, 1, 2, 4]), g.constant([-1, text.heads * size]))
        return self.linear(y, f"{name}.o_proj")

    # ----------------------------------------------------------------------------------------- head
    def head(self, x: ir.Value) -> None:
        g, text = self.g, self.text
        with g.scope("lm_head"):
            name = HEAD if HEAD in self.tensors else self.prefix + EMBEDDING
            if g.quantize and (name == HEAD or quantized.gathers(self.tensors[name], g.quantize)):
                (logits,) = quantized.linear(g, x, [(name, self.tensors[name])], g.quantize)
            else:
                logits = g.op("Gemm", x, g.weight(name, self.tensors[name]), transB=1)
            cap = self.config.get("final_logit_softcapping", 30.0)
            if cap:
                logits = self.scaled(g.op("Tanh", self.scaled(logits, 1 / cap)), cap)
            shape = g.op("Concat", g.op("Shape", self.ids), g.constant([text.vocab]), axis=0)
            logits = g.op("Reshape", logits, shape)
        g.output(logits, "logits", g.dtype, ["batch", "sequence", text.vocab])
        groups = text.kv_heads
        for i, pair in self.kept.items():
            for kind, value in zip(("key", "value"), pair, strict=True):
                g.output(value, f"present.{i}.{kind}", g.dtype, ["batch", groups, "total_sequence", text.head_dim])


def rope_base(config: Mapping[str, Any], kind: str) -> float:
    """The base of the rotary angles of one kind of layer, in the words of transformers 4 or 5."""
    key, default = BASES[kind]
    new = config.get("rope_parameters")
    if isinstance(new, dict) and isinstance(new.get(kind), dict):
        return float(new[kind].get("rope_theta", default))
    return float(config.get(key, default))
