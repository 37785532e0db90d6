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


def load_onnx(file: Path, *, threads: int = 0, library: bool = True, exact: bool = False) -> Forward:
    """Opens a model and returns a function from inputs by name to outputs by name.

    A model with states is run at once and step by step: see `decode@` in `matexport.families`.

    Args:
        threads: threads inside an operator; 0 leaves the choice to ONNX Runtime.
        library: whether to register the kernels of matexport-plugins, if they are there.
        exact: compute products with block-quantised weights in float32, where the model allows inputs in 8 bits.
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
    try:
        model = _runnable(file, exact)
        if model is not file:  # its weights are where it was
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(file.parent))
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as e:  # onnxruntime raises classes of its own, all derived from Exception only
        raise InputError(
            f"onnxruntime cannot load it: {e}", where=str(file), fix="write the ONNX folder again"
        ) from None
    outputs = [output.name for output in session.get_outputs()]
    # after the tokens, their mask and positions, states; after the logits, the new ones in the same order
    given = [i for i in session.get_inputs() if i.name not in ("input_ids", "attention_mask", "position_ids")]
    positions = len(given) + 3 == len(session.get_inputs())
    states = [(i.name, i.shape, new) for i, new in zip(given, outputs[1:], strict=False)]

    def run(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            return dict(zip(outputs, session.run(outputs, dict(inputs)), strict=True))
        except Exception as e:
            fix = "write the ONNX folder again"
            raise InputError(f"onnxruntime cannot run it: {e}", where=str(file), fix=fix) from None

    return partial(_decode, _with_positions(run) if positions else run, states) if states else run


def _runnable(file: Path, exact: bool) -> Path | bytes:
    """What ONNX Runtime's CPU is to run of a model: its file, or if it has products in bfloat16, another model.

    With `exact`, without the attribute that lets products with quantised weights round their inputs.
    """
    import onnx

    from matexport.runtimes.bfloat16 import without_bfloat16

    model = onnx.load(file, load_external_data=False)
    changed = without_bfloat16(model)
    for node in model.graph.node if exact else ():
        kept = [attribute for attribute in node.attribute if attribute.name != "accuracy_level"]
        if len(kept) < len(node.attribute):
            changed = True
            del node.attribute[:]
            node.attribute.extend(kept)
    return model.SerializeToString() if changed else file


def _with_positions(run: Forward) -> Forward:
    """The same with the positions of new tokens, from a mask of all tokens so far that hides none."""
    import numpy as np

    def positioned(inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        (batch, new), total = inputs["input_ids"].shape, inputs["attention_mask"].shape[1]
        return run({**inputs, "position_ids": np.tile(np.arange(total - new, total), (batch, 1))})

    return positioned


def _decode(
    run: Forward, states: Sequence[tuple[str, list[int | str], str]], inputs: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Logits and states of one run, and of prefills of some of the tokens followed by single steps that pass states on.

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
    return found


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
