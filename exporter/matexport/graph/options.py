"""How an ONNX graph is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

OPSET = 21  # of ai.onnx, the newest that onnxruntime 1.20 loads


@dataclass(frozen=True)
class GraphOptions:
    """How an ONNX graph is written.

    Attributes:
        form: how ops of our own appear, see `matexport.targets`.
        dtype: what products are computed in. If that is float32, weights are stored as they are planned, and cast where
            they are first used; if it has fewer bits, weights are stored in the type in which they are used.
        opset: of ai.onnx.
        elastic: whether every weight of a narrower slice is a range of the bytes of the wider one's.
        quantize: how matrices are stored (see `matexport.graph.encoding`).
        ranges: the largest magnitude of what each of them is multiplied with, for methods that are calibrated.
    """

    form: str = "stock"
    dtype: str = "F32"
    opset: int = OPSET
    elastic: bool = False
    quantize: str | None = None
    ranges: Mapping[str, float] = field(default_factory=dict)
