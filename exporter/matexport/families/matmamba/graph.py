"""The ONNX graphs of MatMamba slices: vision with a dynamic batch; language with a dynamic length too, and states."""

from __future__ import annotations

import onnx_ir as ir

from matexport.families.matmamba.containers import EMBEDDINGS, HEAD
from matexport.families.matmamba.layout import PREFIXES
from matexport.families.matmamba.mixer import Blocks, States
from matexport.graph import quantized
from matexport.graph.builder import Graph
from matexport.planning import Plan

STATES = ("conv_state", "recurrent_state")  # onnxruntime-genai's names


def vision_graph(g: Graph, plan: Plan) -> Graph:
    """`pixel_values` (batch, 3, s, s) -> `logits` (batch, classes), from the config and shapes of a plan.

    Inputs and outputs are float32, whatever products are computed in.
    """
    config = plan.config
    d, patch, size = config["d_model"], config["patch_size"], config["image_size"]
    patches = (size // patch) ** 2
    pixels = g.input("pixel_values", "F32", ["batch", 3, size, size])
    batch = g.op("Shape", pixels, start=0, end=1)
    blocks = Blocks(g, plan, prefix=PREFIXES["vision"], batch=batch, length=patches + 1, mask=None)
    weight = blocks.weight
    with g.scope("patch_embed"):
        proj = weight("patch_embed.proj.weight"), weight("patch_embed.proj.bias")  # Conv-11 knows no bfloat16
        x = g.op("Conv", pixels, *proj, kernel_shape=[patch, patch], strides=[patch, patch])
        x = g.op("Transpose", g.op("Reshape", x, g.constant([0, d, patches])), perm=[0, 2, 1])
    with g.scope("cls_token"):  # the class token comes last
        shape = g.op("Concat", batch, g.constant([1, d]), axis=0)
        x = g.op("Concat", x, g.op("Expand", weight("cls_token"), shape), axis=1)
    x = g.op("Add", x, weight("pos_embed"))
    classed, n_layer = config.get("pool", "cls") == "cls", config["n_layer"]
    for i in range(n_layer):
        last_only = classed and i == n_layer - 1  # of the last layer, the class token alone is used
        with g.scope(f"layers.{i}"):
            with g.scope("mixer"):
                y, _ = blocks.mixer(blocks.norm(x, f"layers.{i}.norm"), i, last_only=last_only)
            x = g.op("Add", blocks.last(x) if last_only else x, y)
    if classed:
        x = blocks.norm(g.op("Reshape", x, g.constant([-1, d])), "norm_f")
    else:
        x = blocks.norm(g.op("Slice", x, g.constant([0]), g.constant([patches]), g.constant([1])), "norm_f")
        x = g.op("ReduceMean", x, g.constant([1]), keepdims=0)
    with g.scope("head"):
        head = blocks.matrix("head.weight"), blocks.matrix("head.bias")
        logits = g.to_float32(g.op("Gemm", g.to_dtype(x), *head, transB=1))
    g.output(logits, "logits", "F32", ["batch", config["n_classes"]])
    return g


def language_graph(g: Graph, plan: Plan) -> Graph:
    """`input_ids` (batch, sequence), `attention_mask` (batch, total) and two states a layer -> `logits` and new states.

    One graph for prefill, continuation and decoding. The mask covers all tokens so far, of which the last `sequence`
    count; a step with 0, at either side, leaves the states exactly as they were. States start as zeros.
    States and logits are float32, whatever products are computed in.
    """
    prefix, quantize = PREFIXES["lm"], g.options.quantize
    ids = g.input("input_ids", "I64", ["batch", "sequence"])
    attention = g.input("attention_mask", "I64", ["batch", "total_sequence"])
    batch, length = (g.op("Shape", ids, start=i, end=i + 1) for i in range(2))
    with g.scope("mask"):  # of the tokens that are new
        mask = g.op("Slice", attention, g.op("Neg", length), g.constant([1 << 60]), g.constant([1]))
        mask = g.op("Cast", mask, to=int(ir.DataType.BOOL))
    blocks = Blocks(g, plan, prefix=prefix, batch=batch, length=length, mask=mask)
    embedding = EMBEDDINGS[1], plan.tensors[EMBEDDINGS[1]]
    if quantize and quantized.gathers(embedding[1], quantize):
        x = quantized.gather(g, ids, *embedding, quantize)
    else:
        x = g.to_float32(g.op("Gather", g.weight(*embedding), ids))
    x = blocks.into_chunks(x)
    present = []
    for i in range(plan.config["n_layer"]):
        shapes: list[list[int | str]] = [["batch", *shape] for shape in blocks.state_shapes(i)]
        named = list(zip(STATES, shapes, strict=True))
        conv, scan = (g.input(f"past_key_values.{i}.{name}", "F32", shape) for name, shape in named)
        with g.scope(f"layers.{i}"):
            with g.scope("mixer"):
                y, states = blocks.mixer(blocks.norm(x, f"{prefix}layers.{i}.norm"), i, States(conv, scan))
            x = g.op("Add", x, y)
        assert states is not None
        present += [(value, f"present.{i}.{name}", shape) for value, (name, shape) in zip(states, named, strict=True)]
    with g.scope("head"):  # a tied embedding is stored once
        tied = HEAD not in plan.tensors
        head = embedding if tied else (HEAD, plan.tensors[HEAD])
        x = blocks.norm(blocks.out_of_chunks(x), f"{prefix}norm_f")
        (logits,) = blocks.linear(x, head, quantize=not tied or quantized.gathers(embedding[1], quantize))
    rows = embedding[1].shape[0]
    logits = blocks.by_step(logits, rows) if blocks.filling else logits
    g.output(logits, "logits", "F32", ["batch", "sequence", rows])
    for value, name, shape in present:
        g.output(value, name, "F32", shape)
    return g
