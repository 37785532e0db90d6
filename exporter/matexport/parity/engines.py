"""Verifying engines, on a GPU that fits, and the golden values of kits, on any machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from matexport.errors import InputError
from matexport.families import Family, Forward
from matexport.parity.comparison import Comparison, compare_outputs, compare_quantised, kind_of
from matexport.runtimes.ort import open_onnx
from matexport.runtimes.program import Program, chain, forward
from matexport.runtimes.tensorrt import open_engine
from matexport.tensorrt.golden import Case, read_case

Arrays = Mapping[str, np.ndarray]


def fitting_inputs(samples: Arrays, manifest: Mapping[str, Any], where: str) -> dict[str, np.ndarray]:
    """Random inputs as the first profile of an engine takes them: fewer of them, or of another length.

    Raises:
        InputError: the manifest says nothing of their shapes.
    """
    try:
        ranges = next(iter(manifest["profiles"].values()))
        found = {}
        for name, array in samples.items():
            known = "inputs_embeds" if name == "input_ids" and name not in ranges else name
            low, high = ([int(n) for n in ranges[known][end]][: array.ndim] for end in ("min", "max"))
            wanted = list(array.shape)
            if name == "input_ids":  # a step after a prefill that is long enough for the mask
                wanted[1] = max(wanted[1], int(ranges["attention_mask"]["min"][1]) + 1)
            elif low[1:] != wanted[1:] or high[1:] != wanted[1:]:
                raise ValueError(f"{name} is {low} to {high}")
            shape = [min(max(n, a), b) for n, a, b in zip(wanted, low, high, strict=True)]
            found[name] = np.resize(array, shape)
    except (KeyError, TypeError, ValueError, StopIteration) as e:
        raise InputError(f"manifest cannot be read: {e!r}", where=where, fix="build the engine again") from None
    return found


def check_engine(
    artefact: Path, manifest: Mapping[str, Any], family: Family, inputs: Arrays, want: Arrays, stored: Arrays | None
) -> list[Comparison]:
    """Runs every profile of an engine, and compares what it gives with the oracle's.

    Args:
        stored: of a quantised one, what the oracle gives with the weights as they are stored.
    """
    engine = open_engine(artefact, manifest)
    before = [open_onnx(artefact / Path(str(name)).name) for name in manifest.get("before", ())]
    got = forward(chain([*before, engine.program]))(inputs)
    left_out = {name for name in want if name.startswith("decode") and name not in got}  # no profile takes the steps
    want = _comparable(want, manifest, left_out)
    found = _compared("engine", manifest, family, got, want, stored)
    for name in engine.profiles:
        if name not in engine.used:
            detail = "was not run: none of the inputs fits it"
            found.append(Comparison(f"profile {name}", "engine", False, 0.0, detail=detail))
    return found


def check_golden(
    kit: Path, manifest: Mapping[str, Any], family: Family, oracle: Forward, stored: Forward | None, model: Path
) -> list[Comparison]:
    """Computes the golden values of a kit again, and compares them with the oracle's too.

    Args:
        stored: of a quantised one, the oracle with the weights as they are stored.
    """
    try:
        cases = [read_case(kit / "golden" / name, name, entry) for name, entry in manifest["golden"].items()]
    except (KeyError, TypeError, AttributeError) as e:
        raise InputError(f"manifest cannot be read: {e!r}", where=str(kit), fix="write the kit again") from None
    program, found = open_onnx(model, own_types=True), []
    same = kind_of("onnx", {**manifest, "quantize": None})  # the same file in the same runtime, on another processor
    for case in cases:
        again = compare_outputs(same, program.run(case.inputs), case.outputs, family)
        found += [replace(c, name=f"golden {case.profile}: {c.name}") for c in again]
    given, got = _as_whole(program, cases)
    want = oracle(given)
    want = _comparable(want, manifest, {name for name in want if name.removeprefix("whole.") not in got})
    truth = _compared("onnx", manifest, family, got, want, stored(given) if stored else None)
    return found + [replace(c, name=f"golden: {c.name}") for c in truth]


def _compared(
    runtime: str, manifest: Mapping[str, Any], family: Family, got: Arrays, want: Arrays, stored: Arrays | None
) -> list[Comparison]:
    """Outputs with the oracle's; of quantised weights with what these give, and what is lost."""
    if stored is None:
        return compare_outputs(kind_of(runtime, manifest), got, want, family)
    return compare_quantised(kind_of(runtime, manifest), got, {name: stored[name] for name in want}, want, family)


def _comparable(want: Arrays, manifest: Mapping[str, Any], left_out: set[str]) -> Arrays:
    """The oracle's outputs but for some, and for states where weights are quantised: that loss is of outputs."""
    quantised = bool(manifest.get("quantize"))
    return {n: array for n, array in want.items() if n not in left_out and not (quantised and "states." in n)}


def _as_whole(program: Program, cases: list[Case]) -> tuple[Arrays, Arrays]:
    """The inputs and outputs of all cases as of one run: a prefill and the step after it are one text."""
    if not program.states:
        return cases[0].inputs, cases[0].outputs
    ids = np.concatenate([case.inputs["input_ids"] for case in cases], 1)
    logits = np.concatenate([case.outputs["logits"] for case in cases], 1)
    return {"input_ids": ids}, {"logits": logits, **program.after(cases[-1].outputs)}
