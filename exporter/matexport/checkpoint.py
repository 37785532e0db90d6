"""Checkpoints: `config.json` and weight files, in a folder or on the Hub, opened by their headers only.

Nothing here reads a weight until it is asked for, and nothing trusts a file: every name, offset and
size is checked before it is used (format: https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from matexport.errors import CheckpointError
from matexport.hub import Repository, is_id, open_repository
from matexport.pickles import read_pickled
from matexport.tensors import DTYPES, Tensor, numpy_dtype

MAX_HEADER, MAX_CONFIG, MAX_INDEX = 100 << 20, 16 << 20, 100 << 20
MAX_AXES = 32

QUANTISED = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2")


class Reader(Protocol):
    """Random access to the bytes of one weight file, wherever it is."""

    @property
    def direct(self) -> int:
        """Runs of at least so many bytes are worth a read each; shorter ones are gathered from whole rows."""

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills `buffer` from `offset`. Raises CheckpointError where the file ends or cannot be read."""

    def will_need(self, spans: Sequence[tuple[int, int]]) -> None:
        """Says which bytes (offset, length) are read next; a reader may fetch them ahead."""

    def close(self) -> None:
        """Gives back what the reader holds."""


class LocalFile:
    """A weight file on a disk."""

    direct = 4096  # a page

    def __init__(self, path: Path):
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDONLY)
        except OSError as e:
            raise CheckpointError(f"cannot be read: {e.strerror}", where=str(path), fix="check the disk") from None

    def read_into(self, buffer: memoryview, offset: int) -> None:
        while len(buffer):
            try:
                count = os.preadv(self.fd, [buffer], offset)
            except OSError as e:
                what = f"reading at byte {offset} failed: {e.strerror}"
                raise CheckpointError(what, where=str(self.path), fix="check the disk") from None
            if not count:
                what, fix = f"ends at byte {offset}, inside a tensor", "the source changed while it was read"
                raise CheckpointError(what, where=str(self.path), fix=fix)
            buffer, offset = buffer[count:], offset + count

    def will_need(self, spans: Sequence[tuple[int, int]]) -> None:
        for offset, _ in spans[-1:]:
            with contextlib.suppress(OSError):  # it would have to wait for the disk, or cannot tell
                if os.preadv(self.fd, [bytearray(1)], offset, os.RWF_NOWAIT):
                    return  # in the page cache already
            for begin, length in spans:
                os.posix_fadvise(self.fd, begin, length, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        os.close(self.fd)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, its config and its tensors by name (in file order).

    Attributes:
        remote: the repository whose snapshot in the cache `path` is; weight files need not be there yet.
        opened: `state` when the headers were read: what a plan is about.
        streams: whether weight files that are not there are read over HTTP rather than downloaded.
    """

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, Tensor]
    remote: Repository | None = None
    streams: bool = False
    opened: tuple[tuple[Any, ...], ...] = ()

    @property
    def name(self) -> str:
        """What people call it: the repository's id, or the folder's name."""
        return self.remote.id if self.remote else self.path.resolve().name

    @property
    def files(self) -> list[Path]:
        """The weight files, in order."""
        return list(dict.fromkeys(tensor.file for tensor in self.tensors.values()))

    def read(self, name: str) -> np.ndarray:
        """One whole tensor (bfloat16 as ml_dtypes' type). Raises CheckpointError if the file is cut short."""
        tensor = self.tensors[name]
        data = np.empty(tensor.nbytes, np.uint8)
        with contextlib.closing(self.open(tensor.file)) as file:
            file.read_into(data.data, tensor.start)
        return data.view(numpy_dtype(tensor.dtype)).reshape(tensor.shape)

    def open(self, file: Path) -> Reader:
        """A reader of one of `files`. Raises CheckpointError."""
        if self.remote and self.streams and not file.exists():
            return self.remote.open(file.name, self.size_of(file))
        return LocalFile(file)

    def fetch(self, tensors: Iterable[str], beside: Iterable[str] = ()) -> None:
        """Downloads what of a repository is not in the cache yet; a folder is left as it is.

        Args:
            tensors: those that are to be read: their weight files, if they are not streamed.
            beside: patterns of other files.

        Raises:
            CheckpointError, MissingError: see `matexport.hub`.
        """
        if self.remote:
            needed = () if self.streams else dict.fromkeys(self.tensors[name].file.name for name in tensors)
            self.remote.fetch(needed, beside)

    def size_of(self, file: Path) -> int:
        """Bytes of one of `files`: where it is not on this disk, the end of its last tensor, as in every shard."""
        if self.remote and not file.exists():
            return max(tensor.start + tensor.nbytes for tensor in self.tensors.values() if tensor.file == file)
        return file.stat().st_size

    def state(self) -> tuple[tuple[Any, ...], ...]:
        """Name, size, modification time (ns) and inode of config.json and the weight files: what changes with them.

        A commit of a repository does not change, but its files may be downloaded meanwhile: they have a size only.

        Raises:
            CheckpointError: a file is gone.
        """
        if self.remote:
            return tuple((file.name, self.size_of(file)) for file in self.files)
        try:
            stats = [(file.name, file.stat()) for file in (self.path / "config.json", *self.files)]
        except OSError as e:
            raise CheckpointError(f"cannot be read: {e.strerror}", where=str(e.filename), fix="open it again") from None
        return tuple((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats)

    def check_unchanged(self) -> None:
        """Raises CheckpointError if a file is another one than when the headers were read."""
        if self.state() != self.opened:
            fix = "run again when it is at rest"
            raise CheckpointError("changed while it was read", where=str(self.path), fix=fix)


def open_checkpoint(path: str | Path, *, allow_pickle: bool = False) -> Checkpoint:
    """Opens a folder with `config.json` and `model.safetensors`, or shards with their index.

    `ORG/NAME[@REVISION]`, where there is no such folder, is a repository on the Hub. With `allow_pickle`, also
    one with `pytorch_model.bin`, which is read without running anything.

    Raises:
        CheckpointError: file and tensor that are missing, damaged or not supported, and the fix.
        MissingError: the Hub cannot be reached, or the repository is not open to this user.
    """
    folder, remote = Path(path), None
    if not folder.exists() and is_id(str(path)):
        remote = open_repository(str(path))
        folder = remote.folder
    elif not folder.is_dir():
        fix = "give a checkpoint's folder, or ORG/NAME[@REVISION] on the Hub"
        raise CheckpointError("is not a folder", where=str(path), fix=fix)

    def has(name: str) -> bool:
        return (folder / name).is_file() or (remote is not None and remote.size(name) is not None)

    config = read_json(folder / "config.json", MAX_CONFIG)
    _refuse_quantised(folder, config)
    index, single, pickled = "model.safetensors.index.json", "model.safetensors", "pytorch_model.bin"
    if (folder / index).is_file():
        tensors = _read_shards(folder / index, remote)
    elif has(single):
        tensors = read_header(folder / single, remote)
    elif has(pickled):
        if not allow_pickle:
            what, fix = f"holds only pickled weights ({pickled})", "read them with --allow-pickle: no code is run"
            raise CheckpointError(what, where=str(path), fix=fix)
        if remote:
            remote.fetch([pickled])
        tensors = read_pickled(folder / pickled)
    else:
        others = sorted(p.name for p in folder.glob("*.safetensors"))
        what, fix = "has no model.safetensors", "give a model with config.json and safetensors files"
        if others:
            what, fix = f"has no {index}", f"put the index of {others[0]} beside it"
        raise CheckpointError(what, where=str(path), fix=fix)
    checkpoint = Checkpoint(folder, config, tensors, remote)
    return replace(checkpoint, opened=checkpoint.state())


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """A JSON object of at most `limit` bytes, every key used once. Raises CheckpointError."""
    try:
        with path.open("rb") as f:
            data = f.read(limit + 1)
    except OSError as e:
        raise CheckpointError(
            f"cannot be read: {e.strerror}", where=str(path), fix="give a checkpoint's folder"
        ) from None
    if len(data) > limit:
        raise CheckpointError(f"is larger than {limit >> 20} MiB", where=str(path), fix="this is not such a file")
    return parse_json(data, str(path))


def parse_json(data: bytes | bytearray, where: str) -> dict[str, Any]:
    """A JSON object without repeated keys; too deep a nesting is an error, not a crash. Raises CheckpointError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key occurs twice")
        return found

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"is not JSON: {e}", where=where, fix="download the file again") from None
    if not isinstance(value, dict):
        raise CheckpointError("is not a JSON object", where=where, fix="download the file again")
    return value


def _refuse_quantised(folder: Path, config: dict[str, Any]) -> None:
    if "quantization_config" in config:
        raise CheckpointError(
            "is quantised ('quantization_config'): its weights cannot be cut by index",
            where=str(folder / "config.json"),
            fix="use the unquantised (bf16 or fp32) checkpoint",
        )


# ------------------------------------------------------------------------------------- safetensors
def read_header(path: Path, remote: Repository | None = None) -> dict[str, Tensor]:
    """The tensors of one safetensors file, sorted by offset, after checking that they fill it exactly.

    A file that is not there is read where it is `remote`.

    Raises:
        CheckpointError: header beyond the file or 100 MB, overlap, hole, truncation, unknown dtype.
    """
    where = str(path)
    damaged = "download the file again: it is damaged"
    file: Reader
    if remote and not path.exists():
        size = remote.size(path.name)
        if size is None:
            raise CheckpointError(f"has no {path.name}", where=str(remote), fix="give a revision that is complete")
        file = remote.open(path.name, size)
    else:
        file = LocalFile(path)
        size = os.fstat(file.fd).st_size
    with contextlib.closing(file):
        prefix, length = bytearray(8), -1
        if size >= len(prefix):
            file.read_into(memoryview(prefix), 0)
            length = struct.unpack("<Q", prefix)[0]
        if length < 2 or length > MAX_HEADER or 8 + length > size:
            raise CheckpointError(f"header of {length} bytes does not fit a file of {size}", where=where, fix=damaged)
        text = bytearray(length)
        file.read_into(memoryview(text), 8)
    header = parse_json(text, where)
    header.pop("__metadata__", None)
    entries = sorted(_entries(header, where), key=lambda e: (e[3], e[4]))
    position = 0
    tensors: dict[str, Tensor] = {}
    for name, dtype, shape, begin, end in entries:
        if begin != position:
            kind = "overlaps the tensor before it" if begin < position else f"leaves a hole of {begin - position} bytes"
            raise CheckpointError(f"tensor {name!r} {kind}", where=where, fix=damaged)
        tensors[name] = Tensor(name, dtype, shape, path, 8 + length + begin)
        position = end
    if 8 + length + position != size:
        kind = "is truncated" if 8 + length + position > size else "has bytes after its last tensor"
        raise CheckpointError(f"{kind}: {size} bytes, {8 + length + position} expected", where=where, fix=damaged)
    return tensors


def _entries(header: dict[str, Any], where: str) -> Iterator[tuple[str, str, tuple[int, ...], int, int]]:
    damaged = "download the file again: it is damaged"
    for name, entry in header.items():
        dtype, shape, offsets = (
            (entry.get("dtype"), entry.get("shape"), entry.get("data_offsets"))
            if isinstance(entry, dict)
            else (None,) * 3
        )
        try:
            name.encode()
        except UnicodeEncodeError:
            raise CheckpointError("a tensor's name is no text", where=where, fix=damaged) from None
        axes: list[Any] = shape if isinstance(shape, list) and len(shape) <= MAX_AXES else [None]
        if not all(type(n) is int and 0 <= n < 2**48 for n in axes):
            raise CheckpointError(f"tensor {name!r} has no valid shape", where=where, fix=damaged)
        if (
            not isinstance(offsets, list)
            or len(offsets) != 2
            or not all(type(n) is int and 0 <= n < 2**62 for n in offsets)
        ):
            raise CheckpointError(f"tensor {name!r} has no valid data_offsets", where=where, fix=damaged)
        if isinstance(dtype, str) and dtype in QUANTISED:
            fix = "use the unquantised (bf16 or fp32) checkpoint"
            raise CheckpointError(f"tensor {name!r} is quantised ({dtype})", where=where, fix=fix)
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise CheckpointError(f"tensor {name!r} has the unknown dtype {dtype!r}", where=where, fix=damaged)
        if offsets[1] - offsets[0] != math.prod(axes) * DTYPES[dtype][0]:
            raise CheckpointError(f"tensor {name!r}: offsets do not match its shape", where=where, fix=damaged)
        yield name, dtype, tuple(axes), offsets[0], offsets[1]


def _read_shards(index: Path, remote: Repository | None) -> dict[str, Tensor]:
    weight_map = read_json(index, MAX_INDEX).get("weight_map")
    where = str(index)
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("has no weight_map", where=where, fix="download the index again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[\w][\w.\-]{0,200}\.safetensors", shard, re.ASCII):
            raise CheckpointError(
                f"tensor {name!r}: {shard!r} is not the name of a shard",
                where=where,
                fix="shards lie beside their index, named by plain file names",
            )
        if remote is None and not (index.parent / shard).is_file():
            raise CheckpointError(f"shard {shard} is missing", where=where, fix="download it")
    tensors: dict[str, Tensor] = {}
    shards = sorted(set(weight_map.values()))
    for shard, found in zip(shards, _headers([index.parent / shard for shard in shards], remote), strict=True):
        twice = sorted(found.keys() & tensors.keys())
        if twice:
            raise CheckpointError(
                f"tensor {twice[0]!r} is in two shards, {tensors[twice[0]].file.name} and {shard}",
                where=where,
                fix="download the shards again",
            )
        declared = {name for name, file in weight_map.items() if file == shard}
        if declared != found.keys():
            missing, extra = sorted(declared - found.keys()), sorted(found.keys() - declared)
            raise CheckpointError(
                f"index and {shard} disagree: only in the index {missing[:5]}, only in the shard {extra[:5]}",
                where=where,
                fix="download index and shards of one revision",
            )
        tensors |= found
    return tensors


def _headers(files: list[Path], remote: Repository | None) -> Iterator[dict[str, Tensor]]:
    """Their headers in order; several at a time, for each takes a few round trips where it is remote."""
    with ThreadPoolExecutor(8) as pool:
        yield from pool.map(partial(read_header, remote=remote), files)
