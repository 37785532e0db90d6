"""Output folders: written aside, synced, and put in place by one rename; a killed run can be resumed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from matexport.errors import OutputError, UsageError
from matexport.journal import clear, journal_path, remove
from matexport.manifest import FILE, read_manifest


@contextlib.contextmanager
def staged_folder(
    output: Path, *, force: bool = False, inputs: Iterable[Path] = (), resume: bool = False
) -> Iterator[Path]:
    """A folder beside `output` to write into, which becomes `output` when the block ends without an error.

    It is locked while it is written, and removed if the block fails. If it is interrupted and has a journal,
    both stay. With `resume`, what an earlier run left in it is there.

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
    if len(os.fsencode(output.name)) > 200:
        raise UsageError("output has too long a name", where=str(output), fix="choose a shorter one")
    _check_output(output, force)
    staging = output.with_name(f".{output.name}.partial")
    with _io_errors(staging):
        output.parent.mkdir(parents=True, exist_ok=True)
        if staging.is_symlink():
            raise UsageError("is a link", where=str(staging), fix="remove it")
        staging.mkdir(exist_ok=True)
        lock = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    journal = journal_path(staging)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(lock), os.lstat(staging)):
                raise BlockingIOError  # it was put in place, and another one was begun, before this one was locked
        except (BlockingIOError, FileNotFoundError):
            raise UsageError(
                "another run is writing this output", where=str(output), fix="wait for it to end"
            ) from None
        try:
            with _io_errors(staging):
                _recover(output)
                _check_output(output, force)
                if not resume:
                    remove(journal)
                    clear(staging)
                yield staging
                _check_output(output, force)
                _publish(staging, output)
        except BaseException as e:
            if isinstance(e, KeyboardInterrupt) and staging.exists() and journal.exists():
                raise KeyboardInterrupt(f"{staging.name} is kept: the same command goes on from there") from None
            shutil.rmtree(staging, ignore_errors=True)
            journal.unlink(missing_ok=True)
            raise
        journal.unlink(missing_ok=True)
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
        known = {FILE, *read_manifest(output)["files"]}
        known |= {folder.as_posix() for name in known for folder in Path(name).parents}
        found = [path for path in output.rglob("*") if path.parent == output or not path.parent.is_symlink()]
        strangers = sorted({path.relative_to(output).as_posix() for path in found} - known)
        if strangers:
            what = f"output holds what matexport did not write: {', '.join(strangers[:5])}"
            raise UsageError(what, where=str(output), fix="move it away, or name another folder")


def _publish(staging: Path, output: Path) -> None:
    """Syncs what was written and renames it into place; an older output stays until then."""
    for folder, _, files in os.walk(staging):
        for name in files:
            _sync(Path(folder, name))
        _sync(Path(folder))
    old = _set_aside(output)
    replaced = output.is_dir() and any(output.iterdir())
    try:
        if replaced:
            output.rename(old)
        staging.rename(output)
    except BaseException:
        if replaced and not output.exists():
            old.rename(output)
        raise
    _sync(output.parent)
    if replaced:  # under the name that the next run clears: half of an old output must never be put back
        old.rename(staging)
        shutil.rmtree(staging, ignore_errors=True)


def _set_aside(output: Path) -> Path:
    """Where an older output is while the new one takes its place."""
    return output.with_name(f".{output.name}.replaced")


def _recover(output: Path) -> None:
    """Puts an older output back if a run was killed while it was replaced; removes it if the new one is there."""
    old = _set_aside(output)
    if old.is_symlink() or not (old / FILE).is_file():
        return
    if output.is_dir() and any(output.iterdir()):
        shutil.rmtree(old)
    else:
        old.rename(output)


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
