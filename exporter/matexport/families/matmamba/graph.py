"""The ONNX graphs of MatMamba slices: vision with a dynamic batch, language with a dynamic length and states."""

from __future__ import annotations

import math

import onnx_ir as ir

from matexport.graph import mamba2
from matexport.graph.builder import Graph
from matexport.planning import Plan


def vision_graph(plan: Plan) -> Graph:
    """`pixel_values` (batch, 3, s, s) -> `logits` (batch, classes), from the config and shapes of a plan."""
    config, tensors = plan.config, plan.tensors
    d, patch, size = config["d_model"], config["patch_size"], config["image_size"]
    dtype = tensors["patch_embed.proj.weight"].dtype
    g = Graph("matmamba_vision")

    def weight(name: str, *, transposed: bool = False) -> ir.Value:
        return g.weight(name, tensors[name], transposed=transposed)

    def norm(x: ir.Value, name: str) -> ir.Value:
        if config.get("rms_norm"):
            return g.op("Mul", rms(x), weight(f"{name}.weight"))
        parameters = weight(f"{name}.weight"), weight(f"{name}.bias")
        return g.op("LayerNormalization", x, *parameters, axis=-1, epsilon=config.get("norm_epsilon", 1e-5))

    def rms(x: ir.Value, eps: float = config.get("norm_epsilon", 1e-5)) -> ir.Value:
        mean = g.op("ReduceMean", g.op("Mul", x, x), g.constant([-1]), keepdims=1)
        return g.op("Div", x, g.op("Sqrt", g.op("Add", mean, g.constant(eps, dtype))))

    def mixer(u: ir.Value, name: str) -> ir.Value:
        ssm = config["ssm_cfg"]
        groups = ssm.get("ngroups", 1)
        heads, w = tensors[f"{name}.A_log"].shape[0], tensors[f"{name}.norm.weight"].shape[0]
        conv, _, kernel = tensors[f"{name}.conv1d.weight"].shape
        gn = (conv - w) // 2
        zxbcdt = g.op("MatMul", u, weight(f"{name}.in_proj.weight", transposed=True))
        z, xbc, dt = g.ops("Split", zxbcdt, g.constant([w, conv, heads]), axis=-1, outputs=3)
        with g.scope("conv1d"):
            conv_weights = weight(f"{name}.conv1d.weight"), weight(f"{name}.conv1d.bias")
            xbc = mamba2.causal_conv1d(g, xbc, *conv_weights, channels=conv, kernel=kernel)
        x, B, C = g.ops("Split", xbc, g.constant([w, gn, gn]), axis=-1, outputs=3)
        with g.scope("scan"):
            dt = g.op("Softplus", g.op("Add", dt, weight(f"{name}.dt_bias")))
            low, high = ssm.get("dt_limit", (0.0, math.inf))
            if low > 0 or high < math.inf:
                dt = g.op("Clip", dt, g.constant(low, dtype), g.constant(high, dtype))
            A = g.op("Neg", g.op("Exp", weight(f"{name}.A_log")))
            y = mamba2.scan(
                g, x, dt, A, B, C, weight(f"{name}.D"),
                length=tokens, heads=heads, head_dim=w // heads, groups=groups, state=gn // groups,
            )  # fmt: skip
        with g.scope("norm"):  # gate first; the mean is over the width in use, each group by itself
            y = g.op("Mul", y, mamba2.silu(g, z))
            if groups > 1:
                y = g.op("Reshape", y, g.constant([0, 0, groups, w // groups]))
            y = rms(y, 1e-5)
            if groups > 1:
                y = g.op("Reshape", y, g.constant([0, 0, w]))
            y = g.op("Mul", y, weight(f"{name}.norm.weight"))
        return g.op("MatMul", y, weight(f"{name}.out_proj.weight", transposed=True))

    pixels = g.input("pixel_values", dtype, ["batch", 3, size, size])
    patches = (size // patch) ** 2
    tokens = patches + 1
    with g.scope("patch_embed"):
        proj = weight("patch_embed.proj.weight"), weight("patch_embed.proj.bias")
        x = g.op("Conv", pixels, *proj, kernel_shape=[patch, patch], strides=[patch, patch])
        x = g.op("Transpose", g.op("Reshape", x, g.constant([0, d, patches])), perm=[0, 2, 1])
    with g.scope("cls_token"):  # the class token comes last
        batch = g.op("Shape", pixels, start=0, end=1)
        shape = g.op("Concat", batch, g.constant([1, d]), axis=0)
        x = g.op("Concat", x, g.op("Expand", weight("cls_token"), shape), axis=1)
    x = g.op("Add", x, weight("pos_embed"))
    for i in range(config["n_layer"]):
        with g.scope(f"layers.{i}"):
            with g.scope("mixer"):
                y = mixer(norm(x, f"layers.{i}.norm"), f"layers.{i}.mixer")
            x = g.op("Add", x, y)
    if config.get("pool", "cls") == "cls":
        x = norm(g.op("Gather", x, g.constant(patches), axis=1), "norm_f")
    else:
        x = norm(g.op("Slice", x, g.constant([0]), g.constant([patches]), g.constant([1])), "norm_f")
        x = g.op("ReduceMean", x, g.constant([1]), keepdims=0)
    with g.scope("head"):
        logits = g.op("Gemm", x, weight("head.weight"), weight("head.bias"), transB=1)
    g.output(logits, "logits", dtype, ["batch", config["n_classes"]])
    return g
