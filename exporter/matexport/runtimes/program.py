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

    def tokens(self, ids: np.ndarray, total: int) -> dict[str, np.ndarray]:
        """The inputs of new tokens, (batch, new), of `total` so far, none of which is hidden."""
        import numpy as np

        batch, new = ids.shape
        found = {
            "input_ids": ids,
            "attention_mask": np.ones((batch, total), np.int64),
            "position_ids": np.tile(np.arange(total - new, total), (batch, 1)),
        }
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

    return Program(inputs, programs[-1].outputs, run)


def forward(program: Program) -> Forward:
    """The function of a program. One with states is also run step by step: see `decode@` in `matexport.families`."""
    return partial(_decode, program) if program.states else program.run


def _decode(program: Program, inputs: Arrays) -> dict[str, np.ndarray]:
    """Logits and states of one run, and of prefills of some of the tokens followed by single steps that pass states on.

    Splits of which the program does not take the pieces are left out.
    """
    import numpy as np

    ids = np.asarray(inputs["input_ids"], np.int64)
    batch, length = ids.shape
    zeros = program.zeros(batch)
    whole = program.run({**program.tokens(ids, length), **zeros})
    found = {"logits": whole["logits"], **program.after(whole)}
    for split in splits(length):
        first = {**program.tokens(ids[:, :split], split), **zeros}
        if not program.takes({name: array.shape for name, array in first.items()}):
            continue
        out = program.run(first)
        pieces = [out["logits"]]
        for t in range(split, length):
            carried = {past: out[new] for past, new in program.states.items()}
            step = {**program.tokens(ids[:, t : t + 1], t + 1), **carried}
            if not program.takes({name: array.shape for name, array in step.items()}):
                break
            out = program.run(step)
            pieces.append(out["logits"])
        if len(pieces) == 1 + length - split:
            found[f"decode@{split}.logits"] = np.concatenate(pieces, 1)
            found |= {f"decode@{split}.{kind}": array for kind, array in program.after(out).items()}
    return found


def _is_fixed(value: Value) -> bool:
    return all(isinstance(n, int) for n in value.shape[1:])
