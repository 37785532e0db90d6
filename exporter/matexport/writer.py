"""Plans to files: streamed in blocks, written aside, synced, and put in place by one rename."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import fnmatch
import hashlib
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from matexport.checkpoint import Checkpoint
from matexport.errors import CheckpointError, InputError, OutputError, UsageError
from matexport.manifest import FILE, describe_slice, json_bytes
from matexport.planning import Plan, PlannedTensor
from matexport.streaming import stream
from matexport.tensors import numpy_dtype
from matexport.tokenizer import TOKENIZER_FILES

Progress = Callable[[int], None]  # told how many more bytes have been written

# what a checkpoint carries beside config and weights; copied as it is
COMPANIONS = (
    *TOKENIZER_FILES,
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "image_processor_config.json",
    "video_preprocessor_config.json", "chat_template*", "LICENSE*", "LICENCE*", "NOTICE*", "Notice*", "USE_POLICY*",
)  # fmt: skip


Files = dict[str, dict[str, Any]]  # name -> {"bytes", "sha256"} of what was written


# ------------------------------------------------------------------------------------ whole folders
@contextlib.contextmanager
def staged_folder(output: Path, *, force: bool = False, inputs: Iterable[Path] = ()) -> Iterator[Path]:
    """A folder beside `output` to write into, which becomes `output` when the block ends without an error.

    It is locked while it is written, removed if the block fails, and replaced if an earlier run was killed.

    Raises:
        UsageError: `output` is not empty (without `force`), holds what matexport did not write, overlaps an
            input, or another run writes it.
        OutputError: the file system refuses, or is full.
    """
    output = Path(os.path.realpath(output))
    for path in map(Path, map(os.path.realpath, inputs)):
        if output == path or path in output.parents or output in path.parents:
            raise UsageError(f"output overlaps the input {path}", where=str(output), fix="write to another folder")
    if output == Path.cwd() or os.path.ismount(output):
        raise UsageError(
            "output cannot be replaced while it is in use", where=str(output), fix="name a folder inside it"
        )
    _check_output(output, force)
    staging = output.with_name(f".{output.name}.partial")
    with _io_errors(staging):
        output.parent.mkdir(parents=True, exist_ok=True)
        if staging.is_symlink():
            raise UsageError("is a link", where=str(staging), fix="remove it")
        staging.mkdir(exist_ok=True)
        lock = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                "another run is writing this output", where=str(output), fix="wait for it to end"
            ) from None
        with _io_errors(staging):
            for path in staging.iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        try:
            with _io_errors(staging):
                yield staging
                _check_output(output, force)
                _publish(staging, output)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _check_output(output: Path, force: bool) -> None:
    """Only what is empty, or was written by matexport and is to be replaced, may be in the way."""
    if output.exists() and not output.is_dir():
        raise UsageError("output is a file", where=str(output), fix="name a folder")
    if output.is_dir() and any(output.iterdir()):
        if not force:
            fix = "name another folder, or replace it with --force"
            raise UsageError("output is not empty", where=str(output), fix=fix)
        if not (output / FILE).is_file():
            what = f"output holds no {FILE}: matexport did not write it, and does not replace it"
            raise UsageError(what, where=str(output), fix="name another folder")


def _publish(staging: Path, output: Path) -> None:
    """Syncs what was written and renames it into place; an older output stays until then."""
    for folder, _, files in os.walk(staging):
        for name in files:
            _sync(Path(folder, name))
        _sync(Path(folder))
    old = output.with_name(f".{output.name}.{os.getpid()}.old")
    replaced = output.is_dir() and any(output.iterdir())
    if replaced:
        output.rename(old)
    try:
        staging.rename(output)
    except OSError:
        if replaced:
            old.rename(output)
        raise
    _sync(output.parent)
    if replaced:
        shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _io_errors(where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        fix = {
            errno.ENOSPC: "free some space, or write to another disk",
            errno.EDQUOT: "free some of your quota",
            errno.EACCES: "write to a folder of your own",
            errno.EROFS: "write to another file system",
        }.get(e.errno or 0, "check the disk and the folder's rights")
        raise OutputError(f"cannot be written: {e.strerror}", where=str(e.filename or where), fix=fix) from e


def check_space(folder: Path, needed: int) -> None:
    """Raises OutputError if the file system of `folder` has less than `needed` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        what = f"{needed:,} bytes are needed and {free:,} are free"
        raise OutputError(what, where=str(folder), fix="free some space, or write to another disk")


# -------------------------------------------------------------------------------------- single files
def write_blocks(path: Path, blocks: Iterable[Any], progress: Progress = lambda n: None) -> dict[str, Any]:
    """Writes buffers one after the other and returns `bytes` and `sha256` of the file."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as f:
        for block in blocks:
            view = memoryview(block).cast("B")
            digest.update(view)
            size += len(view)
            progress(len(view))
            while view:
                view = view[f.write(view) :]
    return {"bytes": size, "sha256": digest.hexdigest()}


def tensor_blocks(
    checkpoint: Checkpoint, tensor: PlannedTensor, name: str, warn: Callable[[str], None]
) -> Iterator[Any]:
    """The bytes of a planned tensor, cast where its dtype is another than the source's."""
    source = checkpoint.tensors[tensor.view.source]
    finite = True
    for block in stream(checkpoint, tensor.view):
        finite = finite and _is_finite(block, source.dtype)
        cast = block if tensor.dtype == source.dtype else block.astype(numpy_dtype(tensor.dtype))
        yield cast.view(np.uint8)
    if not finite:
        warn(f"tensor {name!r} holds NaN or infinity (source {source.name!r})")


_EXPONENT = {"F16": (np.uint16, 0x7C00), "BF16": (np.uint16, 0x7F80), "F32": (np.uint32, 0x7F800000)}


def _is_finite(block: np.ndarray, dtype: str) -> bool:
    """No NaN and no infinity: the exponent bits are never all ones. Faster than isfinite for 16-bit types."""
    if dtype == "F64":
        return bool(np.isfinite(block).all())
    if dtype not in _EXPONENT:
        return True
    bits, mask = _EXPONENT[dtype]
    return not bool(((block.view(bits) & bits(mask)) == mask).any())


def safetensors_header(tensors: Mapping[str, PlannedTensor]) -> bytes:
    """Length and header of a safetensors file that holds these tensors in this order, data 64-byte aligned."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-(8 + len(raw)) % 64)
    return struct.pack("<Q", len(raw)) + raw


# -------------------------------------------------------------------------------------- checkpoints
def write_checkpoint(
    checkpoint: Checkpoint,
    plan: Plan,
    output: Path,
    *,
    files: Mapping[str, bytes],
    max_shard_size: int | None = None,
    force: bool = False,
    strict: bool = False,
    progress: Progress = lambda n: None,
    warn: Callable[[str], None] = lambda text: None,
) -> None:
    """Writes a plan as a standalone checkpoint: weights, config, companions, `files`, model card, manifest.

    Args:
        files: further files by name (model card, custom code).
        max_shard_size: bytes of tensors a file; one file if None.
        strict: a kept tensor with NaN or infinity is an error instead of a warning.

    Raises:
        UsageError, OutputError: see `staged_folder`.
        CheckpointError: the source ends early, changed during the run, or (strict) is not finite.
    """
    output = Path(output)
    unusual: list[str] = []
    before = checkpoint.state()
    with staged_folder(output, force=force, inputs=[checkpoint.path]) as folder:
        check_space(folder, plan.nbytes)
        checkpoint.fetch((tensor.view.source for tensor in plan.tensors.values()), COMPANIONS)
        written: Files = {}

        def put(name: str, blocks: Iterable[Any], progress: Progress = lambda n: None) -> None:
            if name.casefold() in map(str.casefold, written):
                raise InputError(f"two files are called {name!r} here", where=str(output), fix="rename one of them")
            written[name] = write_blocks(folder / name, blocks, progress)

        for name, tensors in _shards(plan, max_shard_size):
            put(name, _file_blocks(checkpoint, tensors, unusual.append), progress)
        shards = list(written)
        put("config.json", [json_bytes(plan.config)])
        if len(shards) > 1:
            weight_map = {t: name for name, tensors in _shards(plan, max_shard_size) for t in tensors}
            index = {"metadata": {"total_size": plan.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
            put("model.safetensors.index.json", [json_bytes(index)])
        for path in companions(checkpoint.path):
            if path.name not in files:
                put(path.name, _blocks_of(path))
        for name, data in files.items():
            put(name, [data])
        if unusual and strict:
            raise CheckpointError("; ".join(unusual), where=str(checkpoint.path), fix="leave out --strict to keep them")
        if checkpoint.state() != before:
            raise CheckpointError(
                "changed while it was read", where=str(checkpoint.path), fix="run again when it is at rest"
            )
        manifest = {
            "kind": "checkpoint",
            **describe_slice(plan, checkpoint),
            "tensors": {name: tensor.to_json() for name, tensor in plan.tensors.items()},
            "files": dict(sorted(written.items())),
        }
        put(FILE, [json_bytes(manifest)])
    for text in unusual:
        warn(text)


def _shards(plan: Plan, limit: int | None) -> list[tuple[str, dict[str, PlannedTensor]]]:
    """(file name, tensors) of each weight file; a tensor larger than the limit gets a file of its own."""
    groups: list[dict[str, PlannedTensor]] = [{}]
    size = 0
    for name, tensor in plan.tensors.items():
        if limit is not None and groups[-1] and size + tensor.nbytes > limit:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += tensor.nbytes
    if len(groups) == 1:
        return [("model.safetensors", groups[0])]
    return [(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups, 1)]


def _file_blocks(
    checkpoint: Checkpoint, tensors: dict[str, PlannedTensor], warn: Callable[[str], None]
) -> Iterator[Any]:
    yield safetensors_header(tensors)
    for name, tensor in tensors.items():
        if math.prod(tensor.shape):
            yield from tensor_blocks(checkpoint, tensor, name, warn)


def companions(folder: Path) -> list[Path]:
    """The files of a checkpoint that travel with every slice: tokenizer, processors, licences."""
    return sorted(
        path for path in folder.iterdir() if path.is_file() and any(fnmatch.fnmatch(path.name, p) for p in COMPANIONS)
    )


def _blocks_of(path: Path) -> Iterator[bytes]:
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            yield block
