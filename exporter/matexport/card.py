"""The model card (README.md) of a sliced checkpoint."""

from __future__ import annotations

import re
from typing import Any

from matexport.checkpoint import Checkpoint
from matexport.errors import printable
from matexport.manifest import FILE
from matexport.planning import Plan
from matexport.slice_table import Row
from matexport.version import __version__


def model_card(plan: Plan, row: Row, checkpoint: Checkpoint, family: dict[str, Any]) -> str:
    """Markdown with the Hub's front matter; `family` gives `pipeline_tag`, `tags`, `usage` and `license`s if known."""
    source = checkpoint.name
    widths = ", ".join(f"{layer.source}: {layer.width}" for layer in plan.layers)
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {family['pipeline_tag']}",
        f"tags: [{', '.join(['matexport', 'matryoshka', *family['tags']])}]",
        *(f"{key}: {family[key]}" for key in ("license", "license_link") if key in family),
        "---",
        "",
        f"# {_inline(source)}, slice {_inline(plan.name)}",
        "",
        f"A standalone slice of the nested checkpoint `{_code(source)}`, cut by matexport {__version__}.",
        "",
        "| | |",
        "|---|---|",
        f"| parameters | {plan.parameters:,} |",
        f"| bytes of weights | {plan.nbytes:,} |",
        f"| layers kept | {len(plan.layers)} |",
        f"| source layer: width | {widths} |",
        *(f"| {_inline(title)} | {_inline(text)} |" for title, text in row.metrics.items()),
        "",
        *(f"> Note: {_inline(note)}\n" for note in plan.notes),
        "```python",
        family["usage"].replace("FOLDER", '"this folder"'),
        "```",
        "",
        f"`{FILE}` records which part of which source tensor every tensor is;",
        "`matexport verify -m THIS_FOLDER --source SOURCE` proves it.",
        "",
    ]
    return "\n".join(lines)


def _inline(text: str) -> str:
    """Text from a table as it can stand in one line of Markdown: nothing in it is markup."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", printable(" ".join(text.split())))


def _code(text: str) -> str:
    """The same between backticks."""
    return printable(" ".join(text.split())).replace("`", "'")
