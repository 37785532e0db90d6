"""How fast an ONNX model runs: each model in a process of its own, all of them measured in turns.

A process answers requests, one JSON line each: `{"prefill": 128}` with the seconds that 128 tokens take from empty
states, `{"decode": 16}` with those of a step (after 16 tokens), `{"images": 8}` with those of a batch of 8: medians of
a few in a row, because after others of another size ONNX Runtime may have to ask for memory anew.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matexport.errors import InputError

Times = dict[str, list[float]]  # what -> seconds, in the order of the rounds


class Subject:
    """One model, open in a process of its own.

    Raises:
        InputError: it cannot be opened, or has inputs that are not understood.
    """

    def __init__(self, model: Path, *, threads: int, library: bool):
        self.model = model
        command = [sys.executable, "-m", "matexport.runtimes.bench", str(model), str(threads), str(int(library))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.opened = self._read()

    def ask(self, **request: int) -> dict[str, Any]:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            _, error = self._process.communicate()
            last = error.strip().splitlines()[-1] if error.strip() else f"ended with {self._process.returncode}"
            fix = "matexport verify says whether it is sound"
            raise InputError(f"cannot be measured: {last}", where=str(self.model), fix=fix)
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def measure(
    models: Sequence[Path],
    *,
    lengths: Sequence[int],
    batches: Sequence[int],
    rounds: int,
    threads: int = 1,
    library: bool = True,
    progress: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Measures models in turns.

    Args:
        lengths: tokens of a prompt, for language models.
        batches: images at once, for vision.
        threads: inside an operator; 0 leaves the choice to ONNX Runtime.
        library: with the kernels of matexport-plugins.
    Returns:
        For each model `load_seconds`, `peak_mib`, and `rates`: per second, by name, one for each round.
    Raises:
        InputError: a model cannot be run, or they are not of one kind.
    """
    subjects: list[Subject] = []
    try:
        for model in models:
            progress(f"opening {model}")
            subjects.append(Subject(model, threads=threads, library=library))
        kinds = {subject.opened["kind"] for subject in subjects}
        if len(kinds) > 1:
            raise InputError("is not of the same kind as the first", where=str(models[1]), fix="compare like with like")
        requests = _requests(kinds.pop(), lengths, batches)
        rates: list[Times] = [{name: [] for name in requests} for _ in subjects]
        for k in range(-1, rounds):  # the first one warms up
            progress(f"round {k + 1} of {rounds}" if k >= 0 else "warming up")
            for name, (request, count) in requests.items():
                for found, subject in _turned(list(zip(rates, subjects, strict=True)), k):
                    seconds = subject.ask(**request)["seconds"]
                    if k >= 0:
                        found[name].append(count / seconds)
        return [
            {"model": str(s.model), "load_seconds": s.opened["seconds"], **s.ask(memory=1), "rates": found}
            for s, found in zip(subjects, rates, strict=True)
        ]
    finally:
        for subject in subjects:
            subject.close()


def _turned(items: Sequence[Any], k: int) -> Iterable[Any]:
    """The same, beginning with another one each time."""
    k %= len(items)
    return [*items[k:], *items[:k]]


def _requests(kind: str, lengths: Sequence[int], batches: Sequence[int]) -> dict[str, tuple[dict[str, int], int]]:
    """What is asked for, and how many tokens or images that is."""
    if kind == "vision":
        return {f"images/s, batch {n}": ({"images": n}, n) for n in batches}
    found = {f"prefill tokens/s, {n} tokens": ({"prefill": n}, n) for n in lengths}
    return {**found, "decode tokens/s": ({"decode": 16}, 1)}


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


# ------------------------------------------------------------------------------------ in the process
def _serve(model: Path, threads: int, library: bool) -> None:
    import numpy as np
    import onnxruntime as ort

    from matexport.runtimes.ort import kernels

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    # idle threads would take a core from the model that is measured next
    options.add_session_config_entry("session.force_spinning_stop", "1")
    path = kernels() if library else None
    if path:
        options.register_custom_ops_library(str(path))
    started = time.perf_counter()
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    _answer(seconds=time.perf_counter() - started, kind=_kind([i.name for i in session.get_inputs()]))
    names = [output.name for output in session.get_outputs()]
    random = np.random.default_rng(0)
    shapes = {i.name: i.shape for i in session.get_inputs()}
    types = {i.name: np.dtype(np.float16 if "float16" in i.type else np.float32) for i in session.get_inputs()}
    states = {n: s for n, s in shapes.items() if n.startswith("past_")}
    vocabulary = next(o.shape[-1] for o in session.get_outputs() if o.name == "logits")

    def run(feed: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
        started = time.perf_counter()
        found = session.run(names, dict(feed))
        return time.perf_counter() - started, dict(zip(names, found, strict=True))

    def step(length: int, past: int, carried: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
        ids = random.integers(0, vocabulary, (1, length))
        feed = {"input_ids": ids, "attention_mask": np.ones((1, past + length), np.int64), **carried}
        feed |= {"position_ids": np.arange(past, past + length)[None]} if "position_ids" in shapes else {}
        return run(feed)

    def empty() -> dict[str, Any]:
        """States of one sequence before its first token: axes that grow are 0 long."""
        return {n: np.zeros([1, *(d if isinstance(d, int) else 0 for d in s[1:])], types[n]) for n, s in states.items()}

    for line in sys.stdin:
        request = json.loads(line)
        if "images" in request:
            shape = [request["images"], *shapes["pixel_values"][1:]]
            images = {"pixel_values": random.standard_normal(shape, dtype=np.float32)}
            _answer(seconds=statistics.median(run(images)[0] for _ in range(3)))
        elif "prefill" in request:
            _answer(seconds=statistics.median(step(request["prefill"], 0, empty())[0] for _ in range(3)))
        elif "decode" in request:
            prompt, steps = request["decode"], []
            _, out = step(prompt, 0, empty())
            for past in range(prompt, prompt + 8):
                seconds, out = step(1, past, {n: out[n.replace("past_key_values", "present", 1)] for n in states})
                steps.append(seconds)
            _answer(seconds=statistics.median(steps))
        else:
            status = Path("/proc/self/status").read_text().splitlines()
            fields = {key: int(value.split()[0]) for key, value in (x.split(":", 1) for x in status if "kB" in x)}
            _answer(peak_mib=fields["VmHWM"] / 1024, anonymous_mib=fields["RssAnon"] / 1024)


def _kind(inputs: Sequence[str]) -> str:
    if "pixel_values" in inputs:
        return "vision"
    if "input_ids" in inputs:
        return "language"
    raise SystemExit(f"inputs {', '.join(inputs)} are neither images nor tokens")


def _answer(**values: Any) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1")
