"""What a run has written so far, in the folder that it writes: a killed run goes on from there.

One JSON object a line. The first names the run: only the same command on the same source goes on. Nothing
is believed because it stands here: what is resumed is read back and must have the digest noted for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

FILE = ".journal"
CHUNK = 1 << 20


class Journal:
    """The journal of one run.

    Attributes:
        warnings: what was said about the source so far.
        resumed: bytes that this run did not have to write again.
    """

    def __init__(self, folder: Path, run: str):
        """Opens the journal of `run` in a folder, and removes whatever in the folder is not part of that run."""
        self.folder, self.path = folder, folder / FILE
        self.warnings: list[str] = []
        self.resumed = 0
        self._marks: dict[str, list[tuple[int, str]]] = {}
        known = self._read(run)
        clear(folder, keep={FILE, *self._marks} if known else set())
        if not known:
            self._add({"run": run})

    def _read(self, run: str) -> bool:
        try:
            data = self.path.read_bytes()
            lines = data[: data.rfind(b"\n") + 1].decode().splitlines()  # the last line may be half-written
            os.truncate(self.path, data.rfind(b"\n") + 1)
        except (OSError, UnicodeDecodeError):
            return False
        for number, line in enumerate(lines):
            try:
                entry = json.loads(line)
                if number == 0:
                    if entry != {"run": run}:
                        return False
                elif "warn" in entry:
                    self.warnings.append(str(entry["warn"]))
                else:
                    self._marks.setdefault(str(entry["file"]), []).append((int(entry["bytes"]), str(entry["sha256"])))
            except (ValueError, TypeError, KeyError, RecursionError):
                return False
        return bool(lines)

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


def clear(folder: Path, keep: Collection[str] = ()) -> None:
    """Removes everything in a folder but the named entries."""
    for path in folder.iterdir():
        if path.name not in keep:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
