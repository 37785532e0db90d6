"""Which programs load a slice, and why another one does not: a table of rows, judged by named facts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Loader:
    """A program that loads checkpoints of some family.

    Attributes:
        needs: names of facts that must hold for it.
        source: where that is read from.
    """

    name: str
    needs: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class Verdict:
    """Whether a loader takes a slice; `reason` says why not, `source` where that is read from."""

    loader: str
    takes: bool
    reason: str
    source: str

    def to_json(self) -> dict[str, object]:
        return {"loader": self.loader, "takes": self.takes, "reason": self.reason, "source": self.source}


def judge(loaders: Iterable[Loader], unmet: Mapping[str, str]) -> list[Verdict]:
    """Each loader's verdict, given the facts that do not hold and why."""
    found = []
    for loader in loaders:
        reasons = [unmet[need] for need in loader.needs if need in unmet]
        found.append(Verdict(loader.name, not reasons, "; ".join(reasons), loader.source))
    return found
