"""Nodes that use quantised matrices as they are stored.

`int8` is dynamic quantisation in standard operators: a scale for each output, inputs quantised on the way. The block
methods are ONNX Runtime's `MatMulNBits`, inputs in int8 (accuracy level 4).
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from matexport.graph.builder import Graph
from matexport.graph.encoding import BLOCK, PARTS, Encoding
from matexport.planning import PlannedTensor

CONTRIB = "com.microsoft"


def linear(g: Graph, x: ir.Value, weights: Sequence[tuple[str, PlannedTensor]], method: str) -> list[ir.Value]:
    """x (b, T, k) times each weight (n, k) -> (b, T, n)."""
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


def gather(g: Graph, ids: ir.Value, name: str, tensor: PlannedTensor, method: str) -> ir.Value:
    """Rows of a table (n, k) of whole blocks, from the codes that `linear` uses."""
    codes, scales = (Encoding(method, part) for part in PARTS)
    rows = tensor.shape[0], tensor.shape[1] * codes.bits // 8
    data = g.weight(f"{name}.rows", tensor, encoding=codes, reshaped=rows)  # the same bytes, in two axes
    options = {"bits": codes.bits, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1}
    scale = g.weight(f"{name}.scales", tensor, encoding=scales)
    return g.op("GatherBlockQuantized", data, ids, scale, domain=CONTRIB, **options)


def gathers(tensor: PlannedTensor, method: str | None) -> bool:
    """Whether `gather` can take rows of a table."""
    return method in ("int8-block", "int4-block") and tensor.shape[1] % BLOCK == 0
