"""The two tables of Gemma 3n: token ids -> embeddings, and each layer's own input."""

from __future__ import annotations

import math

import onnx_ir as ir

from matexport.families.gemma3n.layout import EMBEDDING, PER_LAYER_TABLE
from matexport.families.gemma3n.parts import Parts


def embed(p: Parts, ids: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Token ids (b, T) -> `inputs_embeds` (b, T, h) and `per_layer_inputs` (b, T, n, p): rows of the tables, scaled.

    The per-layer table of E4B has more than 2^31 elements; ids above its rows read row 0, as in transformers.
    """
    g, text = p.g, p.text
    with g.scope("embed_tokens"):
        embeds = p.scaled(p.rows(ids, EMBEDDING), math.sqrt(text.hidden))
    with g.scope("embed_tokens_per_layer"):
        known = g.op("Less", ids, g.constant(text.per_layer_vocab))
        rows = p.scaled(p.rows(g.op("Where", known, ids, g.constant(0)), PER_LAYER_TABLE), math.sqrt(text.per_layer))
        return embeds, g.op("Reshape", rows, g.constant([0, 0, p.stored, text.per_layer]))
