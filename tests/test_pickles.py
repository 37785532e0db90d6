"""Pickled weights: read without torch and without running anything, whatever is in them."""

from __future__ import annotations

import io
import pickle
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matexport import pickles
from matexport.checkpoint import open_checkpoint
from matexport.errors import CheckpointError
from matexport.pickles import read_pickled
from support import content, language_config, language_tensors, matexport, write_checkpoint

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def saved(path: Path, state: Any, **options: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    torch.save(state, path, **options)
    return path


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    """A language model as the authors release it: one pickle, the head sharing the embedding's storage."""
    config = language_config()
    state = OrderedDict((name, torch.from_numpy(array)) for name, array in language_tensors(config).items())
    state["lm_head.weight"] = state["backbone.embedding.weight"]
    folder = write_checkpoint(tmp_path / "pickled", config, {"x": np.zeros(1, np.float32)})
    (folder / "model.safetensors").unlink()
    saved(folder / "pytorch_model.bin", state)
    return folder


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {
        "a": (10 * torch.randn(3, 5)).to(dtype),
        "b": torch.ones((), dtype=dtype),
        "e": torch.zeros(0, 4, dtype=dtype),
    }
    (tmp_path / "config.json").write_text("{}")
    saved(tmp_path / "pytorch_model.bin", state)
    checkpoint = open_checkpoint(tmp_path, allow_pickle=True)
    for name, tensor in state.items():
        got = checkpoint.read(name)
        want = tensor.view(torch.int16).numpy() if dtype is torch.bfloat16 else tensor.numpy()
        assert got.shape == want.shape
        assert got.tobytes() == want.tobytes()


def test_as_torch_reads_it(pickled: Path) -> None:
    checkpoint = open_checkpoint(pickled, allow_pickle=True)
    state = torch.load(pickled / "pytorch_model.bin", weights_only=True)
    assert set(checkpoint.tensors) == set(state)
    assert all(np.array_equal(checkpoint.read(name), tensor.numpy()) for name, tensor in state.items())
    starts = {checkpoint.tensors[name].start for name in ("lm_head.weight", "backbone.embedding.weight")}
    assert len(starts) == 1  # the tied head is the same bytes


def test_parameters_views_and_metadata(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    module = torch.nn.Linear(3, 2)
    state = module.state_dict()  # an OrderedDict with a _metadata attribute
    state["rows"] = base[1:3]
    state["parameter"] = torch.nn.Parameter(base.clone())
    path = saved(tmp_path / "m.bin", state)
    tensors = read_pickled(path)
    assert tensors["rows"].shape == (2, 6)
    assert path.read_bytes()[tensors["rows"].start :][: tensors["rows"].nbytes] == base[1:3].numpy().tobytes()
    assert tensors["weight"].shape == (2, 3)
    with pytest.raises(CheckpointError, match="not contiguous"):
        read_pickled(saved(tmp_path / "t.bin", {"t": base.T}))


def test_the_command_line(pickled: Path, tmp_path: Path) -> None:
    refused = matexport("slice", "-m", pickled, "-o", tmp_path / "out")
    assert refused.code == 4
    assert "--allow-pickle" in refused.stderr
    (pickled / "slices.csv").write_text("name,Mamba Dims\nhalf,32\n")
    command = ["slice", "-m", pickled, "-s", "half", "-o", tmp_path / "out", "--allow-pickle"]
    assert matexport(*command).code == 0
    assert matexport("slices", "-m", pickled, "--allow-pickle").code == 0
    verified = matexport("verify", "-m", tmp_path / "out", "--source", pickled, "--allow-pickle")
    assert verified.code == 0, verified
    config = language_config()
    plain = write_checkpoint(tmp_path / "plain", config, language_tensors(config))
    (plain / "slices.csv").write_text("name,Mamba Dims\nhalf,32\n")
    assert matexport("slice", "-m", plain, "-s", "half", "-o", tmp_path / "same").code == 0
    names = ("config.json",)
    assert all(content(tmp_path / "out")[name] == content(tmp_path / "same")[name] for name in names)
    one, two = open_checkpoint(tmp_path / "out"), open_checkpoint(tmp_path / "same")
    assert all(np.array_equal(one.read(name), two.read(name)) for name in one.tensors)


# --------------------------------------------------------------------------------------------- hostile
class Evil:
    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.arguments


def archive(path: Path, data: bytes, *, compression: int = zipfile.ZIP_STORED, **entries: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as z:
        z.writestr("archive/data.pkl", data)
        for name, value in entries.items():
            z.writestr(f"archive/{name}", value)
    return path


def refused(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read_pickled(path)
    assert str(path) in str(caught.value)
    assert "fix:" in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        Evil(eval, "open('owned', 'w')"),
        Evil(open, "owned", "w"),
        Evil(getattr, [], "append"),
        Evil(torch.zeros, 3),
        {"a": Evil(pickle.loads, b"")},
    ],
    ids=["eval", "open", "getattr", "torch.zeros", "nested"],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_globals_that_could_run_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: Any, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(archive(tmp_path / "evil.bin", pickle.dumps(value, protocol)), "needs the global .*, which could run code")
    assert not (tmp_path / "owned").exists()


def test_known_globals_stay_harmless(tmp_path: Path) -> None:
    """REDUCE and BUILD with the few globals that are known: nothing but data comes of it."""
    for data in (
        b"ctorch\nFloatStorage\n(tR.",  # calls a string
        b"ccollections\nOrderedDict\n(](K\x01K\x02etR.",
        b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x02K\x03K\x04tR.",
        b"ctorch._utils\n_rebuild_parameter\n(K\x01K\x02tR.",
        b"}S'a'\nK\x01s.",
        b"N.",
        b"\x80\x02X\xff\xff\xff\x7f",
        b"",
    ):
        refused(archive(tmp_path / "odd.bin", data), "damaged pickle|no state dict|not a tensor|torch.save wrote")


def test_a_memo_index_costs_no_memory(tmp_path: Path) -> None:
    """Ten bytes that make a table-based memo grow to gigabytes."""
    tracemalloc.start()
    refused(archive(tmp_path / "memo.bin", b"Nr\x00\x00\x00\x08."), "no state dict")
    refused(archive(tmp_path / "memo.bin", b"Nr\xff\xff\xff\xff."), "no state dict")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 << 20


def test_zip_bombs_and_compression(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = archive(tmp_path / "bomb.bin", b"\0" * (70 << 20), compression=zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 200_000
    refused(bomb, "compressed or larger")
    state = saved(tmp_path / "plain.bin", {"a": torch.zeros(1000)})
    with zipfile.ZipFile(state) as z, zipfile.ZipFile(tmp_path / "packed.bin", "w") as out:
        for info in z.infolist():
            kind = zipfile.ZIP_DEFLATED if "/data/" in info.filename else zipfile.ZIP_STORED
            out.writestr(info.filename, z.read(info), kind)
    refused(tmp_path / "packed.bin", "compressed")
    monkeypatch.setattr(pickles, "MAX_ENTRIES", 2)
    refused(state, "holds no state dict")


def test_truncated_and_foreign_files(tmp_path: Path) -> None:
    whole = saved(tmp_path / "m.bin", {"a": torch.zeros(1000)}).read_bytes()
    for length in (0, 10, 500, len(whole) // 2, len(whole) - 10):
        (tmp_path / "cut.bin").write_bytes(whole[:length])
        refused(tmp_path / "cut.bin", "torch.save wrote")
    torch.save({"a": torch.zeros(3)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    refused(tmp_path / "old.bin", "torch.save wrote")
    archive(tmp_path / "big.bin", pickle.dumps({}), byteorder=b"big")
    refused(tmp_path / "big.bin", "big-endian")
    refused(tmp_path / "nothing.bin", "No such file")
    refused(saved(tmp_path / "list.bin", [torch.zeros(3)]), "no state dict")
    refused(saved(tmp_path / "nested.bin", {"model": {"a": torch.zeros(3)}}), "'model' is not a tensor")


def rebuilt(offset: int, shape: tuple[int, ...], stride: tuple[int, ...], count: int) -> bytes:
    """A pickle with one tensor of a storage that says it has `count` elements."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", count) if isinstance(value, Evil) else None

    class Global:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (Evil(print), offset, shape, stride, False, OrderedDict())

    out = io.BytesIO()
    Pickler(out, 2).dump({"a": Global()})
    return out.getvalue()


@pytest.mark.parametrize(
    ("offset", "shape", "stride", "count", "message"),
    [
        (0, (4,), (1,), 4, None),
        (1, (4,), (1,), 4, "outside its storage"),
        (0, (5,), (1,), 5, "outside its storage"),  # the entry has 16 bytes
        (0, (2**40, 2**40), (2**40, 1), 4, "outside its storage"),
        (-1, (4,), (1,), 4, "damaged pickle|torch.save wrote"),
        (0, (-4,), (1,), 4, "damaged pickle|torch.save wrote"),
        (0, (2, 2), (1, 2), 4, "not contiguous"),
        (0, (4,), (0,), 4, "not contiguous"),
    ],
)
def test_tensors_outside_their_storage(
    tmp_path: Path, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], count: int, message: str | None
) -> None:
    path = archive(
        tmp_path / "m.bin", rebuilt(offset, shape, stride, count), **{"data/0": struct.pack("<4f", 1, 2, 3, 4)}
    )
    if message is None:
        assert read_pickled(path)["a"].shape == (4,)
    else:
        refused(path, message)


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_random_bytes_never_crash(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.bin"
    for make in (
        lambda: path.write_bytes(data),
        lambda: archive(path, data),
        lambda: archive(path, b"}" + data + b"."),
    ):
        make()
        with pytest.raises(CheckpointError):
            read_pickled(path)
