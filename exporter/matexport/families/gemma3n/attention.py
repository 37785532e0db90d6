"""Gemma 3n's attention: sliding and full layers, keys and values with a cache, layers that read another layer's.

Queries, keys and values are (b, heads, T, head_dim). From opset 23 on the attention is ai.onnx's; before, it is written
in products, with the heads that share keys and values one above the other: nothing of the cache is repeated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from matexport.families.gemma3n.config import FULL, SLIDING
from matexport.families.gemma3n.parts import Parts
from matexport.graph.builder import DTYPES
from matexport.graph.quantized import CONTRIB

BASES = {SLIDING: ("rope_local_base_freq", 10_000.0), FULL: ("rope_theta", 1_000_000.0)}


class Attention:
    """What the attention of all layers shares: who sees whom, rotary angles, keys and values of the layers so far.

    Args:
        mask: (b, S), zero where a token is padding, at either side or between.
        positions: (b, T).
        new: any value of shape (b, T, ...).
    """

    def __init__(self, p: Parts, mask: ir.Value, positions: ir.Value, new: ir.Value):
        self.p = p
        self.steps = p.g.op("Shape", new, start=0, end=2)
        self._shapes = {
            count: p.g.op("Concat", self.steps, p.g.constant([count, p.text.head_dim]), axis=0)
            for count in {p.text.heads, p.text.kv_heads}
        }
        self.kept: dict[int, tuple[ir.Value, ir.Value]] = {}  # layer -> all its keys and values so far
        self._seen, self._angles = self._sight(mask, new), self._rotations(positions)

    def __call__(self, i: int, x: ir.Value) -> ir.Value:
        """The attention of layer i: x (N, h) -> (N, h)."""
        p, g, text, name = self.p, self.p.g, self.p.text, f"layers.{i}.self_attn"
        kind = text.types[i]
        query = self._rotated(self._heads(x, f"{name}.q_proj", f"{name}.q_norm", text.heads), kind)
        if i < text.first:
            key = self._rotated(self._heads(x, f"{name}.k_proj", f"{name}.k_norm", text.kv_heads), kind)
            value = self._heads(x, f"{name}.v_proj", None, text.kv_heads)
            self.kept[i] = self._grown(i, "key", key), self._grown(i, "value", value)
        key, value = self.kept[i if i < text.first else text.donors()[i]]
        y = self._attend(p.narrowed(query), key, value, self._seen[kind])
        y = g.op("Reshape", g.op("Transpose", y, perm=[0, 2, 1, 3]), g.constant([-1, text.heads * text.head_dim]))
        return p.linear(p.is_narrow(y), f"{name}.o_proj")

    def declare_outputs(self) -> None:
        g, text = self.p.g, self.p.text
        shape: list[int | str] = ["batch", text.kv_heads, "total_sequence", text.head_dim]
        for i, pair in self.kept.items():
            for kind, value in zip(("key", "value"), pair, strict=True):
                g.output(value, f"present.{i}.{kind}", g.dtype, shape)

    # --------------------------------------------------------------------------- once for all layers
    def _sight(self, mask: ir.Value, new: ir.Value) -> dict[str, ir.Value]:
        """For each kind of layer what is added to the scores: (b, 1, T, S), 0 or a number that hides them.

        A query sees real tokens up to itself; in a sliding layer only the last ones, counted without padding: then a
        row is as if it ran alone, wherever its padding stands.
        """
        p, g, i64, found = self.p, self.p.g, self.p.g.constant, {}
        hidden = -(2.0**15 if g.dtype == "F16" else 2.0**126)  # half of the lowest number: scores are added to it
        with g.scope("sight"):
            total = g.op("Shape", mask, start=1, end=2)
            first = g.op("Neg", g.op("Shape", new, start=1, end=2))
            keys = g.op("Range", i64(0), g.op("Squeeze", total), i64(1))
            queries = g.op("Unsqueeze", g.op("Slice", keys, first, total), i64([1]))
            real = g.op("Unsqueeze", g.op("Cast", mask, to=int(ir.DataType.BOOL)), i64([1]))
            past = g.op("And", g.op("LessOrEqual", keys, queries), real)  # (b, T, S)
            for kind in sorted(set(p.text.types)):
                allowed = past
                if kind == SLIDING:
                    count = g.op("CumSum", mask, i64(1))
                    own = g.op("Unsqueeze", g.op("Slice", count, first, total, i64([1])), i64([2]))
                    distance = g.op("Sub", own, g.op("Unsqueeze", count, i64([1])))
                    window = i64(int(p.config.get("sliding_window", 512)))
                    allowed = g.op("And", past, g.op("Less", distance, window))
                seen = g.op("Unsqueeze", g.op("Where", allowed, p.constant(0.0), p.constant(hidden)), i64([1]))
                found[kind] = p.narrowed(seen) if p.fused else self._stacked(seen)
        return found

    def _stacked(self, seen: ir.Value) -> ir.Value:
        """The same for each of the heads that share keys and values, one above the other."""
        each = self.p.text.heads // self.p.text.kv_heads
        return seen if each == 1 else self.p.g.op("Concat", *[seen] * each, axis=2)

    def _rotations(self, positions: ir.Value) -> dict[str, list[ir.Value]]:
        """For each kind of layer cosine and sine of half the head's angles, computed in float32 as in transformers.

        (b, T, head_dim / 2) at opset 23, (N, head_dim / 2) with the row of each token for ONNX Runtime's operator, and
        (b, 1, T, head_dim), both halves, where it is spelled.
        """
        p, g, i64 = self.p, self.p.g, self.p.g.constant
        found: dict[str, list[ir.Value]] = {}
        with g.scope("rotary_emb"):
            axes = [2] if p.fused else [1] if p.contrib else [1, 3]
            flat = g.op("Reshape", positions, i64([-1])) if p.contrib else positions
            position = g.op("Unsqueeze", g.op("Cast", flat, to=int(ir.DataType.FLOAT)), i64(axes))
            index = []
            if p.contrib:
                count = g.op("Squeeze", g.op("Shape", flat))
                index = [g.op("Reshape", g.op("Range", i64(0), count, i64(1)), self.steps)]
            for kind in sorted(set(p.text.types)):
                size = p.text.head_dim
                steps = 1 / rope_base(p.config, kind) ** (np.arange(0, size, 2, dtype=np.float32) / size)
                if not (p.fused or p.contrib):
                    steps = np.concatenate([-steps, steps])  # the sine of the first half is subtracted
                angle = g.op("Mul", position, g.constant(steps, "F32"))
                both = (g.op(op, angle) for op in ("Cos", "Sin"))
                to = int(DTYPES[p.wide])
                found[kind] = [*index, *(part if p.wide == "F32" else g.op("Cast", part, to=to) for part in both)]
        return found

    # -------------------------------------------------------------------------------------- by layer
    def _heads(self, x: ir.Value, projection: str, norm: str | None, count: int) -> ir.Value:
        """Projected (N, h) -> (b, count, T, head_dim), each head normalised."""
        p, g = self.p, self.p.g
        y = p.norm(g.op("Reshape", p.linear(x, projection), self._shapes[count]), norm)
        return g.op("Transpose", y, perm=[0, 2, 1, 3])

    def _rotated(self, x: ir.Value, kind: str) -> ir.Value:
        p, g, angles = self.p, self.p.g, self._angles[kind]
        if p.fused:
            return g.op("RotaryEmbedding", x, *angles)
        if p.contrib:
            return g.op("RotaryEmbedding", x, *angles, domain=CONTRIB)
        first, second = g.ops("Split", x, axis=3, num_outputs=2, outputs=2)
        swapped = g.op("Concat", second, first, axis=3)
        return g.op("Add", g.op("Mul", x, angles[0]), g.op("Mul", swapped, angles[1]))

    def _grown(self, i: int, kind: str, new: ir.Value) -> ir.Value:
        """The keys or values of layer i before, and the new ones."""
        g, text = self.p.g, self.p.text
        shape: list[int | str] = ["batch", text.kv_heads, "past_sequence", text.head_dim]
        past = g.input(f"past_key_values.{i}.{kind}", g.dtype, shape)
        return g.op("Concat", past, self.p.narrowed(new), axis=2)

    def _attend(self, query: ir.Value, key: ir.Value, value: ir.Value, seen: ir.Value) -> ir.Value:
        """softmax(Q K^T + seen) V; there is no factor before the softmax."""
        p, g, text = self.p, self.p.g, self.p.text
        if p.fused:
            return g.op("Attention", query, key, value, seen, scale=1.0)
        i64, size = g.constant, text.head_dim
        query = g.op("Reshape", query, i64([0, text.kv_heads, -1, size]))
        scores = g.op("MatMul", query, g.op("Transpose", key, perm=[0, 1, 3, 2]))  # fused by ONNX Runtime
        weights = p.narrowed(g.op("Softmax", g.op("Add", p.widened(scores), seen), axis=-1))
        return g.op("Reshape", g.op("MatMul", weights, value), i64([0, text.heads, -1, size]))


def rope_base(config: Mapping[str, Any], kind: str) -> float:
    """The base of the rotary angles of one kind of layer, in the words of transformers 4 or 5."""
    key, default = BASES[kind]
    new = config.get("rope_parameters")
    if isinstance(new, dict) and isinstance(new.get(kind), dict):
        return float(new[kind].get("rope_theta", default))
    return float(config.get(key, default))
