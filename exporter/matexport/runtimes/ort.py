"""ONNX files in ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from matexport.errors import InputError, MissingError
from matexport.families import splits

if TYPE_CHECKING:
    import numpy as np


Forward = Callable[[Mapping[str, "np.ndarray"]], Mapping[str, "np.ndarray"]]


def kernels() -> Path | None:
    """The library of matexport-plugins' kernels, or None if it was not built."""
    import matexport_plugins

    return matexport_plugins.ort_library()


def load_onnx(file: Path, *others: Path, threads: int = 0, library: bool = True) -> Forward:
    """Opens a model and returns a function from inputs by name to outputs by name.

    A model with states is run at once and step by step: see `decode@` in `matexport.families`. A model in several
    graphs is given in the order in which they feed each other: embeddings, then the rest.

    Args:
        threads: threads inside an operator; 0 leaves the choice to ONNX Runtime.
        library: whether to register the kernels of matexport-plugins, if they are there.
    Raises:
        MissingError: onnxruntime is not installed.
        InputError: the file cannot be loaded.
    """
    try:
        import onnxruntime as ort
    except ImportError:
        raise MissingError("onnxruntime is not installed", fix="pip install 'matexport[ort]'") from None
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if library and (path := kernels()):
        options.register_custom_ops_library(str(path))
    sessions = []
    for path in (file, *others):
        try:
            sessions.append(ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]))
        except Exception as e:  # onnxruntime raises classes of its own, all derived from Exception only
            fix = "write the ONNX folder again"
            raise InputError(f"onnxruntime cannot load it: {e}", where=str(path), fix=fix) from None
    outputs = [output.name for output in sessions[-1].get_outputs()]
    names = {i.name for session in sessions for i in session.get_inputs()}
    # among the inputs, states; after the logits, the new ones in the same order
    given = [i for i in sessions[-1].get_inputs() if i.name.startswith("past_")]
    states = [(i.name, i.shape, new) for i, new in zip(given, outputs[1:], strict=False)]

    def run(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        known = dict(inputs)
        for session, path in zip(sessions, (file, *others), strict=True):
            found = [output.name for output in session.get_outputs()]
            feed = {i.name: known[i.name] for i in session.get_inputs() if i.name in known}
            try:
                known |= zip(found, session.run(found, feed), strict=True)
            except Exception as e:
                fix = "write the ONNX folder again"
                raise InputError(f"onnxruntime cannot run it: {e}", where=str(path), fix=fix) from None
        return {name: known[name] for name in outputs}

    return partial(_decode, _with_positions(run) if "position_ids" in names else run, states) if states else run


def _with_positions(run: Forward) -> Forward:
    """The same with the positions of new tokens, from a mask of all tokens so far."""
    import numpy as np

    def positioned(inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        new = inputs["input_ids"].shape[1]
        positions = np.maximum(inputs["attention_mask"].cumsum(1) - 1, 0)
        return run({**inputs, "position_ids": positions[:, -new:]})

    return positioned


def _decode(
    run: Forward, states: Sequence[tuple[str, list[int | str], str]], inputs: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Logits and states of one run, and of prefills of some of the tokens followed by single steps that pass states on;
    logits of prompts of different lengths that are padded to one, and of steps after them.

    A state whose sizes are not all known is a cache, empty at first; the others are those of the convolution and the
    scan in turn.
    """
    import numpy as np

    ids = np.asarray(inputs["input_ids"], np.int64)
    mask = np.ones_like(ids)
    fixed = [new for _, shape, new in states if all(isinstance(n, int) for n in shape[1:])]
    zeros = {
        past: np.zeros([len(ids), *(n if isinstance(n, int) else 0 for n in shape[1:])], np.float32)
        for past, shape, _ in states
    }

    def after(out: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        kinds = {"states.conv": fixed[::2], "states.scan": fixed[1::2]} if fixed else {}
        return {kind: np.concatenate([out[name].ravel() for name in names]) for kind, names in kinds.items()}

    whole = run({"input_ids": ids, "attention_mask": mask, **zeros})
    found = {"logits": whole["logits"], **after(whole)}
    for split in splits(ids.shape[1]):
        out = run({"input_ids": ids[:, :split], "attention_mask": mask[:, :split], **zeros})
        pieces = [out["logits"]]
        for t in range(split, ids.shape[1]):
            carried = {past: out[new] for past, _, new in states}
            out = run({"input_ids": ids[:, t : t + 1], "attention_mask": mask[:, : t + 1], **carried})
            pieces.append(out["logits"])
        found[f"decode@{split}.logits"] = np.concatenate(pieces, 1)
        found |= {f"decode@{split}.{kind}": array for kind, array in after(out).items()}
    if len(ids) > 1:
        found |= {f"decode@{side}.logits": _padded(run, states, zeros, ids, side) for side in ("left", "right")}
    return found


def _padded(
    run: Forward, states: Sequence[tuple[str, list[int | str], str]], zeros: Mapping[str, np.ndarray],
    ids: np.ndarray, side: str,
) -> np.ndarray:  # fmt: skip
    """Logits of all tokens (batch, length): a batch of prompts padded on one side, then a token of each row at a time.

    A row that has no more tokens gets masked ones.
    """
    import numpy as np

    batch, length = ids.shape
    rows, longest = np.arange(batch), max(1, length // 2)
    seen = longest - rows % longest  # tokens of each row so far
    place = np.arange(longest) - (longest - seen if side == "left" else np.zeros_like(seen))[:, None]
    mask = ((place >= 0) & (place < seen[:, None])).astype(np.int64)
    out = run({"input_ids": ids[rows[:, None], place * mask], "attention_mask": mask, **zeros})
    logits = np.zeros([batch, length, out["logits"].shape[2]], np.float32)
    real = mask.astype(bool)
    logits[np.nonzero(real)[0], place[real]] = out["logits"][real]
    while (live := seen < length).any():
        mask = np.concatenate([mask, live[:, None].astype(np.int64)], 1)
        new = ids[rows, np.minimum(seen, length - 1)][:, None]
        out = run({"input_ids": new, "attention_mask": mask, **{past: out[name] for past, _, name in states}})
        logits[rows[live], seen[live]] = out["logits"][live, 0]
        seen = seen + live
    return logits


def stored_weights(file: Path) -> dict[str, tuple[Path, int]]:
    """Where the external weights of a model lie: file and offset by name, in files of the model's own folder only.

    Raises:
        InputError: the model cannot be read.
    """
    import onnx

    try:
        initializers = onnx.load(file, load_external_data=False).graph.initializer
    except Exception as e:  # protobuf's errors, and the file system's
        raise InputError(f"is not an ONNX model: {e}", where=str(file), fix="write the ONNX folder again") from None
    found = {}
    for initializer in initializers:
        place = {entry.key: entry.value for entry in initializer.external_data}
        data, offset = place.get("location", ""), place.get("offset", "0")
        if data and Path(data).name == data and offset.isdecimal() and (file.parent / data).is_file():
            found[initializer.name] = (file.parent / data, int(offset))
    return found
