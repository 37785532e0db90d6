"""Golden values: inputs of every profile of an engine, and what ONNX Runtime computes of them.

They are stored twice: as raw files, which trtexec reads and writes, and in the JSON of NVIDIA's polygraphy.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matexport.errors import InputError
from matexport.runtimes.program import Program
from matexport.tensorrt.profiles import Profile

if TYPE_CHECKING:
    import numpy as np

BATCH, LENGTH, SEED = 2, 70, 0  # where the profile allows them: more than one, and no multiple of anything
RUNNER = "onnxruntime"


@dataclass(frozen=True)
class Case:
    """One run of one profile."""

    profile: str
    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]


def sizes(profile: Mapping[str, Profile], shapes: Mapping[str, tuple[int | str, ...]]) -> tuple[int, int]:
    """Batch and new tokens (0 for a model without tokens) of a case, within the profile."""
    ranges = {
        axis: (profile[name][0][i], profile[name][2][i])
        for name, shape in shapes.items()
        for i, axis in enumerate(shape)
        if isinstance(axis, str)
    }

    def near(axis: str, wanted: int) -> int:
        low, high = ranges[axis]
        return min(max(wanted, low), high)

    return near("batch", BATCH), near("sequence", LENGTH) if "sequence" in ranges else 0


def golden_cases(
    program: Program,
    profiles: Mapping[str, Mapping[str, Profile]],
    samples: Mapping[str, np.ndarray],
) -> list[Case]:
    """A case for every profile; that of `decode` goes on from the states of `prefill`.

    Args:
        samples: inputs of the model, at least as much as `sizes` says, and a token more.

    Raises:
        InputError: a profile that takes no such inputs.
    """
    import numpy as np

    shapes = {name: value.shape for name, value in program.inputs.items()}
    names = list(profiles)
    batch, length = sizes(profiles[names[0]], shapes)
    if not length:
        inputs = {name: array[:batch].astype(program.inputs[name].dtype) for name, array in samples.items()}
        return [_run(program, names[0], profiles[names[0]], inputs)]
    tokens = samples["input_ids"].ravel()[: batch * (length + 1)].reshape(batch, length + 1)
    mask = np.ones_like(tokens)
    first = {**program.tokens(tokens[:, :length], mask[:, :length]), **program.zeros(batch)}
    found = [_run(program, names[0], profiles[names[0]], first)]
    for name in names[1:]:
        carried = {past: found[0].outputs[new] for past, new in program.states.items()}
        step = {**program.tokens(tokens[:, length:], mask), **carried}
        found.append(_run(program, name, profiles[name], step))
    return found


def _run(program: Program, name: str, profile: Mapping[str, Profile], inputs: Mapping[str, np.ndarray]) -> Case:
    import numpy as np

    for i, array in inputs.items():
        low, _, high = profile[i]
        if len(low) != array.ndim or not all(a <= n <= b for a, n, b in zip(low, array.shape, high, strict=True)):
            given, least, most = ("x".join(map(str, shape)) for shape in (array.shape, low, high))
            what = f"profile {name!r} takes {i!r} from {least} to {most}, and there is no golden value of it in {given}"
            raise InputError(what, where=i, fix="give shapes that a first run, from empty states, can have")
    outputs = program.run(inputs)
    for output, array in outputs.items():
        if not np.isfinite(array.astype(np.float64)).all():
            what = f"output {output!r} of profile {name!r} is not finite: no engine could be checked with it"
            raise InputError(what, where="onnxruntime", fix="use another --dtype")
    return Case(name, inputs, outputs)


# ---------------------------------------------------------------------------------------------- files
def case_files(case: Case) -> dict[str, bytes]:
    """The files of a case: `in/NAME.bin` and `out/NAME.bin`, `inputs.json` and `outputs.json`."""
    groups = {"in": case.inputs, "out": case.outputs}
    files = {
        f"{group}/{name}.bin": array.astype(array.dtype.newbyteorder("<")).tobytes()
        for group, arrays in groups.items()
        for name, array in arrays.items()
    }
    result = {"outputs": {name: _marked("LazyArray", values=_array(a)) for name, a in case.outputs.items()}}
    iteration = _marked("IterationResult", **result, runtime=None, runner_name=RUNNER)
    files["inputs.json"] = _json([{name: _array(array) for name, array in case.inputs.items()}])
    files["outputs.json"] = _json(_marked("RunResults", lst=[[RUNNER, [iteration]]]))
    return files


def describe_case(case: Case) -> dict[str, Any]:
    """What the manifest says of a case: type and shape of every array."""
    groups = {"inputs": case.inputs, "outputs": case.outputs}
    return {
        group: {name: {"dtype": array.dtype.name, "shape": list(array.shape)} for name, array in arrays.items()}
        for group, arrays in groups.items()
    }


def read_case(folder: Path, profile: str, described: dict[str, Any]) -> Case:
    """Reads the raw files of a case. Raises InputError if they are not what the manifest says."""
    groups = [
        {name: _read(folder / group / f"{name}.bin", entry) for name, entry in described[key].items()}
        for group, key in (("in", "inputs"), ("out", "outputs"))
    ]
    return Case(profile, *groups)


def _read(file: Path, entry: dict[str, Any]) -> np.ndarray:
    import ml_dtypes
    import numpy as np

    dtype = np.dtype(getattr(ml_dtypes, entry["dtype"], entry["dtype"]))
    data = file.read_bytes() if file.is_file() else b""
    if len(data) != math.prod(entry["shape"]) * dtype.itemsize:
        raise InputError("is not the golden value that the manifest describes", where=str(file), fix="write it again")
    return np.frombuffer(data, dtype).reshape(entry["shape"])


def _array(array: np.ndarray) -> dict[str, Any]:
    """An array in polygraphy's JSON: a .npy file in base64. It knows no bfloat16: such values are float32."""
    import numpy as np

    stream = io.BytesIO()
    np.save(stream, array.astype(np.float32) if array.dtype.name == "bfloat16" else array, allow_pickle=False)
    return _marked("ndarray", array=base64.b64encode(stream.getvalue()).decode())


def _marked(kind: str, **fields: Any) -> dict[str, Any]:
    return {**fields, "polygraphy_class": kind}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
