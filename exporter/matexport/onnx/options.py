"""What a graph is written with: what a user asks for, and what the target wants."""

from __future__ import annotations

from matexport.errors import UsageError
from matexport.families import Family
from matexport.planning import Plan
from matexport.targets import Target
from matexport.tensors import dtype_named


def opset_of(family: Family, opset: int | None) -> int:
    """The opset that is asked for, or the family's default. Raises UsageError if it has no such one."""
    if opset is not None and opset not in family.OPSETS:
        fix = f"one of {', '.join(map(str, family.OPSETS))}"
        raise UsageError(f"{family.NAME} cannot be written at opset {opset}", fix=fix)
    return opset or family.OPSETS[0]


def stored_as(plan: Plan, target: Target, dtype: str | None) -> tuple[Plan, str]:
    """The plan of what a target stores, and the type that its graph computes products in. Raises UsageError.

    The graph of a typed target says itself which weights are stored in fewer bits.
    """
    found = dtype_named(dtype) or target.dtype
    return (plan, found) if target.typed else (plan.cast(found), "F32")
