"""Nodes that use quantised matrices as they are stored.

`int8` is dynamic quantisation in standard operators: a scale for each output, inputs quantised on the way. The block
methods are ONNX Runtime's `MatMulNBits`, inputs in int8 (accuracy level 4). The others are `DequantizeLinear` in front
of a product in the graph's type, which is what TensorRT recognises; with `fp8` what is multiplied is rounded to e4m3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from matexport.graph.builder import Graph
from matexport.graph.encoding import BLOCK, BLOCKS, CALIBRATED, FP8_MAX, PARTS, TYPED, Encoding, parts_of, takes
from matexport.planning import PlannedTensor

CONTRIB = "com.microsoft"


def linear(g: Graph, x: ir.Value, weights: Sequence[tuple[str, PlannedTensor]], method: str) -> list[ir.Value]:
    """x (b, T, k) times each weight (n, k) -> (b, T, n), all float32; methods for TensorRT take and give rows."""
    if method in TYPED:
        narrow = g.to_dtype(x)
        return [g.to_float32(_typed(g, narrow, name, tensor, method)) for name, tensor in weights]
    if method == "int8":
        quantised, scale, zero = g.ops("DynamicQuantizeLinear", x, outputs=3)
    found = []
    for name, tensor in weights:
        codes, scales = (g.weight(f"{name}.{part}", tensor, encoding=Encoding(method, part)) for part in PARTS)
        if method == "int8":
            y = g.op("Cast", g.op("MatMulInteger", quantised, codes, zero), to=int(ir.DataType.FLOAT))
            found.append(g.op("Mul", y, g.op("Mul", scales, scale)))
            continue
        n, k = tensor.shape
        bits = Encoding(method, "codes").bits
        sizes = {"K": k, "N": n, "bits": bits, "block_size": BLOCK, "accuracy_level": 4}
        found.append(g.op("MatMulNBits", x, codes, scales, domain=CONTRIB, **sizes))
    return found


def _typed(g: Graph, x: ir.Value, name: str, tensor: PlannedTensor, method: str) -> ir.Value:
    """x (N, k) times a weight (n, k) in the graph's type; a weight that is not of whole blocks stays what it is."""
    if not takes(method, tensor.shape):
        return g.op("Gemm", x, g.weight(name, tensor), transB=1)
    stored = {
        part: g.weight(f"{name}.{part}", tensor, encoding=Encoding(method, part, g.dtype)) for part in parts_of(method)
    }
    scales = stored["scales"]
    if method == "nvfp4":
        scales = g.op("DequantizeLinear", scales, stored["scale"])
        scales = g.to_dtype(scales)
    blocks: dict[str, Any] = {"block_size": BLOCKS[method]} if method in BLOCKS else {}
    weight = g.op("DequantizeLinear", stored["codes"], scales, axis=1 if blocks else 0, **blocks)
    if method in CALIBRATED:
        scale = g.constant(max(g.options.ranges[name], 1e-3) / FP8_MAX, g.dtype)
        zero = g.constant(0.0, "F8")
        x = g.op("DequantizeLinear", g.op("QuantizeLinear", x, scale, zero), scale, zero)
    return g.op("Gemm", x, weight, transB=1)


def gather(g: Graph, ids: ir.Value, name: str, tensor: PlannedTensor, method: str) -> ir.Value:
    """Rows (b, T, k) of a table (n, k) of whole blocks, from the codes and scales that `linear` uses.

    In standard operators: onnxruntime-web 1.31 has no kernel for `GatherBlockQuantized` in wasm.
    """
    i64, encoding = g.constant, Encoding(method, "codes")
    codes, scales = (
        g.op("Gather", g.weight(f"{name}.{part}", tensor, encoding=Encoding(method, part)), ids) for part in PARTS
    )
    if encoding.bits == 4:  # the even ones are the lower halves of bytes
        low = g.op("BitwiseAnd", codes, g.constant(15, "U8"))
        high = g.op("BitShift", codes, g.constant(4, "U8"), direction="RIGHT")
        pairs = g.op("Concat", *(g.op("Unsqueeze", half, i64([-1])) for half in (low, high)), axis=-1)
        codes = g.op("Reshape", pairs, i64([0, 0, 0, BLOCK]))
    zero = g.constant(float(1 << (encoding.bits - 1)), "F32")
    values = g.op("Sub", g.op("Cast", codes, to=int(ir.DataType.FLOAT)), zero)
    return g.op("Reshape", g.op("Mul", values, g.op("Unsqueeze", scales, i64([-1]))), i64([0, 0, tensor.shape[1]]))


def gathers(tensor: PlannedTensor, method: str | None) -> bool:
    """Whether `gather` can take rows of a table."""
    return method in ("int8-block", "int4-block") and tensor.shape[1] % BLOCK == 0
