"""What a run has written so far, beside the folder that it writes: a killed run goes on from there.

One JSON object a line. The first names the run: only the same command on the same source goes on. Nothing
is believed because it stands here: what is resumed is read back and must have the digest noted for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Any

CHUNK = 1 << 20
MAX_JOURNAL = 64 << 20


def journal_path(folder: Path) -> Path:
    """The journal of a folder that is being written: beside it, so that it outlives the rename into place."""
    return folder.with_name(f"{folder.name}.journal")


class Journal:
    """The journal of one run.

    Attributes:
        warnings: what was said about the source so far.
        resumed: bytes that this run did not have to write again.
    """

    def __init__(self, folder: Path, run: str):
        """Opens the journal of `run` on a folder, and removes whatever in the folder is not part of that run."""
        self.folder, self.path = folder, journal_path(folder)
        self.resumed = 0
        lines = self._read(run) or [{"run": run}]
        self.warnings = [line["warn"] for line in lines if "warn" in line]
        self._marks: dict[str, list[tuple[int, str]]] = {}
        for line in lines:
            if "file" in line:
                self._marks.setdefault(line["file"], []).append((line["bytes"], line["sha256"]))
        clear(folder, keep=[name for name in self._marks if is_own_file(folder / name)])
        if len(lines) == 1:
            remove(self.path)
            self._add(lines[0])

    def _read(self, run: str) -> list[dict[str, Any]] | None:
        """The lines of the journal, if it is one of this run; None if anything about it is not as it was written."""
        if not is_own_file(self.path) or self.path.stat().st_size > MAX_JOURNAL:
            return None
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1  # the run may have been killed while it wrote the last line
        try:
            lines = [json.loads(line) for line in data[:whole].decode().splitlines()]
        except (ValueError, RecursionError):
            return None
        if lines[:1] != [{"run": run}] or not all(map(_is_entry, lines[1:])):
            return None
        os.truncate(self.path, whole)
        return lines

    def mark(self, file: str, size: int, sha256: str) -> None:
        """Notes that the first `size` bytes of a file are written and have this digest."""
        self._add({"file": file, "bytes": size, "sha256": sha256})

    def warn(self, text: str) -> None:
        """Notes a warning, once."""
        if text not in self.warnings:
            self.warnings.append(text)
            self._add({"warn": text})

    def written(self, file: str) -> tuple[int, Any]:
        """How many leading bytes of a file are there and right, and the SHA-256 object that has seen them."""
        digest, size, good = hashlib.sha256(), 0, (0, hashlib.sha256())
        try:
            with (self.folder / file).open("rb") as f:
                for wanted, sha256 in sorted(self._marks.get(file, [])):
                    while size < wanted and (data := f.read(min(CHUNK, wanted - size))):
                        digest.update(data)
                        size += len(data)
                    if size != wanted or digest.hexdigest() != sha256:
                        break
                    good = (size, digest.copy())
        except OSError:
            pass
        self.resumed += good[0]
        return good

    def _add(self, entry: dict[str, Any]) -> None:
        with self.path.open("a") as f:
            f.write(json.dumps(entry) + "\n")


def _is_entry(line: Any) -> bool:
    if not isinstance(line, dict):
        return False
    if line.keys() == {"warn"}:
        return isinstance(line["warn"], str)
    plain = isinstance(line.get("file"), str) and Path(line["file"]).name == line["file"]
    return plain and type(line.get("bytes")) is int and line["bytes"] >= 0 and isinstance(line.get("sha256"), str)


def is_own_file(path: Path) -> bool:
    """Whether it is a file that has no other name: writing to it changes nobody else's."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 1


def clear(folder: Path, keep: Collection[str] = ()) -> None:
    """Removes everything in a folder but the named entries."""
    for path in folder.iterdir():
        if path.name not in keep:
            remove(path)


def remove(path: Path) -> None:
    """Removes a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
