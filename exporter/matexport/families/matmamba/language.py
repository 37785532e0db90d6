"""The ONNX graph of a MatMamba language model: prefill, continuation and decoding in one, states in and out."""

from __future__ import annotations

import math

import onnx_ir as ir

from matexport.families.matmamba.containers import EMBEDDINGS, HEAD
from matexport.graph import stateful
from matexport.graph.builder import Graph
from matexport.graph.mamba2 import silu
from matexport.planning import Plan

CONV_STATE, SCAN_STATE = "conv_state", "recurrent_state"  # onnxruntime-genai's names


def language_graph(plan: Plan, form: str) -> Graph:
    """`input_ids` (batch, sequence), `attention_mask` (batch, total) and two states a layer -> `logits` and new states.

    The mask covers all tokens so far, of which the last `sequence` count; a step with 0 leaves the states exactly as
    they were. States start as zeros.
    """
    config, tensors = plan.config, plan.tensors
    ssm, epsilon = config["ssm_cfg"], config.get("norm_epsilon", 1e-5)
    groups, low_high = ssm.get("ngroups", 1), tuple(ssm.get("dt_limit", (0.0, math.inf)))
    limit = (float(low_high[0]), float(low_high[1]))
    dtype = tensors[EMBEDDINGS[1]].dtype
    rows, d = tensors[EMBEDDINGS[1]].shape
    kernel = tensors["backbone.layers.0.mixer.conv1d.weight"].shape[2]
    g = Graph("matmamba_lm")
    g.functions = stateful.functions(form, kernel=kernel, masked=True, dt_limit=limit)

    def weight(name: str, *, transposed: bool = False) -> ir.Value:
        return g.weight(name, tensors[name], transposed=transposed)

    def rms(x: ir.Value, eps: float) -> ir.Value:
        mean = g.op("ReduceMean", g.op("Mul", x, x), g.constant([-1]), keepdims=1)
        return g.op("Div", x, g.op("Sqrt", g.op("Add", mean, g.constant(eps, dtype))))

    def norm(x: ir.Value, name: str) -> ir.Value:
        if config.get("rms_norm", True):
            return g.op("Mul", rms(x, epsilon), weight(f"{name}.weight"))
        parameters = weight(f"{name}.weight"), weight(f"{name}.bias")
        return g.op("LayerNormalization", x, *parameters, axis=-1, epsilon=epsilon)

    def mixer(u: ir.Value, name: str, conv_state: ir.Value, scan_state: ir.Value) -> tuple[ir.Value, ...]:
        heads, w = tensors[f"{name}.A_log"].shape[0], tensors[f"{name}.norm.weight"].shape[0]
        channels = tensors[f"{name}.conv1d.weight"].shape[0]
        gn = (channels - w) // 2
        zxbcdt = g.op("MatMul", u, weight(f"{name}.in_proj.weight", transposed=True))
        z, xbc, dt = g.ops("Split", zxbcdt, g.constant([w, channels, heads]), axis=-1, outputs=3)
        with g.scope("conv1d"):
            conv = weight(f"{name}.conv1d.weight"), weight(f"{name}.conv1d.bias")
            xbc, conv_state = stateful.causal_conv1d(g, form, xbc, *conv, conv_state, mask, kernel=kernel)
        x, B, C = g.ops("Split", xbc, g.constant([w, gn, gn]), axis=-1, outputs=3)
        with g.scope("scan"):
            A = g.op("Neg", g.op("Exp", weight(f"{name}.A_log")))
            y, scan_state = stateful.mamba2_scan(
                g, form, x, dt, A, B, C, weight(f"{name}.D"), weight(f"{name}.dt_bias"), scan_state, mask,
                heads=heads, groups=groups, dt_limit=limit,
            )  # fmt: skip
        with g.scope("norm"):  # gate first; the mean is over the width in use, each group by itself
            y = g.op("Mul", y, silu(g, z))
            if groups > 1:
                y = g.op("Reshape", y, g.constant([0, 0, groups, w // groups]))
            y = rms(y, 1e-5)
            if groups > 1:
                y = g.op("Reshape", y, g.constant([0, 0, w]))
            y = g.op("Mul", y, weight(f"{name}.norm.weight"))
        return g.op("MatMul", y, weight(f"{name}.out_proj.weight", transposed=True)), conv_state, scan_state

    ids = g.input("input_ids", "I64", ["batch", "sequence"])
    attention = g.input("attention_mask", "I64", ["batch", "total_sequence"])
    embedding = weight(EMBEDDINGS[1])
    with g.scope("mask"):  # of the tokens that are new
        length = g.op("Shape", ids, start=1, end=2)
        mask = g.op("Slice", attention, g.op("Neg", length), g.constant([1 << 60]), g.constant([1]))
        mask = g.op("Cast", mask, to=int(ir.DataType.BOOL))
    x = g.op("Gather", embedding, ids)
    states = []
    for i in range(config["n_layer"]):
        name = f"backbone.layers.{i}"
        heads, w = (tensors[f"{name}.mixer.{part}"].shape[0] for part in ("A_log", "norm.weight"))
        channels = tensors[f"{name}.mixer.conv1d.weight"].shape[0]
        p, n = w // heads, (channels - w) // 2 // groups
        shapes = {CONV_STATE: ["batch", channels, kernel - 1], SCAN_STATE: ["batch", heads, n, p]}
        past = [g.input(f"past_key_values.{i}.{kind}", dtype, shape) for kind, shape in shapes.items()]
        with g.scope(f"layers.{i}"), g.scope("mixer"):
            y, *present = mixer(norm(x, f"{name}.norm"), f"{name}.mixer", *past)
        x = g.op("Add", x, y)
        states += [
            (value, f"present.{i}.{kind}", shape) for value, (kind, shape) in zip(present, shapes.items(), strict=True)
        ]
    with g.scope("head"):  # the embedding is stored once: Gemm takes it as it is
        head = weight(HEAD) if HEAD in tensors else embedding
        x = g.op("Reshape", norm(x, "backbone.norm_f"), g.constant([-1, d]))
        shape = g.op("Concat", g.op("Shape", ids), g.constant([rows]), axis=0)
        logits = g.op("Reshape", g.op("Gemm", x, head, transB=1), shape)
    g.output(logits, "logits", dtype, ["batch", "sequence", rows])
    for value, name, sizes in states:
        g.output(value, name, dtype, sizes)
    return g
