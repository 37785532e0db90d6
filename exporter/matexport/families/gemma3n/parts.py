"""What all parts of Gemma 3n's graph are made of: its weights by their names, products with them, norms.

Sizes: b batch, T new tokens, S all tokens so far, N = b T, h hidden, p per-layer width, n layers, a AltUp inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from matexport.families.gemma3n.config import read_config, text_of
from matexport.families.gemma3n.layout import EMBEDDING, HEAD, INNER, PER_LAYER_PROJECTION, PER_LAYER_TABLE, TEXT
from matexport.graph import quantized
from matexport.graph.builder import DTYPES, Graph
from matexport.graph.encoding import BLOCK, TYPED
from matexport.graph.options import GraphOptions
from matexport.planning import Plan, PlannedTensor, View

FUSED = 23  # the opset from which on ai.onnx has a node each for RMSNorm, rotary embedding and attention


class Parts:
    """A graph that is being written down, and the plan that it is of.

    Products with large matrices and those of attention are computed in `dtype`, all between them in float32: the AltUp
    stack and its small matrices, norms, rotary angles, softmax, logits. (With F64 all is float64.)

    Args:
        options: of the forms, "stock" has ai.onnx operators alone; the others take ONNX Runtime's own where that saves
            nodes, and from opset 23 on ai.onnx has what saves most of them. An elastic slice that skips layers has the
            per-layer tensors of all.

    Attributes:
        stored: how many layers the per-layer tensors are of, and `used` which of these the plan has.
    """

    def __init__(self, plan: Plan, options: GraphOptions):
        self.g = Graph("gemma3n", options)
        self.config: Mapping[str, Any] = text_of(plan.config)
        self.text = read_config(plan.config, "config.json")
        self.tensors, self.elastic, self.quantize = plan.tensors, options.elastic, options.quantize
        self.fused, self.contrib = options.opset >= FUSED, options.form != "stock" and options.opset < FUSED
        self.wide = "F64" if options.dtype == "F64" else "F32"  # what all between products is computed in
        self.prefix = INNER if INNER + EMBEDDING in plan.tensors else TEXT
        self._narrowed: dict[ir.Value, ir.Value] = {}
        self.epsilon = float(self.config.get("rms_norm_eps", 1e-6))
        self.stored, self.used = self.text.layers, list(range(self.text.layers))
        if self.elastic:
            self._store_all_layers([layer.source for layer in plan.layers])

    # -------------------------------------------------------------------------------------- weights
    def _store_all_layers(self, used: list[int]) -> None:
        """Takes the per-layer table and projection of the source as they are."""
        shape = self.tensors[self.prefix + PER_LAYER_PROJECTION].view.view_shape
        shapes = {PER_LAYER_PROJECTION: shape, PER_LAYER_TABLE: (self.text.per_layer_vocab, shape[0])}
        for name, full in shapes.items():
            tensor = self.tensors[self.prefix + name]
            view = View(tensor.view.source, full, tuple(((0, n),) for n in full), full)
            self.tensors = {**self.tensors, self.prefix + name: PlannedTensor(tensor.dtype, view)}
        self.stored, self.used = shape[0] // self.text.per_layer, used

    def weight(self, name: str) -> ir.Value:
        return self.g.weight(self.prefix + name, self.tensors[self.prefix + name], dtype=self.wide)

    def linear(self, x: ir.Value, name: str, *, inner: bool = False, before: bool = False) -> ir.Value:
        """x W^T for x (N, k) and a weight (n, k); `inner`: one whose columns are nested; `before`: another product."""
        g, full = self.g, f"{self.prefix}{name}.weight"
        tensor = self.tensors[full]
        g.products[full] = x
        with g.scope(name.rpartition(".")[2]):
            if self.quantize and min(tensor.shape) >= BLOCK:
                wide = self.widened(x) if self._narrowed.get(x) is x else x
                return quantized.linear(g, wide, [(full, tensor)], self.quantize)[0]
            if inner and self.elastic:
                return self.widened(g.op("MatMul", self.narrowed(x), g.weight(full, tensor, transposed=True)))
            y = g.op("Gemm", self.narrowed(x), g.weight(full, tensor), transB=1)
            return self.is_narrow(y) if before else self.widened(y)

    def small(self, x: ir.Value, name: str, *, factor: float = 1.0, bias: ir.Value | None = None) -> ir.Value:
        """factor * x W^T + bias for one of AltUp's matrices of a few rows, which always are float32."""
        with self.g.scope(name.rpartition(".")[2]):
            scale: dict[str, Any] = {} if factor == 1 else {"alpha": factor}
            return self.g.op("Gemm", x, self.weight(f"{name}.weight"), bias, transB=1, **scale)

    def rows(self, ids: ir.Value, name: str) -> ir.Value:
        """Rows of a table, which is never cast or copied whole."""
        g, tensor = self.g, self.tensors[self.prefix + name]
        if quantized.gathers(tensor, self.quantize):
            assert self.quantize
            return quantized.gather(g, ids, self.prefix + name, tensor, self.quantize)
        return self.widened(g.gather(self.prefix + name, tensor, ids))

    def logits(self, x: ir.Value, steps: ir.Value) -> ir.Value:
        """x (N, h) times the head, or the embedding where that is the head too: (*steps, vocabulary).

        Where possible nothing of that size is reshaped: as an output of the graph it would be copied.
        """
        g, text = self.g, self.text
        name = HEAD if HEAD in self.tensors else self.prefix + EMBEDDING
        tensor = self.tensors[name]
        g.products[name] = x
        in_bits = bool(self.quantize) and (name == HEAD or quantized.gathers(tensor, self.quantize))
        rows = self.quantize in TYPED or not (in_bits or self.contrib)
        if not rows:
            x = g.op("Reshape", x, g.op("Concat", steps, g.constant([text.hidden]), axis=0))
        if in_bits:
            y = quantized.linear(g, x, [(name, tensor)], str(self.quantize))[0]
        elif rows:
            y = self.widened(g.op("Gemm", self.narrowed(x), g.weight(name, tensor), transB=1))
        else:
            product = g.op("FusedMatMul", self.narrowed(x), g.weight(name, tensor), transB=1, domain=quantized.CONTRIB)
            y = self.widened(product)
        return g.op("Reshape", y, g.op("Concat", steps, g.constant([text.vocab]), axis=0)) if rows else y

    # ------------------------------------------------------------------------------------ functions
    def norm(self, x: ir.Value, name: str | None) -> ir.Value:
        """RMSNorm over the last axis (Gemma3nRMSNorm), with a weight if there is one."""
        g = self.g
        with g.scope(name.rpartition(".")[2] if name else "v_norm"):
            if self.fused or self.contrib:
                ones = np.ones(self.text.head_dim)
                weight = self.weight(f"{name}.weight") if name else self.constant(ones)
                op = "RMSNormalization" if self.fused else "SimplifiedLayerNormalization"
                return g.op(op, x, weight, axis=-1, epsilon=self.epsilon, stash_type=1)
            # spelled as ONNX Runtime recognises it
            mean = g.op("ReduceMean", g.op("Pow", x, self.constant(2.0)), g.constant([-1]), keepdims=1)
            y = g.op("Div", x, g.op("Sqrt", g.op("Add", mean, self.constant(self.epsilon))))
            return y if name is None else g.op("Mul", y, self.weight(f"{name}.weight"))

    def scaled(self, x: ir.Value, factor: float) -> ir.Value:
        return self.g.op("Mul", x, self.constant(factor))

    def magnitude(self, x: ir.Value, least: float | None = None) -> ir.Value:
        """Root of the mean square over the last axis, whose mean square is at least `least`."""
        g = self.g
        mean = g.op("ReduceMean", g.op("Mul", x, x), g.constant([-1]), keepdims=1)
        return g.op("Sqrt", mean if least is None else g.op("Max", mean, self.constant(least)))

    def constant(self, array: Any) -> ir.Value:
        """A constant in the type of what is between products."""
        return self.g.constant(array, self.wide)

    def narrowed(self, x: ir.Value) -> ir.Value:
        """x in the type of products."""
        if self.g.dtype == self.wide:
            return x
        if x not in self._narrowed:
            self._narrowed[x] = self.g.op("Cast", x, to=int(DTYPES[self.g.dtype]))
        return self._narrowed[x]

    def is_narrow(self, x: ir.Value) -> ir.Value:
        """x, which need not be narrowed any more."""
        if self.g.dtype != self.wide:
            self._narrowed[x] = x
        return x

    def widened(self, x: ir.Value) -> ir.Value:
        """x, in the type of products, in that of what is between them."""
        return x if self.g.dtype == self.wide else self.g.op("Cast", x, to=int(DTYPES[self.wide]))
