"""The ONNX graphs of Gemma 3n's text decoder, for any plan: prefill and decoding in one, keys and values in and out.

Sizes: b batch, T new tokens, S all tokens so far, N = b T, h hidden, p per-layer width, n layers, a AltUp inputs.
Tokens are rows: all between the embedding and the head is (N, h), or (N, a, h) for the AltUp stack, but for attention.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import onnx_ir as ir

from matexport.families.gemma3n.attention import Attention
from matexport.families.gemma3n.embeddings import embed
from matexport.families.gemma3n.layout import PER_LAYER_PROJECTION
from matexport.families.gemma3n.parts import Parts
from matexport.graph.builder import Graph
from matexport.graph.options import GraphOptions
from matexport.planning import Plan

EMBED, DECODER = "embed_tokens", "decoder_model_merged"  # the field's names for the two graphs of a split model


def decoder_graph(plan: Plan, options: GraphOptions) -> Graph:
    """`input_ids`, `position_ids` (b, T), `attention_mask` (b, S), `past_key_values.N.*` -> `logits`, `present.N.*`.

    Keys and values are those of the layers that have their own: (b, heads, S, head_dim), rotated. The mask covers all
    tokens so far, and padding may stand anywhere. Sliding layers keep all of theirs, and mask what is out of sight.
    """
    p = Parts(plan, options)
    ids = p.g.input("input_ids", "I64", ["batch", "sequence"])
    with p.g.scope("model"):
        embeds, own = embed(p, ids)
    _Decoder(p, embeds).run(embeds, own)
    return p.g


def split_graphs(plan: Plan, options: GraphOptions) -> dict[str, Graph]:
    """The same in two: `input_ids` -> `inputs_embeds` (b, T, h) and `per_layer_inputs` (b, T, n, p); on from there.

    Only the first one has the per-layer table. Embeddings of other kinds, of images say, can take the place of rows.
    """
    first, second = Parts(plan, options), Parts(plan, options)
    text, tokens = first.text, ["batch", "sequence"]
    shapes: dict[str, list[int | str]] = {
        "inputs_embeds": [*tokens, text.hidden],
        "per_layer_inputs": [*tokens, first.stored, text.per_layer],
    }
    ids = first.g.input("input_ids", "I64", tokens)
    with first.g.scope("model"):
        found = embed(first, ids)
    for value, (name, shape) in zip(found, shapes.items(), strict=True):
        first.g.output(value, name, first.wide, shape)
    embeds, own = (second.g.input(name, second.wide, shape) for name, shape in shapes.items())
    _Decoder(second, embeds).run(embeds, own)
    return {EMBED: first.g, DECODER: second.g}


class _Decoder:
    def __init__(self, p: Parts, new: ir.Value):
        self.p, self.g, self.text = p, p.g, p.text
        mask = self.g.input("attention_mask", "I64", ["batch", "total_sequence"])
        positions = self.g.input("position_ids", "I64", ["batch", "sequence"])
        with self.g.scope("model"):
            self.attention = Attention(p, mask, positions, new)

    def run(self, embeds: ir.Value, own: ir.Value) -> None:
        """Embeddings (b, T, h) and rows of the per-layer table (b, T, n, p) -> the graph's outputs."""
        g, text = self.g, self.text
        with g.scope("model"):
            x = g.op("Reshape", embeds, g.constant([-1, text.hidden]))
            inputs = self._inputs(x, g.op("Reshape", own, g.constant([-1, self.p.stored, text.per_layer])))
            stack = self._widened(x)
            active = self._active(stack) if text.active else x
            for i in range(text.layers):
                with g.scope(f"layers.{i}"):
                    stack, active = self._layer(i, stack, active, inputs[i])
            x = self._narrowed(stack)
        with g.scope("lm_head"):
            cap = self.p.config.get("final_logit_softcapping", 30.0)
            logits = self.p.logits(self.p.scaled(x, 1 / cap) if cap else x, self.attention.steps)
            if cap:
                logits = self.p.scaled(g.op("Tanh", logits), cap)
        g.output(logits, "logits", self.p.wide, ["batch", "sequence", text.vocab])
        self.attention.declare_outputs()

    # -------------------------------------------------------------------------- before and after all
    def _inputs(self, x: ir.Value, own: ir.Value) -> list[ir.Value]:
        """Each layer's own input (N, p): what it makes of the embedding, and its part of the table's row."""
        p, g, text = self.p, self.g, self.text
        made = p.scaled(p.linear(x, PER_LAYER_PROJECTION.removesuffix(".weight")), text.hidden**-0.5)
        made = p.norm(g.op("Reshape", made, g.constant([-1, p.stored, text.per_layer])), "per_layer_projection_norm")
        inputs = p.scaled(g.op("Add", made, own), math.sqrt(0.5))
        inputs = g.op("Reshape", inputs, g.constant([-1, p.stored * text.per_layer]))
        parts = g.ops("Split", inputs, axis=1, num_outputs=p.stored, outputs=p.stored)
        return [parts[i] for i in p.used]

    def _widened(self, x: ir.Value) -> ir.Value:
        """The AltUp stack (N, a, h): x, and projections of it that are as large."""
        p, g = self.p, self.g
        target, stack = p.magnitude(x), [x]
        for i in range(self.text.altup - 1):
            y = p.linear(x, f"altup_projections.{i}")
            stack.append(g.op("Div", g.op("Mul", y, target), p.magnitude(y, 1e-5)))
        return g.op("Concat", *(g.op("Unsqueeze", y, g.constant([1])) for y in stack), axis=1)

    def _narrowed(self, stack: ir.Value) -> ir.Value:
        """The mean of projections of a stack, normalised: (N, h)."""
        p, g = self.p, self.g
        parts = [g.op("Gather", stack, g.constant(i), axis=1) for i in range(self.text.altup)]
        target = p.magnitude(parts[0])
        for i, part in enumerate(parts[1:]):
            y = p.linear(part, f"altup_unembed_projections.{i}")
            parts[i + 1] = g.op("Div", g.op("Mul", y, target), p.magnitude(y, 1e-5))
        return p.norm(g.op("Mean", *parts), "norm")

    # ---------------------------------------------------------------------------------------- layers
    def _layer(self, i: int, stack: ir.Value, active: ir.Value, own: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Layer i: the stack (N, a, h) and the one of it that computes (N, h), after those before it -> after it."""
        p, g, name = self.p, self.g, f"layers.{i}"
        with g.scope("altup_predict"):
            stack, active = self._predicted(stack, active, name)
        x = p.norm(active, f"{name}.input_layernorm")
        with g.scope("laurel"):
            y = p.linear(x, f"{name}.laurel.linear_left", before=True)
            y = p.linear(y, f"{name}.laurel.linear_right")
            laurel = g.op("Add", x, p.norm(y, f"{name}.laurel.post_laurel_norm"))
        with g.scope("self_attn"):
            attended = self.attention(i, x)
        attended = g.op("Add", active, p.norm(attended, f"{name}.post_attention_layernorm"))
        x = p.scaled(g.op("Add", attended, laurel), math.sqrt(0.5))
        with g.scope("mlp"):
            y = self._mlp(i, p.norm(x, f"{name}.pre_feedforward_layernorm"))
        x = g.op("Add", x, p.norm(y, f"{name}.post_feedforward_layernorm"))
        with g.scope("altup_correct"):
            stack = self._corrected(stack, active, x, name)
            x = self._active(stack)
        with g.scope("per_layer_input"):
            stack = g.op("Add", stack, self._own(x, own, name))
        return stack, self._active(stack) if self.text.active else x

    def _active(self, stack: ir.Value) -> ir.Value:
        return self.g.op("Gather", stack, self.g.constant(self.text.active), axis=1)

    def _modalities(self, x: ir.Value, name: str) -> ir.Value:
        normed = self.p.norm(x, f"{name}.altup.router_norm")
        return self.g.op("Tanh", self.p.small(normed, f"{name}.altup.modality_router", factor=1 / self.text.hidden))

    def _predicted(self, stack: ir.Value, active: ir.Value, name: str) -> tuple[ir.Value, ir.Value]:
        """Each of the stack is itself and a mixture of all, as the active one says."""
        g, a = self.g, self.text.altup
        itself = self.p.constant(np.eye(a).reshape(-1))
        mixture = self.p.small(self._modalities(active, name), f"{name}.altup.prediction_coefs", bias=itself)
        stack = g.op("MatMul", g.op("Reshape", mixture, g.constant([-1, a, a])), stack)
        return stack, self._active(stack)

    def _corrected(self, stack: ir.Value, active: ir.Value, x: ir.Value, name: str) -> ir.Value:
        """Each of the stack takes its share of what the layer changed."""
        g, one = self.g, self.p.constant(np.ones(self.text.altup))
        share = self.p.small(self._modalities(x, name), f"{name}.altup.correction_coefs", bias=one)
        innovation = g.op("Unsqueeze", g.op("Sub", x, active), g.constant([1]))
        return g.op("Add", stack, g.op("Mul", innovation, g.op("Unsqueeze", share, g.constant([2]))))

    def _own(self, x: ir.Value, own: ir.Value, name: str) -> ir.Value:
        """What the layer's own input adds to all of the stack but the first: (N, a, h)."""
        p, g = self.p, self.g
        if p.config.get("altup_correct_scale", True):
            x = g.op("Mul", x, p.weight(f"{name}.altup.correct_output_scale"))
        x = g.op("Gelu", p.linear(x, f"{name}.per_layer_input_gate"), approximate="tanh")
        x = p.linear(g.op("Mul", x, own), f"{name}.per_layer_projection")
        x = g.op("Unsqueeze", p.norm(x, f"{name}.post_per_layer_input_norm"), g.constant([1]))
        return g.op("Mul", x, p.constant(np.array([0.0] + [1.0] * (self.text.altup - 1))[:, None]))

    def _mlp(self, i: int, x: ir.Value) -> ir.Value:
        p, g, name, sparsity = self.p, self.g, f"layers.{i}.mlp", self.text.sparsity[i]
        gate = p.linear(x, f"{name}.gate_proj")
        if sparsity > 0:  # what lies above mean + k deviations, k the quantile of that share
            with g.scope("sparsity"):
                gate = g.op("Sub", gate, g.op("ReduceMean", gate, g.constant([-1]), keepdims=1))
                width = p.tensors[f"{p.prefix}{name}.gate_proj.weight"].shape[0]
                length = g.op("ReduceL2", gate, g.constant([-1]), keepdims=1)
                cutoff = p.scaled(length, NormalDist().inv_cdf(sparsity) / math.sqrt(width))
                gate = g.op("Relu", g.op("Sub", gate, cutoff))
        gate = g.op("Gelu", gate, approximate="tanh")
        return p.linear(g.op("Mul", gate, p.linear(x, f"{name}.up_proj")), f"{name}.down_proj", inner=True)
