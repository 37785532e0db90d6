"""Reading `pytorch_model.bin` without torch and without running anything: storages become byte ranges.

The file that `torch.save` writes is an uncompressed zip: `data.pkl`, a pickle of the state dict whose
storages are persistent ids, and one entry for each storage. Only the globals that a state dict needs
are known to the unpickler here, and each of them is a function of this file.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from matexport.errors import CheckpointError
from matexport.tensors import DTYPES, Tensor

MAX_PICKLE, MAX_ENTRIES = 64 << 20, 100_000

STORAGES = {
    "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "DoubleStorage": "F64",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Storage:
    """`count` elements of one dtype in the zip entry `data/KEY`."""

    dtype: str
    key: str
    count: int


@dataclass(frozen=True)
class Part:
    """A tensor: a contiguous part of a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a file written by `torch.save(state_dict)`, as byte ranges of that file.

    Raises:
        CheckpointError: not such a file, a global that a state dict does not need, compressed or
            truncated entries, or a tensor outside its storage.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as f:
            entries = {info.filename: info for info in archive.infolist()[: MAX_ENTRIES + 1]}
            names = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
            if len(names) != 1 or len(entries) > MAX_ENTRIES:
                _refuse(path, "holds no state dict", "only files that torch.save writes (since torch 1.6) can be read")
            name, root = names[0], names[0].removesuffix("data.pkl")
            if entries[name].file_size > MAX_PICKLE or entries[name].compress_type != zipfile.ZIP_STORED:
                _refuse(path, "has a pickle that is compressed or larger than 64 MiB", "this is not a checkpoint")
            order = entries.get(f"{root}byteorder")
            if order is not None and _content(f, order, path, 16) != b"little":
                _refuse(path, "was written on a big-endian machine", "save it again on a little-endian one")
            state = _Unpickler(io.BytesIO(_content(f, entries[name], path, MAX_PICKLE)), path).load()
            return _tensors(path, f, entries, root, state)
    except (OSError, zipfile.BadZipFile, ValueError) as e:
        _refuse(
            path, f"is not a zip file that torch.save wrote: {e}", "download it again, or convert it to safetensors"
        )
    except CheckpointError:
        raise
    except Exception as e:  # whatever a hostile pickle makes the unpickler raise
        _refuse(path, f"holds a damaged pickle: {type(e).__name__}: {e}", "download it again")


def _refuse(path: Path, what: str, fix: str) -> NoReturn:
    raise CheckpointError(what, where=str(path), fix=fix) from None


class _Unpickler(pickle._Unpickler):  # the C one grows its memo to any index that a pickle names
    """Knows five globals, all of them harmless; everything else is refused by name."""

    def __init__(self, file: io.BytesIO, path: Path):
        super().__init__(file)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): _parameter,
        }
        if (module, name) not in known:
            _refuse(
                self.path, f"needs the global {module}.{name}, which could run code", "only plain state dicts are read"
            )
        return known[module, name]

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, _location, count = pid
        if kind != "storage" or dtype not in STORAGES.values() or type(key) is not str or type(count) is not int:
            raise ValueError("unknown persistent id")
        return Storage(dtype, key, count)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> Part:
    """torch._utils._rebuild_tensor_v2, for contiguous tensors."""
    if not isinstance(storage, Storage) or type(offset) is not int or offset < 0:
        raise ValueError("a tensor without a storage")
    if not all(type(n) is int and 0 <= n < 2**48 for n in (*shape, *stride)) or len(shape) != len(stride):
        raise ValueError("a tensor without a shape")
    expected = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    if any(n > 1 and have != want for n, have, want in zip(shape, stride, expected, strict=True)):
        raise ValueError("a tensor that is not contiguous")
    return Part(storage, offset, tuple(shape))


def _parameter(data: Any, *_: Any) -> Any:
    """torch._utils._rebuild_parameter."""
    return data


def _tensors(path: Path, f: Any, entries: Mapping[str, zipfile.ZipInfo], root: str, state: Any) -> dict[str, Tensor]:
    if not isinstance(state, dict) or not state:
        _refuse(path, "holds no state dict", "only plain state dicts are read")
    tensors: dict[str, Tensor] = {}
    starts: dict[str, int] = {}
    for name, part in state.items():
        if not isinstance(name, str) or not isinstance(part, Part):
            _refuse(path, f"entry {str(name)[:80]!r} is not a tensor", "only plain state dicts are read")
        storage, size = part.storage, DTYPES[part.storage.dtype][0]
        entry = entries.get(f"{root}data/{storage.key}")
        if entry is None:
            _refuse(path, f"tensor {name!r}: its storage is missing", "download the file again")
        if (part.offset + math.prod(part.shape)) > storage.count or storage.count * size > entry.file_size:
            _refuse(path, f"tensor {name!r} lies outside its storage", "download the file again: it is damaged")
        if storage.key not in starts:
            starts[storage.key] = _start(f, entry, path)
        tensors[name] = Tensor(name, storage.dtype, part.shape, path, starts[storage.key] + part.offset * size)
    return tensors


def _start(f: Any, entry: zipfile.ZipInfo, path: Path) -> int:
    """Where the bytes of an uncompressed entry start, after its local header."""
    f.seek(entry.header_offset)
    header = f.read(30)
    if len(header) < 30 or header[:4] != b"PK\3\4" or entry.compress_type != zipfile.ZIP_STORED:
        _refuse(path, f"entry {entry.filename!r} is damaged or compressed", "save it again with torch.save")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    start: int = entry.header_offset + 30 + name_length + extra_length
    if entry.compress_size != entry.file_size or start + entry.file_size > path.stat().st_size:
        _refuse(path, f"entry {entry.filename!r} ends beyond the file", "download the file again: it is truncated")
    return start


def _content(f: Any, entry: zipfile.ZipInfo, path: Path, limit: int) -> bytes:
    start = _start(f, entry, path)
    f.seek(start)
    data: bytes = f.read(min(entry.file_size, limit))
    return data
