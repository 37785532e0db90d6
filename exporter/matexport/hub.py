"""Repositories on the Hugging Face Hub: small files in its cache, weight files downloaded or read by byte ranges.

Everything goes through huggingface_hub: its cache, token, endpoint and offline mode. A revision is
resolved once; from then on only its commit is asked for, so that a branch may move meanwhile.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from matexport.errors import CheckpointError, MatexportError, MissingError, OutputError

SMALL = ("config.json", "model.safetensors.index.json", "slices.csv", "matexport.json")  # what planning reads
WAITS = (0.5, 1.0, 2.0, 4.0)  # seconds before each further attempt
MAY_PASS = (408, 429, 500, 502, 503, 504)  # answers that another attempt may change
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"

T = TypeVar("T")


def is_id(text: str) -> bool:
    """Whether a text has the form ORG/NAME[@REVISION]."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?", text, re.ASCII)) and ".." not in text


@dataclass(frozen=True)
class Repository:
    """A model repository at one commit, and its snapshot in huggingface_hub's cache."""

    id: str
    commit: str
    folder: Path

    def __str__(self) -> str:
        return f"{self.id}@{self.commit}"

    def fetch(self, names: Iterable[str], patterns: Iterable[str] = ()) -> None:
        """Downloads files into the cache, by name and by pattern, unless they are there.

        Raises:
            CheckpointError, MissingError: a name is not in the repository, or cannot be had now.
            OutputError: the cache cannot be written.
        """
        names = list(names)
        _snapshot(self.id, self.commit, [*SMALL, *names, *patterns], show=bool(names))
        for name in names:
            if not (self.folder / name).exists():
                raise CheckpointError(f"has no {name}", where=str(self), fix="give a revision that is complete")

    def size(self, name: str) -> int | None:
        """Bytes of a file, or None if there is no such file. Raises CheckpointError, MissingError."""
        from huggingface_hub import get_hf_file_metadata
        from huggingface_hub.errors import RemoteEntryNotFoundError

        def ask() -> int | None:
            try:
                return get_hf_file_metadata(self._url(name)).size
            except RemoteEntryNotFoundError:
                return None

        return _attempt(ask, f"{self}/{name}")

    def open(self, name: str, size: int) -> RemoteFile:
        """A reader of a file of `size` bytes over HTTP."""
        return RemoteFile(self._url(name), size, f"{self}/{name}")

    def _url(self, name: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.id, name, revision=self.commit)


def open_repository(text: str) -> Repository:
    """The repository ORG/NAME[@REVISION], its small files in the cache.

    Raises:
        CheckpointError: no such repository or revision.
        MissingError: it is not open to this user, the Hub cannot be reached, or (offline) it is not in the cache.
    """
    name, _, revision = text.partition("@")
    folder = _snapshot(name, revision or None, SMALL)
    return Repository(name, folder.name, folder)


def _snapshot(repository: str, revision: str | None, patterns: Sequence[str], *, show: bool = False) -> Path:
    """The folder of one commit in the cache, with the files of the repository's top folder that match."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import tqdm

    bars: list[tqdm] = []
    silent = {} if show and sys.stderr.isatty() else {"disable": True}

    class Bar(tqdm):
        """A bar that we close: huggingface_hub leaves its own to the end of the program."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, **silent, "leave": False})  # type: ignore[no-untyped-call]
            bars.append(self)

    def download() -> Path:
        allow, ignore = list(patterns), ["*/*"]
        try:
            folder = snapshot_download(
                repository, revision=revision, allow_patterns=allow, ignore_patterns=ignore, tqdm_class=Bar
            )
            return Path(folder)
        finally:
            for bar in bars:
                bar.close()

    return _attempt(download, f"{repository}@{revision}" if revision else repository, waits=())


class RemoteFile:
    """A weight file of a repository, read by byte ranges: one request for each read."""

    direct = 1 << 20  # what a connection brings in the time of a round trip

    def __init__(self, url: str, size: int, where: str):
        self.url, self.size, self.where = url, size, where

    def read_into(self, buffer: memoryview, offset: int) -> None:
        if len(buffer):
            _attempt(lambda: self._get(buffer, offset), self.where)

    def _get(self, buffer: memoryview, offset: int) -> None:
        from huggingface_hub import constants, get_session
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        span = f"{offset}-{offset + len(buffer) - 1}"
        headers = {**build_hf_headers(), "Range": f"bytes={span}", "Accept-Encoding": "identity"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", self.url, headers=headers, timeout=timeout) as response:
            hf_raise_for_status(response)
            got, want = response.headers.get("Content-Range"), f"bytes {span}/{self.size}"
            if response.status_code != 206 or got != want:
                answer = f"{response.status_code} {got}" if got else str(response.status_code)
                what = f"the server does not serve byte ranges: {answer} for {want}"
                fix = "download the repository first: hf download " + self.where.partition("@")[0]
                raise CheckpointError(what, where=self.where, fix=fix)
            filled = 0
            for block in response.iter_bytes():
                block = block[: len(buffer) - filled]
                buffer[filled : filled + len(block)] = block
                filled += len(block)
            if filled < len(buffer):
                raise ConnectionError(f"the answer ends after {filled} of {len(buffer)} bytes")

    def will_need(self, spans: Sequence[tuple[int, int]]) -> None:
        """Nothing is fetched ahead."""

    def close(self) -> None:
        """Connections belong to huggingface_hub."""


# -------------------------------------------------------------------------------------------- errors
def _attempt(action: Callable[[], T], where: str, waits: Sequence[float] | None = None) -> T:
    """What `action` returns; it is tried again after failures that may pass, and its errors are explained."""
    left = list(WAITS if waits is None else waits)
    while True:
        try:
            return action()
        except MatexportError:
            raise
        except Exception as e:
            error = _explained(e, where)
            if error is None:
                raise
            if not left or not isinstance(error, Unreachable):
                raise error from e
        time.sleep(left.pop(0))


class Unreachable(MissingError):
    """The Hub, for now."""


def _explained(e: Exception, where: str) -> MatexportError | None:
    """An exception of huggingface_hub in our words (which hold no header and no URL), None if it is no such one."""
    from huggingface_hub import errors

    if isinstance(e, errors.LocalEntryNotFoundError) and isinstance(e.__cause__, Exception):
        e = e.__cause__  # it was looked for in the cache because of this
    http_error = errors.HfHubHTTPError.__mro__[1]  # the base of all errors of httpx, which huggingface_hub chooses
    status = e.response.status_code if isinstance(e, errors.HfHubHTTPError) else None
    if isinstance(e, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        fix = "unset HF_HUB_OFFLINE, or while online: hf download " + where.partition("@")[0]
        return MissingError("is not (all) in the cache, and offline mode is on", where=where, fix=fix)
    if isinstance(e, errors.GatedRepoError) or status == 403:
        return MissingError("is gated, and not open to you", where=where, fix=f"ask for access on its page and {LOGIN}")
    if isinstance(e, errors.RepositoryNotFoundError) or status == 401:
        what = "is neither a folder here nor a repository on the Hub that is open to you"
        return CheckpointError(what, where=where, fix=f"check the name; if it is a private one, {LOGIN}")
    if isinstance(e, errors.RevisionNotFoundError):
        return CheckpointError("has no such revision", where=where, fix="give a branch, a tag or a full commit hash")
    if isinstance(e, errors.RemoteEntryNotFoundError):
        return CheckpointError("is not in the repository", where=where, fix="give a revision that is complete")
    if isinstance(e, errors.HFValidationError):
        return CheckpointError("is no name of a repository", where=where, fix="give ORG/NAME[@REVISION]")
    if status is not None and status not in MAY_PASS:
        fix = "download the repository first: hf download " + where.partition("@")[0]
        return CheckpointError(f"the Hub answers {status}", where=where, fix=fix)
    if status is not None:
        return Unreachable(f"the Hub answers {status}", where=where, fix="try again later")
    if isinstance(e, OSError) and e.errno and e.strerror and not isinstance(e, ConnectionError):
        fix = "free some space, or set HF_HOME to another disk"
        return OutputError(f"the cache cannot be written: {e.strerror}", where=e.filename or where, fix=fix)
    if isinstance(e, http_error | OSError):
        what = f"the Hub cannot be reached ({type(e).__name__})"
        return Unreachable(what, where=where, fix="check the network (and HF_ENDPOINT, if it is set)")
    return None
