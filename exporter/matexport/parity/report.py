"""The outcome of `verify`: for people in Markdown, for machines in JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from matexport.errors import printable
from matexport.parity.comparison import Comparison


@dataclass(frozen=True)
class Report:
    """All comparisons of one artefact with its source, on inputs that are given or random.

    Attributes:
        weights: bytes of a quantised artefact's weights, and of the same in float32.
    """

    artefact: str
    source: str
    slice_name: str
    comparisons: tuple[Comparison, ...]
    inputs: str = "given"
    weights: tuple[int, int] | None = None

    @property
    def passed(self) -> bool:
        """True if there was something to compare and every comparison passed."""
        return bool(self.comparisons) and all(comparison.passed for comparison in self.comparisons)

    @property
    def worst(self) -> Comparison | None:
        """The failed comparison that says most, or None: see `Comparison.badness`."""
        failed = [comparison for comparison in self.comparisons if not comparison.passed]
        return max(failed, key=lambda comparison: comparison.badness, default=None)

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "artefact": self.artefact,
            "source": self.source,
            "slice": self.slice_name,
            "inputs": self.inputs,
            **({"weights": dict(zip(("bytes", "float32_bytes"), self.weights, strict=True))} if self.weights else {}),
            "comparisons": [comparison.to_json() for comparison in self.comparisons],
        }

    def to_markdown(self) -> str:
        """A report with one line for each output, and one for all tensors or files that agree."""
        verdict = "passed" if self.passed else "FAILED"
        lines = [
            f"# Parity of `{_cell(self.artefact)}`: {verdict}",
            "",
            f"Slice `{_cell(self.slice_name)}` of `{_cell(self.source)}`. Inputs: {self.inputs}.{self._sizes()}",
            "",
            "| comparison | kind | max abs | max rel | cosine | top-1 | KL | tolerance | |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for kind, what in (("provenance", "tensors"), ("digest", "files"), ("config", "files")):
            good = [c for c in self.comparisons if c.kind == kind and c.passed]
            if good:
                lines.append(f"| {len(good)} {what} | {kind} | | | | | | bitwise | ok |")
        for c in self.comparisons:
            if c.kind not in ("provenance", "digest", "config") or not c.passed:
                numbers = " | ".join(_short(v) for v in (c.max_abs, c.max_rel, c.cosine, c.top1, c.kl))
                tolerance = "bitwise" if c.tolerance == 0 else "stated" if c.kind == "loss" else f"{c.tolerance:g}"
                tolerance += " x loss" if c.of_loss is not None else ""
                outcome = "ok" if c.passed else f"**FAILED** {_cell(c.detail)}"
                shown = c.of_loss is not None and math.isfinite(c.of_loss)
                outcome += f" ({c.of_loss:.2g} x loss)" if shown else ""
                outcome += f" ({c.quality})" if c.quality else ""
                lines.append(f"| {_cell(c.name)} | {c.kind} | {numbers} | {tolerance} | {outcome} |")
        return "\n".join([*lines, ""])

    def _sizes(self) -> str:
        if self.weights is None:
            return ""
        stored, plain = self.weights
        return f" Weights: {stored:,} bytes, {stored / plain:.1%} of {plain:,} in float32."


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}" if 0.1 <= abs(value) <= 1 else f"{value:.2g}"


def _cell(text: str) -> str:
    """Text from a file as it can stand in one cell of a table."""
    return printable(" ".join(text.split())).replace("|", "\\|").replace("`", "'").replace("<", "&lt;")
