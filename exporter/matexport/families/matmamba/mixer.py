"""What the ONNX graphs of both MatMamba models are made of: norms and the Mamba-2 mixer, at the widths of a plan.

Products with matrices are computed in the graph's type, as under the autocast that these models are trained with. All
between them is float32: the residual stream (their configs say `residual_in_fp32`), norms, convolution, gate, scan,
states; and so are the weights of these.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import onnx_ir as ir

from matexport.graph import chunks, mamba2, quantized, stateful
from matexport.graph.builder import Graph
from matexport.graph.encoding import TYPED
from matexport.planning import Plan, PlannedTensor


class States(NamedTuple):
    """What a mixer remembers: the last inputs of its convolution (b, m, k - 1), and its scan (b, h, n, p)."""

    conv: ir.Value
    scan: ir.Value


class Blocks:
    """Writes norms and mixers of one planned slice into a graph, in the graph's form.

    The projection in of an elastic graph comes in parts; heads are the outermost axis of each, so B and C stand
    before x.

    Args:
        batch: the number of inputs (1).
        length: of tokens. Where it is a number there are no states; else it is a value (1).
        mask: (b, T), which steps are none; None for none.
    """

    def __init__(
        self, g: Graph, plan: Plan, *, prefix: str, batch: ir.Value, length: int | ir.Value, mask: ir.Value | None
    ):
        self.g, self.tensors, self.prefix = g, plan.tensors, prefix
        self.form, self.elastic, self.quantize = g.options.form, g.options.elastic, g.options.quantize
        ssm = plan.config.get("ssm_cfg") or {}
        self.groups: int = ssm.get("ngroups", 1)
        low, high = ssm.get("dt_limit", (0.0, math.inf))
        self.dt_limit = float(low), float(high)
        self.epsilon: float = plan.config.get("norm_epsilon", 1e-5)
        self.rms_norm: bool = plan.config.get("rms_norm", prefix != "")
        self.kernel = self.tensors[f"{prefix}layers.0.mixer.conv1d.weight"].shape[2]
        g.functions = stateful.functions(self.form, kernel=self.kernel, masked=mask is not None, dt_limit=self.dt_limit)
        self.mask = mask
        size = g.constant([length]) if isinstance(length, int) else length
        self.steps = g.op("Concat", batch, size, axis=0)
        self._shapes: dict[int, ir.Value] = {}
        self.chunks: chunks.Chunks | None = None
        self.filling: chunks.Filling | None = None
        self.taps: stateful.Taps | None = None
        if self.form == "stock" and isinstance(length, int):
            self.chunks = chunks.cut(g, length)
        elif self.form == "stock":
            assert mask is not None
            with g.scope("chunks"):
                self.filling = chunks.fill(g, batch, size, mask)
                self.chunks, self.mask = self.filling.chunks, stateful.numbers(g, self.filling.mask)
            with g.scope("taps"):
                self.taps = stateful.taps_in_chunks(g, batch, self.filling, kernel=self.kernel)
        elif self.form == "contrib":
            with g.scope("taps"):
                self.taps = stateful.taps(g, batch, size, mask, kernel=self.kernel)
                self.mask = None if mask is None else stateful.numbers(g, mask)

    def weight(self, name: str) -> ir.Value:
        return self.g.weight(name, self.tensors[name], dtype="F32")

    def matrix(self, name: str) -> ir.Value:
        """A weight in the type of products."""
        return self.g.weight(name, self.tensors[name])

    def rows(self, name: str, part: str, *ranges: tuple[int, int]) -> tuple[str, PlannedTensor]:
        """Ranges of the rows of a weight, in order, as a weight of its own."""
        tensor = self.tensors[name]
        return f"{name}.{part}", replace(tensor, view=tensor.view.restrict(0, *ranges))

    def linear(
        self, x: ir.Value, *weights: tuple[str, PlannedTensor], quantize: bool = True, last: bool = False
    ) -> list[ir.Value]:
        """x (b, T, k) times each weight (n, k), as checkpoints store them or quantised -> (b, T, n).

        Where a sequence is filled up to chunks, x is rows (N, k), and so is what comes out, (N, n).

        Args:
            last: x is that of the last step, (b, 1, k).
        """
        g = self.g
        if self.quantize and quantize and self.quantize not in TYPED:
            return quantized.linear(g, x, weights, self.quantize)
        flat = x if self.filling else g.op("Reshape", x, g.constant([-1, weights[0][1].shape[1]]))
        g.products |= {name: flat for name, _ in weights}
        if self.quantize and quantize:
            found = quantized.linear(g, flat, weights, self.quantize)
        else:
            narrow = g.to_dtype(flat)
            found = [g.to_float32(g.op("Gemm", narrow, g.weight(*weight), transB=1)) for weight in weights]
        if self.filling:
            return found
        products = [(y, tensor.shape[0]) for y, (_, tensor) in zip(found, weights, strict=True)]
        return [g.op("Unsqueeze", y, g.constant([1])) if last else self.by_step(y, n) for y, n in products]

    def by_step(self, y: ir.Value, n: int) -> ir.Value:
        """(b * T, n) -> (b, T, n)."""
        if n not in self._shapes:
            self._shapes[n] = self.g.op("Concat", self.steps, self.g.constant([n]), axis=0)
        return self.g.op("Reshape", y, self._shapes[n])

    def into_chunks(self, x: ir.Value) -> ir.Value:
        """x (b, T, d) as mixers take it: rows (b * c * l, d) where the sequence is filled up to chunks."""
        if self.filling is None:
            return x
        g, filled = self.g, self.g.op("Gather", x, self.filling.source, axis=1)
        return g.op("Reshape", filled, g.constant([-1, self.tensors[f"{self.prefix}layers.0.norm.weight"].shape[0]]))

    def out_of_chunks(self, x: ir.Value) -> ir.Value:
        """What mixers give, without what was filled up: rows (b * T, d) where there are rows."""
        return self.g.op("Gather", x, self.filling.back) if self.filling else x

    def norm(self, x: ir.Value, name: str) -> ir.Value:
        """The norm over the residual stream that the model has."""
        if self.rms_norm:
            return self.g.op("Mul", self._rms(x, self.epsilon), self.weight(f"{name}.weight"))
        parameters = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        return self.g.op("LayerNormalization", x, *parameters, axis=-1, epsilon=self.epsilon)

    def _rms(self, x: ir.Value, eps: float) -> ir.Value:
        g = self.g
        mean = g.op("ReduceMean", g.op("Mul", x, x), g.constant([-1]), keepdims=1)
        return g.op("Div", x, g.op("Sqrt", g.op("Add", mean, g.constant(eps, "F32"))))

    def state_shapes(self, layer: int) -> tuple[list[int], list[int]]:
        """Of one layer's `States`, without the batch."""
        name = f"{self.prefix}layers.{layer}.mixer"
        heads, w = (self.tensors[f"{name}.{part}"].shape[0] for part in ("A_log", "norm.weight"))
        channels = self.tensors[f"{name}.conv1d.weight"].shape[0]
        n = (channels - w) // 2 // self.groups
        return [channels, self.kernel - 1], [heads, n, w // heads]

    def mixer(
        self,
        u: ir.Value,
        layer: int,
        states: States | None = None,
        *,
        last_only: bool = False,
    ) -> tuple[ir.Value, States | None]:
        """u (b, T, d) -> (b, T, d), and the states after it; from zeros where none are given. Where the sequence is
        filled up to chunks, u is their rows, (b * c * l, d).

        With `last_only` (and no states) -> (b, 1, d), the last step alone, for which the gate and the projection out
        are computed at that step only, and no state is.
        """
        g, name, groups = self.g, f"{self.prefix}layers.{layer}.mixer", self.groups
        heads, w = (self.tensors[f"{name}.{part}"].shape[0] for part in ("A_log", "norm.weight"))
        channels = self.tensors[f"{name}.conv1d.weight"].shape[0]
        gn = (channels - w) // 2
        if states is None and self.form != "stock":
            states = self._zeros(u, layer)
        conv_state: ir.Value | None = None
        scan_state: ir.Value | None = None
        z, xbc, dt = self._project(u, f"{name}.in_proj.weight", w, channels, heads, last_only)
        with g.scope("conv1d"):
            conv = self._channels(f"{name}.conv1d.weight", w), self._channels(f"{name}.conv1d.bias", w)
            if states is None:
                xbc = mamba2.causal_conv1d(g, xbc, *conv, channels=channels, kernel=self.kernel)
            else:
                xbc, conv_state = stateful.causal_conv1d(g, self.form, xbc, *conv, states.conv, self.mask, self.taps)
        if self.elastic:
            B, C, x = g.ops("Split", xbc, g.constant([gn, gn, w]), axis=-1, outputs=3)
        else:
            x, B, C = g.ops("Split", xbc, g.constant([w, gn, gn]), axis=-1, outputs=3)
        with g.scope("scan"):
            dt = g.op("Gather", dt, self.filling.rows) if self.filling else dt
            A = g.op("Neg", g.op("Exp", self.weight(f"{name}.A_log")))
            D, dt_bias = self.weight(f"{name}.D"), self.weight(f"{name}.dt_bias")
            sizes = {"heads": heads, "head_dim": w // heads, "groups": groups, "state": gn // groups}
            if last_only:
                dt = mamba2.softplus(g, dt, dt_bias, self.dt_limit)
                y = mamba2.last_output(g, x, dt, A, B, self.last(C), D, **sizes)
            else:
                y, scan_state = stateful.mamba2_scan(
                    g, self.form, x, dt, A, B, C, D, dt_bias, states.scan if states else None, self.mask,
                    **sizes, dt_limit=self.dt_limit, chunks=self.chunks, filled=self.filling is not None,
                )  # fmt: skip
        with g.scope("norm"):  # gate first; the mean is over the width in use, each group by itself
            y = g.op("Mul", y, mamba2.silu(g, z))
            steps = [0] if self.filling else [0, 0]
            if groups > 1:
                y = g.op("Reshape", y, g.constant([*steps, groups, w // groups]))
            y = self._rms(y, 1e-5)
            if groups > 1:
                y = g.op("Reshape", y, g.constant([*steps, w]))
            y = g.op("Mul", y, self.weight(f"{name}.norm.weight"))
        out = f"{name}.out_proj.weight"
        if self.elastic:
            y = g.to_float32(g.op("MatMul", g.to_dtype(y), g.weight(out, self.tensors[out], transposed=True)))
        else:
            (y,) = self.linear(y, (out, self.tensors[out]), last=last_only)
        known = conv_state is not None and scan_state is not None
        return y, States(conv_state, scan_state) if known else None  # type: ignore[arg-type]

    def last(self, x: ir.Value) -> ir.Value:
        """The last step: x (b, T, m) -> (b, 1, m)."""
        return self.g.op("Slice", x, self.g.constant([-1]), self.g.constant([1 << 60]), self.g.constant([1]))

    def _project(
        self, u: ir.Value, name: str, w: int, channels: int, heads: int, last_only: bool
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """z (b, T, w), or (b, 1, w) with `last_only`; the convolution's input (b, T, channels); dt (b, T, heads).

        Of rows (N, d) they are rows too.
        """
        g = self.g
        z, x, bc, dt = (0, w), (w, 2 * w), (2 * w, w + channels), (w + channels, w + channels + heads)
        gated = self.last(u) if last_only else u
        if self.elastic:
            parts = self.rows(name, "z", z), self.rows(name, "bcx", bc, x), self.rows(name, "dt", dt)
            first, second, third = *self.linear(gated, parts[0], last=last_only), *self.linear(u, *parts[1:])
        elif last_only:
            g.products |= {f"{name}.z": gated, f"{name}.xbcdt": u}
            if self.quantize:
                gate, rest = self.rows(name, "z", z), self.rows(name, "xbcdt", x, bc, dt)
                (first,), (xbcdt,) = self.linear(gated, gate, last=True), self.linear(u, rest)
            else:  # stored whole; runtimes split it once, when they load it
                sizes = self.g.constant([w, channels + heads])
                top, bottom = self.g.ops("Split", self.matrix(name), sizes, axis=0, outputs=2)
                first, xbcdt = (
                    self.g.to_float32(self.g.op("MatMul", self.g.to_dtype(x), self.g.op("Transpose", w, perm=[1, 0])))
                    for x, w in ((gated, top), (u, bottom))
                )
            second, third = self.g.ops("Split", xbcdt, self.g.constant([channels, heads]), axis=-1, outputs=2)
        else:
            (zxbcdt,) = self.linear(u, (name, self.tensors[name]))
            sizes = self.g.constant([w, channels, heads])
            first, second, third = self.g.ops("Split", zxbcdt, sizes, axis=-1, outputs=3)
        return first, second, third

    def _channels(self, name: str, w: int) -> ir.Value:
        """A weight of the convolution, its channels in the order of its input."""
        channels = self.tensors[name].shape[0]
        if not self.elastic:
            return self.weight(name)
        return self.g.weight(*self.rows(name, "bcx", (w, channels), (0, w)), dtype="F32")

    def _zeros(self, u: ir.Value, layer: int) -> States:
        batch = self.g.op("Shape", u, start=0, end=1)
        shapes = (self.g.op("Concat", batch, self.g.constant(s), axis=0) for s in self.state_shapes(layer))
        conv, scan = (self.g.op("Expand", self.g.constant(0.0, "F32"), shape) for shape in shapes)
        return States(conv, scan)
