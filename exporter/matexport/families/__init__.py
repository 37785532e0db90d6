"""Families: the nested architectures. This file is the one place that knows them all.

A family is a package with the functions of `Family`; to add one, write the package and name it here.
"""

from __future__ import annotations

import importlib
import importlib.resources
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from matexport.checkpoint import Checkpoint
from matexport.errors import CheckpointError, UsageError
from matexport.families.loaders import Verdict
from matexport.graph.options import GraphOptions
from matexport.planning import KeptLayer, Plan
from matexport.slice_table import Row, Table, read_table

if TYPE_CHECKING:
    import numpy as np

    from matexport.graph.builder import Graph

FAMILIES = ("gemma3n", "matmamba")

Arrays = Mapping[str, "np.ndarray"]
# Inputs by name -> outputs by name. An output `decode.X`, or `decode@S.X`, is X computed step by step, from states
# (after S tokens at once; with S "left" or "right" after prompts of different lengths, padded there). `whole.X` is X
# computed at once in float64, and truer than X; only models that are small enough have it.
# `states.X` are the states after all tokens, those of all layers in one vector.
Forward = Callable[[Arrays], Arrays]


def splits(length: int) -> list[int]:
    """After how many tokens at once to go on step by step: the first one, half, all but the last."""
    return sorted({1, length // 2, length - 1} - {0})


class Family(Protocol):
    """What the package of a family provides. Only the three `load_*` may import torch."""

    NAME: str
    COLUMN: str  # the column of a slice table that holds its widths
    OPSETS: tuple[int, ...]  # of ai.onnx that its graphs can be written at, the default first
    OPTIONS: Mapping[str, Callable[[Plan], Plan]]  # what can be done to a plan beside choosing a row

    def recognises(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint, whole or sliced, is of this family."""

    def packaged_table(self, checkpoint: Checkpoint) -> str | None:
        """File name of the slice table in `slices/` for a model of this kind and size."""

    def plan_slice(self, checkpoint: Checkpoint, row: Row, trained: Table | None) -> Plan:
        """Plans one row. Raises TableError, CheckpointError."""

    def extra_files(self, plan: Plan) -> dict[str, bytes]:
        """Files that go along with a sliced checkpoint, by name: its class where no library has it, a notice."""

    def card(self, plan: Plan) -> dict[str, Any]:
        """What the model card of a slice says: `pipeline_tag`, `tags`, `usage` (Python code), `license`s if known."""

    def loaders(self, checkpoint: Checkpoint) -> list[Verdict]:
        """Which programs load this checkpoint, and why another one does not."""

    def damage(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        """What a known faulty tool left wrong in this checkpoint."""

    def repair(self, checkpoint: Checkpoint, row: Row | None) -> Checkpoint:
        """The checkpoint without that damage; `row` is what it was cut with. Raises CheckpointError, UsageError."""

    def build_graph(self, plan: Plan, options: GraphOptions) -> Graph:
        """The ONNX graph of a planned slice; see `matexport.graph.options`. Calibrated methods need every range."""

    def build_split(self, plan: Plan, options: GraphOptions) -> dict[str, Graph]:
        """The same in several graphs, each fed with what those before it give: embeddings first; by file name.

        Empty for a family whose embeddings are no large part of it.
        """

    def sample_inputs(self, config: dict[str, Any], count: int, seed: int) -> dict[str, np.ndarray]:
        """Random inputs by name, `count` along the batch axis."""

    def load_oracle(self, checkpoint: Checkpoint, layers: Sequence[KeptLayer], dtype: str | None) -> Forward:
        """The whole source model in fp32, its weights rounded to `dtype`, with the slice applied at run time."""

    def load_slice(self, checkpoint: Checkpoint) -> Forward:
        """A sliced checkpoint in fp32 in the oracle's class, its weights loaded strictly."""

    def load_stock(self, checkpoint: Checkpoint) -> Forward | None:
        """The same in a library's class, as an independent check; None where no library has it."""


def family_of(checkpoint: Checkpoint) -> Family:
    """The family of a checkpoint. Raises CheckpointError if it is of none."""
    for name in FAMILIES:
        family = family_named(name)
        if family.recognises(checkpoint):
            return family
    kind = checkpoint.config.get("model_type") or checkpoint.config.get("architectures") or "no model_type"
    fix = f"the families are: {', '.join(FAMILIES)}"
    raise CheckpointError(f"is of no family that can be sliced ({kind})", where=str(checkpoint.path), fix=fix)


def with_options(plan: Plan, family: Family, options: Sequence[str] = (), dtype: str | None = None) -> Plan:
    """The plan with the named options of its family applied, and its floats cast to `dtype`.

    Raises:
        UsageError: the family has no such option.
    """
    for name in options:
        if name not in family.OPTIONS:
            known = ", ".join(f"--{option.replace('_', '-')}" for option in family.OPTIONS) or "none"
            what = f"{family.NAME} has no option --{name.replace('_', '-')}"
            raise UsageError(what, fix=f"leave it out; its options are: {known}")
        plan = family.OPTIONS[name](plan)
        plan = replace(plan, options=(*plan.options, name))
    return plan.cast(dtype)


def family_named(name: str) -> Family:
    """The family called `name` in a plan or manifest. Raises CheckpointError."""
    if name not in FAMILIES:
        raise CheckpointError(f"unknown family {name!r}", fix=f"the families are: {', '.join(FAMILIES)}")
    family: Family = importlib.import_module(f"matexport.families.{name}")
    return family


def table_of(checkpoint: Checkpoint, family: Family) -> Table | None:
    """The slice table of a model: `slices.csv` beside it, else the packaged one, else None."""
    beside = checkpoint.path / "slices.csv"
    if beside.is_file():
        return read_table(beside)
    name = family.packaged_table(checkpoint)
    return read_table(packaged_tables() / name) if name else None


def packaged_tables() -> Path:
    """The folder of the packaged slice tables, in a wheel or in a source tree."""
    packaged = Path(str(importlib.resources.files("matexport"))) / "slices"
    return packaged if packaged.is_dir() else Path(__file__).parents[3] / "slices"
