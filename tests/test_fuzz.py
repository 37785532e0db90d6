"""Whatever is in a table, a header, an index or a config.json: it is used or refused, and nothing else happens.

Fixed budgets and seeds. "Nothing else" is no other exception, no endless loop, no memory that a few bytes ask for.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import math
import signal
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

import matexport as mx
from faults import bounded_memory
from gemma import multimodal_checkpoint, text_checkpoint
from matexport.checkpoint import Checkpoint, open_checkpoint, read_header
from matexport.dims import Dims
from matexport.errors import CheckpointError, MatexportError
from matexport.families import family_of
from matexport.manifest import json_bytes
from matexport.planning import Plan, PlannedTensor, whole
from matexport.slice_table import Row, format_table, parse_table
from matexport.tensors import Tensor
from matexport.writer import safetensors_header
from support import language_checkpoint, vision_checkpoint

quietly = settings(
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],  # what fails is not made smaller: that has no fixed budget
    suppress_health_check=list(HealthCheck),
)
budget = settings(quietly, max_examples=300)
budget_of_each_config = settings(quietly, max_examples=150)  # of four


@contextlib.contextmanager
def survived(count: Counter[str], *, seconds: float = 5, memory: int = 1 << 28) -> Iterator[None]:
    """Lets only an error with exit code 2 or 4 pass, and bounds processor time and memory."""

    def late(*_: object) -> None:
        raise TimeoutError

    old = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    refused: MatexportError | None = None
    try:
        with bounded_memory(memory):
            yield
    except MatexportError as e:
        refused = e
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, old)
    count["refused" if refused else "used"] += 1
    if refused:
        assert refused.exit_code in (2, 4), refused
        assert "fix: " in str(refused)
        assert str(refused).encode()  # can be printed


def finds_both(target: Callable[[Counter[str]], Callable[[], None]], share: float = 0.03) -> None:
    """Runs a target, which must use some of its examples and refuse others: else it tests nothing."""
    count: Counter[str] = Counter()
    target(count)()
    assert min(count["used"], count["refused"]) > share * sum(count.values()), count


def test_the_harness_sees_what_is_wrong() -> None:
    """Negative control: other exceptions, other exit codes, memory and time."""
    count: Counter[str] = Counter()
    with pytest.raises(ZeroDivisionError), survived(count):
        _ = 1 // 0
    with pytest.raises(AssertionError), survived(count):
        raise MatexportError("an exit code of 1", fix="none")
    with pytest.raises(MemoryError), survived(count):
        bytearray(1 << 30)
    with pytest.raises(TimeoutError), survived(count, seconds=0.01):
        sum(1 for _ in itertools.count())
    with pytest.raises(AssertionError):
        finds_both(lambda count: lambda: count.update(used=1000))
    with survived(count):
        raise CheckpointError("refused", fix="none")
    assert count == {"refused": 2}


# -------------------------------------------------------------------------------------- slice tables
CELLS = [
    "8192", "[8, ...]", "[8] * 3 + [4]", "2_048 * 4", "[1, 2, ..., 9]", "[20, 21]", "[]", "1.91", "62.30%", "", " ",
    "2**9**9", "[1] * 900", "[1] * 100001", "[1] * 99999 + [2] * 99999", "1" * 5000, "[" * 500, "0x1", "-1", "=1+1",
    "@x", "'", "''=1", "__import__('os')", "name", "a", "b", "\ufeff", "\u202e", "\x1b[0m", "…", "[8, …]", "1e99",
    "١", "nan", "+", "\r", "\n",
]  # fmt: skip
TITLES = ["name", "Name ", "# Layers", "# Effective Params (B)", "FFN Hidden Dims", "Layers Skipped", "Mamba Dims",
          "Mamba Dim", "Accuracy", "", "names", "x" * 50, "'=x", "=x"]  # fmt: skip


@st.composite
def tables(draw: st.DrawFn) -> str:
    """CSV text: mostly of the right form, then damaged here and there."""
    titles = draw(st.lists(st.sampled_from(TITLES), min_size=1, max_size=5, unique=True))
    cell = st.one_of(st.sampled_from(CELLS), st.text(max_size=8))
    rows = draw(st.lists(st.lists(cell, min_size=1, max_size=6), min_size=1, max_size=4))
    quoted = draw(st.sampled_from([True, True, True, False]))
    lines = [["name", *titles[1:]] if draw(st.integers(0, 5)) else titles, *rows]
    end = draw(st.sampled_from(["\n", "\r\n", "\r", "\n\n"]))
    text = end.join(",".join('"' + c.replace('"', '""') + '"' if quoted else c for c in line) for line in lines) + end
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.sampled_from(['"', ",", "\n", "\r", "\0", "'", "\ufeff", ""])) + text[at + 1 :]
    return text


def test_tables() -> None:
    def target(count: Counter[str]) -> Callable[[], None]:
        @given(tables())
        @budget
        def check(text: str) -> None:
            with survived(count):
                rows = parse_table(text, "t.csv").rows
                assert len({row.name for row in rows}) == len(rows) > 0
                assert parse_table(format_table(rows)).rows == rows

        return check

    finds_both(target)


# -------------------------------------------------------------------------------------- JSON values
numbers = st.sampled_from([0, 1, 2, 3, -1, 7, 255, 99_999, 2**20, 2**31 - 1, 2**31, 2**47, 2**62, 2**63, 2**64, 10**30])
scalars = st.one_of(
    numbers,
    st.sampled_from([None, True, False, 0.0, 1.5, -0.5, 1e308, float("nan"), float("inf"), "", "x", "\ud800", "\0"]),
    st.sampled_from(["F32", "BF16", "F8_E4M3", "I64", "full_attention", "bfloat16", "../x", "x" * 300]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["a", "shape", ""]), inner, max_size=2),
    max_leaves=6,
)
path_steps = st.lists(st.integers(0, 60), min_size=1, max_size=3)
edits = st.lists(st.tuples(path_steps, st.sampled_from(["set", "set", "add", "drop", "near"]), values), max_size=3)


def edited(value: Any, changes: list[tuple[list[int], str, Any]], keys: list[str]) -> Any:
    """JSON with some values replaced, dropped or added; `keys` are names that are worth adding."""
    value = copy.deepcopy(value)
    for path, how, new in changes:
        place = value
        for step in path[:-1]:
            inside = place.values() if isinstance(place, dict) else place
            inner = [v for v in inside if isinstance(v, dict | list) and v]
            place = inner[step % len(inner)] if inner else place
        names = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not names:
            continue
        name = names[path[-1] % len(names)]
        if how == "drop":
            del place[name]
        elif how == "add" and isinstance(place, dict):
            place[keys[path[-1] % len(keys)]] = new
        elif how == "near" and type(place[name]) is int:
            place[name] += path[-1] % 3 - 1
        else:
            place[name] = new
    return value


# -------------------------------------------------------------------------------------- safetensors
ARRAYS = {"a": np.ones((2, 3), "f4"), "b": np.ones(4, "f2"), "c": np.ones((1, 2, 1), "i8"), "d": np.ones((), "u1")}


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A safetensors file with another header, length, data or some other bytes."""
    whole = save(ARRAYS)
    length = struct.unpack("<Q", whole[:8])[0]
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    text = json.dumps(edited(header, draw(edits), ["__metadata__", "a", "e", "\ud800"])).encode()
    text = draw(st.sampled_from([b"", b"", b"", b" ", b"\0", b"\xff"])) + text + b" " * draw(st.integers(0, 3))
    declared = draw(st.sampled_from([0, 0, 0, 0, 0, 1, -1, -8, 100, 10**9, 2**62])) + len(text)
    found = bytearray(struct.pack("<Q", max(0, declared)) + text + data + bytes(draw(st.sampled_from([0, 0, 0, 1]))))
    for at, bit in draw(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 7)), max_size=1)):
        found[at % len(found)] ^= 1 << bit
    cut = draw(st.sampled_from([0, 0, 0, 0, 1, 7, 30, 10**6]))
    return bytes(found[: max(0, len(found) - cut)])


def check_file(file: Path, count: Counter[str]) -> None:
    """What is read fills the file exactly, has the shapes that the header says, and can be copied."""
    with survived(count):
        tensors = read_header(file)
        position = 8 + struct.unpack("<Q", file.read_bytes()[:8])[0]
        for tensor in tensors.values():
            assert tensor.start == position
            position += tensor.nbytes
        assert position == file.stat().st_size
        checkpoint = open_checkpoint(file.parent)
        assert all(checkpoint.read(name).shape == tensor.shape for name, tensor in tensors.items())
        assert safetensors_header({name: PlannedTensor(t.dtype, whole(t)) for name, t in tensors.items()})


def test_safetensors(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    (tmp_path / "config.json").write_text("{}")

    def target(count: Counter[str]) -> Callable[[], None]:
        @given(files())
        @budget
        def check(content: bytes) -> None:
            file.write_bytes(content)
            check_file(file, count)

        return check

    finds_both(target)


HOSTILE: dict[str, tuple[Any, ...]] = {  # name, shape, dtype
    "many axes": ("a", [2**47 + 1] * 60_000, "U8"),
    "axes of one": ("a", [4, *[1] * 100], "U8"),
    "half a character": ("\ud800", [4], "U8"),
    "a long name": ("x" * 10**6, [4], "U8"),
    "control characters": ("\0\u202e", [4], "U8"),
    "no name": ("", [4], "U8"),
    "a list for a dtype": ("a", [4], []),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_hostile_headers(tmp_path: Path, how: str) -> None:
    name, shape, dtype = HOSTILE[how]
    text = json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": [0, 4]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    (tmp_path / "config.json").write_text("{}")
    check_file(tmp_path / "model.safetensors", Counter())


# -------------------------------------------------------------------------------------- the index
SHARDS = ["x" * 300 + ".safetensors", "x" * 10**6, "x.safetensors\0", "\ud800.safetensors"]


@pytest.mark.parametrize("shard", SHARDS, ids=range(len(SHARDS)))
def test_hostile_names_of_shards(tmp_path: Path, shard: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    count: Counter[str] = Counter()
    with survived(count):
        open_checkpoint(tmp_path)
    assert count["refused"]


def test_indexes(tmp_path: Path) -> None:
    index = {"metadata": {"total_size": 90}, "weight_map": {}}
    for shard, names in {"x": "ab", "y": "cd"}.items():
        save_file({name: ARRAYS[name] for name in names}, tmp_path / f"{shard}.safetensors")
        index["weight_map"] |= dict.fromkeys(names, f"{shard}.safetensors")
    (tmp_path / "config.json").write_text("{}")
    shards = ["x.safetensors", "y.safetensors", "z.safetensors", "../x.safetensors", "/etc/passwd", "x" * 300, "con"]

    def target(count: Counter[str]) -> Callable[[], None]:
        @given(edits, st.integers(0, 200), st.sampled_from([b"", b"", b"", b"\0", b"}", b"[" * 9000]))
        @budget
        def check(changes: list[Any], at: int, junk: bytes) -> None:
            changes = [(p, how, shards[p[0] % len(shards)] if p[0] % 2 else new) for p, how, new in changes]
            found = edited(index, changes, ["weight_map", "e", "a", "__metadata__"])
            text = json.dumps(found).encode()
            (tmp_path / "model.safetensors.index.json").write_bytes(text[:at] + junk + text[at:] if junk else text)
            with survived(count):
                checkpoint = open_checkpoint(tmp_path)
                assert {n: t.file.name for n, t in checkpoint.tensors.items()} == found["weight_map"]

        return check

    finds_both(target)


# -------------------------------------------------------------------------------------- config.json
def check_plan(checkpoint: Checkpoint, plan: Plan) -> None:
    """Every view lies inside its tensor; the plan can be written, and what it makes is a model again."""
    for name, tensor in plan.tensors.items():
        source = checkpoint.tensors[tensor.view.source]
        assert math.prod(tensor.view.view_shape) == math.prod(source.shape), name
        assert tensor.nbytes <= source.nbytes
        for length, ranges in zip(tensor.view.view_shape, tensor.view.ranges, strict=True):
            assert all(0 <= start < stop <= length for start, stop in ranges), name
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))).tensors == plan.tensors
    config = json.loads(json_bytes(plan.config))
    made = {n: Tensor(n, t.dtype, t.shape, checkpoint.path / "x", 0) for n, t in plan.tensors.items()}
    again = Checkpoint(checkpoint.path, config, made)
    replanned = family_of(again).plan_slice(again, Row("again"), None)
    assert {n: t.shape for n, t in replanned.tensors.items()} == {n: t.shape for n, t in plan.tensors.items()}


GEMMA_KEYS = ["text_config", "quantization_config", "auto_map", "attention_bias", "tie_word_embeddings", "layer_types",
              "activation_sparsity_pattern", "dtype", "vision_config", "model_type"]  # fmt: skip
MATMAMBA_KEYS = ["ssm_cfg", "auto_map", "tie_word_embeddings", "norm_epsilon", "pool", "rms_norm", "ngroups",
                 "chunk_size", "dt_limit", "pad_vocab_size_multiple", "quantization_config", "model_type"]  # fmt: skip
LAYERS = {
    "num_hidden_layers": 99_999,
    "intermediate_size": 16,
    "layer_types": None,
    "activation_sparsity_pattern": None,
}
SOURCES: dict[str, tuple[Callable[[Path], Path], list[str], list[Row], list[dict[str, Any]]]] = {
    "gemma3n": (
        lambda folder: text_checkpoint(folder, "ssfsf", shared=2, width=16),
        GEMMA_KEYS,
        [Row("whole"), Row("cut", skipped=(0,), ffn=Dims(fill=8))],
        [{"text_config": None}, {"text_config": [1]}, {"altup_num_inputs": 2**31 - 1}, LAYERS,
         {"num_hidden_layers": 2**31}, {"vocab_size": 2**31 - 1}, {"activation_sparsity_pattern": 1e300}],
    ),
    "gemma3n multimodal": (
        lambda folder: multimodal_checkpoint(folder, "ssfsf", shared=2, width=16),
        GEMMA_KEYS,
        [Row("whole"), Row("cut", skipped=(3, 4), ffn=Dims(head=(8,), fill=4))],
        [{"text_config": {}}, {"torch_dtype": []}, {"num_hidden_layers": 3}],
    ),
    "matmamba vision": (
        lambda folder: vision_checkpoint(folder, n_layer=2),
        MATMAMBA_KEYS,
        [Row("whole"), Row("cut", skipped=(1,), mamba=Dims(fill=8))],
        [{"n_layer": 2**31}, {"image_size": 2**20}, {"n_classes": 2**20}, {"ssm_cfg": None}],
    ),
    "matmamba": (
        lambda folder: language_checkpoint(folder, n_layer=2),
        MATMAMBA_KEYS,
        [Row("whole"), Row("cut", mamba=Dims(head=(8, 64)))],
        [{"n_layer": 2**20}, {"vocab_size": 2**20}, {"pad_vocab_size_multiple": 2**62}, {"ssm_cfg": {"ngroups": 0}}],
    ),
}  # fmt: skip


def check_config(
    source: Path, config: dict[str, Any], row: Row, count: Counter[str], options: Sequence[str] = ()
) -> None:
    (source / "config.json").write_text(json.dumps(config))
    with survived(count):
        planned = mx.plan(source, row, options=options, dtype="float16" if options else None)
        check_plan(planned.checkpoint, planned.plan)


@pytest.mark.parametrize(
    ("kind", "number"), [(kind, number) for kind, found in SOURCES.items() for number in range(len(found[3]))]
)
def test_hostile_configs(tmp_path: Path, kind: str, number: int) -> None:
    make, _, rows, hostile = SOURCES[kind]
    source = make(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    check_config(source, {**config, **hostile[number]}, rows[0], Counter())


@pytest.mark.parametrize("kind", SOURCES)
def test_configs(tmp_path: Path, kind: str) -> None:
    make, keys, rows, _ = SOURCES[kind]
    source = make(tmp_path / "source")
    options = [[], *([name] for name in mx.plan(source).family.OPTIONS)]
    config = json.loads((source / "config.json").read_text())

    def target(count: Counter[str]) -> Callable[[], None]:
        @given(edits, st.sampled_from(rows), st.sampled_from(options))
        @budget_of_each_config
        def fuzz(changes: list[Any], row: Row, options: list[str]) -> None:
            check_config(source, edited(config, changes, keys), row, count, options)

        return fuzz

    finds_both(target)
