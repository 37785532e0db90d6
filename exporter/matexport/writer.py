"""Plans to files: streamed in blocks, hashed and written at once."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from matexport.checkpoint import Checkpoint
from matexport.errors import CheckpointError, InputError
from matexport.journal import Journal, clear
from matexport.manifest import FILE, describe_slice, json_bytes, manifest_bytes
from matexport.planning import Plan, PlannedTensor
from matexport.staging import check_space, staged_folder
from matexport.streaming import BLOCK, REMOTE_BLOCK, Pool, stream
from matexport.tensors import FLOATS, numpy_dtype
from matexport.tokenizer import TOKENIZER_FILES
from matexport.version import __version__

AHEAD = 8  # buffers that writing and hashing may be behind
FLUSH = 8 << 20  # bytes after which the disk is asked to start writing
MARK = 32 << 20  # bytes between the marks in a journal

Progress = Callable[[int], None]  # told how many more bytes have been written

# what a checkpoint carries beside config and weights; copied as it is
COMPANIONS = (
    *TOKENIZER_FILES,
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "image_processor_config.json",
    "video_preprocessor_config.json", "chat_template*", "LICENSE*", "LICENCE*", "NOTICE*", "Notice*", "USE_POLICY*",
)  # fmt: skip


Files = dict[str, dict[str, Any]]  # name -> {"bytes", "sha256"} of what was written


def write_blocks(
    path: Path,
    blocks: Iterable[Any],
    progress: Progress = lambda n: None,
    *,
    digest: bool = True,
    start: int = 0,
    seen: Any = None,
    mark: Callable[[int, str], None] | None = None,
) -> dict[str, Any]:
    """Writes buffers one after the other and returns `bytes` and `sha256` of the file.

    While the caller's thread makes the buffers, a second one writes them and a third one hashes them, at most `AHEAD`
    behind: a buffer may be used again once `AHEAD` more have been yielded.

    Args:
        digest: whether to hash what is written.
        start: bytes of the file that are there already; the rest is replaced.
        seen: the SHA-256 object that has seen those bytes.
        mark: told now and then how many leading bytes are written, and their digest.
    """
    hasher = (seen or hashlib.sha256()) if digest else None
    behind: deque[tuple[int, Future[None], Future[str] | None]] = deque()
    done = end = start

    def settle() -> None:
        nonlocal done
        position, written, hashed = behind.popleft()
        written.result()
        if hashed and (sha256 := hashed.result()) and mark is not None:
            mark(position, sha256)
        progress(position - done)
        done = position

    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        os.ftruncate(fd, start)
        with ThreadPoolExecutor(1) as writing, ThreadPoolExecutor(1) as hashing:
            for block in blocks:
                view = memoryview(block).cast("B")
                begin, end = end, end + len(view)
                hashed = hashing.submit(_update, hasher, view, begin // MARK != end // MARK) if hasher else None
                behind.append((end, writing.submit(_write, fd, view, begin), hashed))
                if len(behind) == AHEAD:
                    settle()
            while behind:
                settle()
    finally:
        os.close(fd)
    return {"bytes": end, **({"sha256": hasher.hexdigest()} if hasher else {})}


def _write(fd: int, view: memoryview, position: int) -> None:
    """Writes a block to its place; now and then asks for what the sync at the end would otherwise wait for."""
    begin, end = position, position + len(view)
    while view:
        count = os.pwrite(fd, view, position)
        view, position = view[count:], position + count
    if begin // FLUSH != end // FLUSH:
        os.posix_fadvise(fd, max(0, begin - FLUSH), end - max(0, begin - FLUSH), os.POSIX_FADV_DONTNEED)


def _update(digest: Any, view: memoryview, due: bool) -> str:
    """Hashes a block; returns the digest so far where a mark is due."""
    digest.update(view)
    return str(digest.copy().hexdigest()) if due else ""


def tensor_blocks(
    checkpoint: Checkpoint,
    tensor: PlannedTensor,
    name: str,
    warn: Callable[[str], None],
    *,
    start: int = 0,
    pool: Pool | None = None,
) -> Iterator[Any]:
    """The bytes of a planned tensor from byte `start` on, cast where its dtype is another than the source's."""
    source = checkpoint.tensors[tensor.view.source]
    dtype = numpy_dtype(tensor.dtype)
    finite = True
    for block in stream(checkpoint, tensor.view, start=start // dtype.itemsize, pool=pool):
        if tensor.dtype != source.dtype:
            with np.errstate(over="ignore"):  # beyond float16: found below
                block = block.astype(dtype)
        if finite and not _is_finite(block, tensor.dtype):
            finite = False
            cast = "" if tensor.dtype == source.dtype else f" as {FLOATS[tensor.dtype]}"
            warn(f"tensor {name!r} holds NaN or infinity{cast} (source {source.name!r})")
        yield block.view(np.uint8)


_INFINITY = {  # dtype -> its bits as signed and unsigned integers, and the bits of infinity without and with the sign
    "F16": (np.int16, np.uint16, 0x7C00, 0xFC00),
    "BF16": (np.int16, np.uint16, 0x7F80, 0xFF80),
    "F32": (np.int32, np.uint32, 0x7F800000, 0xFF800000),
}


def _is_finite(block: np.ndarray, dtype: str) -> bool:
    """No NaN and no infinity: no bits from those of infinity up, of either sign. Two passes, no copy."""
    if dtype == "F64":
        return bool(np.isfinite(block).all())
    if dtype not in _INFINITY or not block.size:
        return True
    signed, unsigned, positive, negative = _INFINITY[dtype]
    return bool(block.view(signed).max() < positive and block.view(unsigned).max() < negative)


def safetensors_header(tensors: Mapping[str, PlannedTensor]) -> bytes:
    """Length and header of a safetensors file that holds these tensors in this order, data 64-byte aligned.

    Licences such as Gemma's ask for a mark on modified files: it is in the metadata.
    """
    notice = f"cut from another checkpoint, and so modified, by matexport {__version__}"
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "notice": notice}}
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
    digest: bool = True,
    resume: bool = True,
    progress: Progress = lambda n: None,
    warn: Callable[[str], None] = lambda text: None,
) -> None:
    """Writes a plan as a standalone checkpoint: weights, config, companions, `files`, model card, manifest.

    Args:
        files: further files by name (model card, custom code).
        max_shard_size: bytes of tensors a file; one file if None.
        strict: a kept tensor with NaN or infinity is an error instead of a warning.
        digest: note the SHA-256 of every file in the manifest; without, a killed run starts over.
        resume: go on from what the same command left when it was killed.

    Raises:
        UsageError, OutputError: see `staged_folder`.
        CheckpointError: the source ends early, changed during the run, or (strict) is not finite.
    """
    output = Path(output)
    checkpoint.check_unchanged()
    shards = dict(_shards(plan, max_shard_size))
    described = describe_slice(plan, checkpoint)
    run = {
        "plan": plan.to_json(),
        "source": described,
        "state": checkpoint.opened,
        "shards": {n: list(t) for n, t in shards.items()},
    }
    with staged_folder(output, force=force, inputs=[checkpoint.path], resume=resume and digest) as folder:
        journal = Journal(folder, hashlib.sha256(json.dumps(run).encode()).hexdigest()) if digest else None
        unusual: list[str] = journal.warnings if journal else []
        check_space(folder, plan.nbytes - sum(path.stat().st_size for path in folder.iterdir()))
        checkpoint.fetch((tensor.view.source for tensor in plan.tensors.values()), COMPANIONS)
        written: Files = {}
        pool = Pool(AHEAD + 1, REMOTE_BLOCK if checkpoint.streams else BLOCK)

        def put(name: str, data: bytes) -> None:
            if name.casefold() in map(str.casefold, written):
                raise InputError(f"two files are called {name!r} here", where=str(output), fix="rename one of them")
            written[name] = write_blocks(folder / name, [data], digest=digest)

        for name, tensors in shards.items():
            start, seen = journal.written(name) if journal else (0, None)
            progress(start)
            blocks = _file_blocks(checkpoint, tensors, journal.warn if journal else unusual.append, start, pool)
            mark = partial(journal.mark, name) if journal else None
            written[name] = entry = write_blocks(
                folder / name, blocks, progress, digest=digest, start=start, seen=seen, mark=mark
            )
            if mark:
                mark(entry["bytes"], entry["sha256"])
        put("config.json", json_bytes(plan.config))
        if len(shards) > 1:
            weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
            index = {"metadata": {"total_size": plan.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
            put("model.safetensors.index.json", json_bytes(index))
        sliced = (checkpoint.path / FILE).is_file()  # a slice of ours: what it has of the files below was ours too
        for path in companions(checkpoint.path):
            ours = path.name.casefold() in map(str.casefold, files)
            if not (ours and sliced):
                put(path.name + ".source" if ours else path.name, _read_companion(path))
        for name, data in files.items():
            put(name, data)
        if unusual and strict:
            raise CheckpointError("; ".join(unusual), where=str(checkpoint.path), fix="leave out --strict to keep them")
        checkpoint.check_unchanged()
        manifest = {
            "kind": "checkpoint",
            **described,
            "tensors": {name: tensor.to_json() for name, tensor in plan.tensors.items()},
            "files": dict(sorted(written.items())),
        }
        put(FILE, manifest_bytes(manifest))
        clear(folder, keep=written)
    if journal and journal.resumed:
        warn(f"went on from an earlier run, which had written {journal.resumed:,} bytes")
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
    checkpoint: Checkpoint, tensors: dict[str, PlannedTensor], warn: Callable[[str], None], start: int, pool: Pool
) -> Iterator[Any]:
    """The bytes of a weights file from byte `start` on."""
    header = safetensors_header(tensors)
    if start < len(header):
        yield header[start:]
    begin = len(header)
    for name, tensor in tensors.items():
        if start < begin + tensor.nbytes:
            yield from tensor_blocks(checkpoint, tensor, name, warn, start=max(0, start - begin), pool=pool)
        begin += tensor.nbytes


def _read_companion(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise CheckpointError(f"cannot be read: {e.strerror}", where=str(path), fix="check its rights") from None


def companions(folder: Path) -> list[Path]:
    """The files of a checkpoint that travel with every slice: tokenizer, processors, licences."""
    return sorted(
        path for path in folder.iterdir() if path.is_file() and any(fnmatch.fnmatch(path.name, p) for p in COMPANIONS)
    )
