"""An opened artefact, whatever runs it; and how a language model is run: at once, and step by step from states."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from matexport.families import splits

if TYPE_CHECKING:
    import numpy as np

Arrays = Mapping[str, "np.ndarray"]
Forward = Callable[[Arrays], Arrays]
TOKENS = ("input_ids", "attention_mask", "position_ids")


@dataclass(frozen=True)
class Value:
    """An input: its NumPy type, and its shape, in which what is not a number is not fixed."""

    dtype: np.dtype[Any]
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Program:
    """What goes in and comes out, in order, and how to run it once.

    States come after the tokens, their mask and positions; the new ones after the logits, in the same order.

    Attributes:
        takes: whether inputs of these shapes can be given.
    """

    inputs: Mapping[str, Value]
    outputs: tuple[str, ...]
    run: Forward
    takes: Callable[[Mapping[str, tuple[int, ...]]], bool] = lambda shapes: True

    @property
    def states(self) -> dict[str, str]:
        """The state inputs, and the output of each that is its new value."""
        return dict(zip((name for name in self.inputs if name not in TOKENS), self.outputs[1:], strict=False))

    def zeros(self, batch: int) -> dict[str, np.ndarray]:
        """The states before the first token. What is not all fixed is a cache, empty at first."""
        import numpy as np

        return {
            past: np.zeros([batch, *(n if isinstance(n, int) else 0 for n in value.shape[1:])], value.dtype)
            for past, value in self.inputs.items()
            if past in self.states
        }

    def tokens(self, ids: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
        """The inputs of new tokens (batch, new), with a mask of all so far (batch, total); padding has no position."""
        import numpy as np

        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        found = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        return {name: array.astype(self.inputs[name].dtype) for name, array in found.items() if name in self.inputs}

    def after(self, outputs: Arrays) -> dict[str, np.ndarray]:
        """The new states of all layers, one vector a kind: those of fixed size are convolution's and scan's in turn."""
        import numpy as np

        fixed = [new for past, new in self.states.items() if _is_fixed(self.inputs[past])]
        kinds = {"states.conv": fixed[::2], "states.scan": fixed[1::2]} if fixed else {}
        return {kind: np.concatenate([outputs[name].ravel() for name in names]) for kind, names in kinds.items()}


def chain(programs: Sequence[Program]) -> Program:
    """Programs as one, each fed with what is given and what those before it give."""
    if len(programs) == 1:
        return programs[0]
    made: set[str] = set()
    inputs: dict[str, Value] = {}
    for program in programs:
        inputs |= {name: value for name, value in program.inputs.items() if name not in made}
        made |= set(program.outputs)

    def run(given: Arrays) -> dict[str, np.ndarray]:
        known = dict(given)
        for program in programs:
            known |= program.run({name: known[name] for name in program.inputs})
        return {name: known[name] for name in programs[-1].outputs}

    def takes(shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return all(p.takes({name: shape for name, shape in shapes.items() if name in p.inputs}) for p in programs)

    return Program(inputs, programs[-1].outputs, run, takes)


def forward(program: Program) -> Forward:
    """The function of a program. One with states is also run step by step: see `decode@` in `matexport.families`."""
    return partial(_decode, program) if program.states else program.run


def _decode(program: Program, inputs: Arrays) -> dict[str, np.ndarray]:
    """Logits and states of one run, and of prefills of some of the tokens followed by single steps that pass states on;
    logits of prompts of different lengths, padded to one, and of steps after them.

    Splits of which the program does not take the pieces are left out.
    """
    import numpy as np

    ids = np.asarray(inputs["input_ids"], np.int64)
    mask = np.ones_like(ids)
    batch, length = ids.shape
    zeros = program.zeros(batch)
    whole = program.run({**program.tokens(ids, mask), **zeros})
    found = {"logits": whole["logits"], **program.after(whole)}
    for split in splits(length):
        first = {**program.tokens(ids[:, :split], mask[:, :split]), **zeros}
        if not program.takes({name: array.shape for name, array in first.items()}):
            continue
        out = program.run(first)
        pieces = [out["logits"]]
        for t in range(split, length):
            step = _step(program, ids[:, t : t + 1], mask[:, : t + 1], out)
            if not program.takes({name: array.shape for name, array in step.items()}):
                break
            out = program.run(step)
            pieces.append(out["logits"])
        if len(pieces) == 1 + length - split:
            found[f"decode@{split}.logits"] = np.concatenate(pieces, 1)
            found |= {f"decode@{split}.{kind}": array for kind, array in program.after(out).items()}
    for side in ("left", "right") if batch > 1 else ():
        logits = _padded(program, ids, zeros, side)
        found |= {} if logits is None else {f"decode@{side}.logits": logits}
    return found


def _step(program: Program, new: np.ndarray, mask: np.ndarray, out: Arrays) -> dict[str, np.ndarray]:
    """The inputs that go on from the outputs of a run."""
    return {**program.tokens(new, mask), **{past: out[name] for past, name in program.states.items()}}


def _padded(program: Program, ids: np.ndarray, zeros: Arrays, side: str) -> np.ndarray | None:
    """Logits of all tokens (batch, length): of prompts padded on one side, then of a token of each row at a time.

    A row that has no more tokens gets masked ones. None if the program does not take a piece.
    """
    import numpy as np

    batch, length = ids.shape
    rows, longest = np.arange(batch), max(1, length // 2)
    seen = longest - rows % longest  # tokens of each row so far
    token = np.arange(longest) - (longest - seen if side == "left" else 0 * seen)[:, None]
    real = (token >= 0) & (token < seen[:, None])
    mask = real.astype(np.int64)
    feed = {**program.tokens(ids[rows[:, None], token * mask], mask), **zeros}
    places, shown = (np.nonzero(real)[0], token[real]), real
    logits = None
    while program.takes({name: array.shape for name, array in feed.items()}):
        out = program.run(feed)
        logits = np.zeros([batch, length, out["logits"].shape[2]], out["logits"].dtype) if logits is None else logits
        logits[places] = out["logits"][shown]
        live = seen < length
        if not live.any():
            return logits
        mask = np.concatenate([mask, live[:, None].astype(np.int64)], 1)
        feed = _step(program, ids[rows, np.minimum(seen, length - 1)][:, None], mask, out)
        places, shown = (rows[live], seen[live]), live[:, None]
        seen = seen + live
    return None


def _is_fixed(value: Value) -> bool:
    return all(isinstance(n, int) for n in value.shape[1:])
