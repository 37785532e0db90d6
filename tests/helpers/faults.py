"""Faults at chosen points: every call that changes a disk is an event, and something happens at one of them.

As a program it is a driver that has imported matexport once and forks a process for each command it is asked
to run: hundreds of runs can be killed in seconds.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from matexport import writer
from matexport.journal import Journal

CALLS = ("mkdir", "pwrite", "ftruncate", "truncate", "fsync", "rename", "replace", "unlink", "rmdir")
BLOCK, MARK = 8 << 10, 32 << 10  # small, so that marks lie inside small files


@dataclass(frozen=True)
class Event:
    """A call that changes the disk: its name, the name of the file, and the bytes written."""

    call: str
    file: str
    size: int = 0


@dataclass(frozen=True)
class Act:
    """What happens at event number `at`.

    Attributes:
        what: "kill", "int" or "term" (signals), "fill" (somebody else takes the rest of the disk), or the name
            of an error such as "ENOSPC", which that event then fails with.
        when: "before" the call, "after" it, or "half"-way (a write that wrote half of its bytes).
    """

    at: int
    what: str
    when: str = "before"

    def __call__(self, file: str) -> None:
        if self.what in SIGNALS:
            os.kill(os.getpid(), SIGNALS[self.what])
        elif self.what == "fill":
            fill(Path(os.environ["FAULTS_DISK"]))
        else:
            number = getattr(errno, self.what)
            raise OSError(number, os.strerror(number), file)


@contextlib.contextmanager
def bounded_memory(size: int = 1 << 28) -> Iterator[None]:
    """Lets this process allocate at most so many bytes more: what asks for more gets a MemoryError."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


SIGNALS = {"kill": signal.SIGKILL, "int": signal.SIGINT, "term": signal.SIGTERM}


def fill(disk: Path) -> None:
    """Writes a file until there is no space left."""
    size = 1 << 20
    with (disk / "hog").open("wb", buffering=0) as hog:
        while size:
            try:
                hog.write(b"\0" * size)
            except OSError:
                size //= 2


@contextlib.contextmanager
def injected(act: Act | None = None, log: Callable[[Event], None] = lambda event: None) -> Iterator[None]:
    """Tells `log` of each event before it happens, and acts at one. Threads have their events one after the other."""
    count, turn = -1, threading.RLock()

    def wrapped(call: str, real: Callable[..., Any], half: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            with turn:
                count += 1
                event = _event(call, arguments)
                log(event)
                when = act.when if act and act.at == count else ""
                if act and when == "before":
                    act(event.file)
                if act and when == "half":
                    half(*arguments, **options)
                    act(event.file)
                try:
                    return real(*arguments, **options)
                finally:
                    if act and when == "after":
                        act(event.file)

        return replacement

    def nothing(*_: Any, **__: Any) -> None:
        """Calls other than writes happen or do not."""

    pwrite = os.pwrite

    def half_write(fd: int, data: Any, offset: int) -> None:
        pwrite(fd, data[: len(data) // 2], offset)

    def half_line(journal: Journal, entry: dict[str, Any]) -> None:
        with journal.path.open("a") as f:
            f.write(json.dumps(entry)[: len(json.dumps(entry)) // 2])

    with contextlib.ExitStack() as stack:
        for call in CALLS:
            half = half_write if call == "pwrite" else nothing
            stack.enter_context(mock.patch.object(os, call, wrapped(call, getattr(os, call), half)))
        append = wrapped("append", Journal._add, half_line)
        stack.enter_context(mock.patch.object(Journal, "_add", lambda *arguments: append(*arguments)))
        stack.enter_context(mock.patch.object(writer, "BLOCK", BLOCK))
        stack.enter_context(mock.patch.object(writer, "MARK", MARK))
        yield


def _event(call: str, arguments: tuple[Any, ...]) -> Event:
    target = arguments[0]
    if call == "append":
        return Event(call, str(target.path))
    file = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.fspath(target)
    return Event(call, file, len(arguments[1]) if call == "pwrite" else 0)


# -------------------------------------------------------------------------------------- the driver
@dataclass(frozen=True)
class Outcome:
    """What a command did: its exit code (negative: the signal that ended it), its stderr and its events."""

    code: int
    stderr: str
    events: list[Event]

    def written(self, ending: str = ".safetensors") -> int:
        """Bytes written to files of this kind."""
        return sum(e.size for e in self.events if e.call == "pwrite" and e.file.endswith(ending))


class Driver:
    """A process that runs matexport's command line in processes of its own.

    Args:
        disk: a folder at which it mounts a small disk that only its children and `content` see.
    """

    def __init__(self, *, disk: Path | None = None, size: int = 0):
        command = [sys.executable, __file__]
        if disk:
            command = ["unshare", "--user", "--map-root-user", "--mount", *command, str(disk), str(size)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        environment |= {"FAULTS_DISK": str(disk)} if disk else {}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, **job: Any) -> Any:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def run(self, *arguments: str | Path, act: Act | None = None) -> Outcome:
        """`matexport ARGUMENTS` through its console script's function."""
        found = self.ask(arguments=list(map(str, arguments)), act=asdict(act) if act else None)
        return Outcome(found["code"], found["stderr"], [Event(*event) for event in found["events"]])

    def content(self, folder: Path) -> dict[str, str]:
        """Every file of a folder and its SHA-256, as the driver sees it."""
        found: dict[str, str] = self.ask(content=str(folder))
        return found

    def close(self) -> None:
        self.process.communicate()  # closes its input, at which it ends


def digests(folder: Path) -> dict[str, str]:
    """Every file of a folder and its SHA-256; folders end in a slash."""
    from matexport.manifest import file_digest

    return {
        str(p.relative_to(folder)) + "/" * p.is_dir(): "" if p.is_dir() else file_digest(p)
        for p in sorted(folder.rglob("*"))
    }


def _serve() -> None:
    if len(sys.argv) > 1:
        options = ["-t", "tmpfs", "-o", f"size={sys.argv[2]}", "none", sys.argv[1]]
        subprocess.run(["mount", *options], check=True)
    import matexport.cli.slice
    import matexport.families.gemma3n  # noqa: F401

    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(digests(Path(job["content"])) if "content" in job else _fork(job)), flush=True)


def _fork(job: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryFile() as events, tempfile.TemporaryFile() as stderr:
        child = os.fork()
        if not child:
            os.dup2(stderr.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_RDWR), 1)
            os._exit(_run(job, events.fileno()))
        _, status = os.waitpid(child, 0)
        events.seek(0)
        stderr.seek(0)
        lines = [json.loads(line) for line in events]
        return {"code": os.waitstatus_to_exitcode(status), "stderr": stderr.read().decode(), "events": lines}


def _run(job: dict[str, Any], log: int) -> int:
    from matexport.cli.main import run

    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["matexport", *job["arguments"]]
    act = Act(**job["act"]) if job["act"] else None
    write = os.write
    try:
        with injected(act, lambda e: (write(log, json.dumps([e.call, e.file, e.size]).encode() + b"\n"), None)[1]):
            run()
    except SystemExit as e:
        return int(e.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        return 99
    finally:
        sys.stderr.flush()
    return 98


if __name__ == "__main__":
    _serve()
