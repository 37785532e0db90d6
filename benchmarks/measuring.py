"""What the benchmarks share: runs in processes of their own, the page cache, ratios, facts of the machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Runs = dict[str, list[dict[str, float]]]  # way -> what was measured in each round
PAGE = 4096


# ------------------------------------------------------------------------------- in the child process
def report(work: Callable[[], None]) -> None:
    """Runs `work` and prints, as JSON, its seconds, bytes read by calls and from the disk, and peak memory."""
    before = _io()
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    after = _io()
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(line for line in status if line.startswith("VmHWM"))
    measured = {"seconds": seconds, "peak_mib": int(peak.split()[1]) / 1024}
    print(json.dumps(measured | {key: after[key] - before[key] for key in ("rchar", "read_bytes")}))


def _io() -> dict[str, int]:
    """What this process has read: `rchar` by calls (not through mappings), `read_bytes` from the disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return {key: int(value) for key, value in (line.split(": ") for line in lines)}


def sync_folder(folder: Path) -> None:
    """Forces a folder's files and the folder itself to the disk."""
    for target in (*folder.iterdir(), folder):
        fd = os.open(target, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def copy_folder(ready: Path, output: Path) -> None:
    """A copy of the same output bytes, synced."""
    output.mkdir()
    for path in ready.iterdir():
        shutil.copyfile(path, output / path.name)
    sync_folder(output)


# ------------------------------------------------------------------------------ in the parent process
def run(command: Sequence[str], output: Path, *, warm: Iterable[Path] = (), cold: Iterable[Path] = ()) -> Any:
    """One run in a process of its own, after old writes were synced and files were put into the page cache, or out."""
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    for path in warm:
        _into_cache(path)
    for path in cold:
        with path.open("rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-4000:]}\nexit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def _into_cache(path: Path) -> None:
    buffer = bytearray(4 << 20)
    with path.open("rb", buffering=0) as f:
        while f.readinto(buffer):
            pass


def files_of(*folders: Path) -> list[Path]:
    return [path for folder in folders for path in sorted(folder.iterdir())]


def rounds(ways: Sequence[str], count: int, once: Callable[[str], dict[str, float]], label: str) -> Runs:
    """Every way once in each round; each round begins with another one."""
    runs: Runs = {way: [] for way in ways}
    for k in range(count):
        for way in (*ways[k % len(ways) :], *ways[: k % len(ways)]):
            say(f"{label}: round {k + 1} of {count}, {way}")
            runs[way].append(once(way))
    return runs


def rounds_against(
    yardstick: str, ways: Sequence[str], count: int, once: Callable[[str], dict[str, float]], label: str
) -> Runs:
    """As `rounds`, with a run of the yardstick right before each run, whose `seconds` become multiples of its own.

    A disk is not as fast at the end of a round as at its start, nor right after gigabytes were deleted.
    """

    def one(way: str) -> dict[str, float]:
        before = once(yardstick)["seconds"]
        found = once(way)
        return {**found, "seconds": found["seconds"] / before}

    return rounds(ways, count, one, label)


def ratios(runs: Runs, above: str, below: str) -> dict[str, float]:
    """Median and range of a time over another one of the same round."""
    pairs = zip(runs[above], runs[below], strict=True)
    return spread([a["seconds"] / b["seconds"] for a, b in pairs])


def spread(values: Sequence[float]) -> dict[str, float]:
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {key: float(f"{value:.3g}") for key, value in found.items()}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def machine(folder: Path) -> dict[str, Any]:
    """Processor, memory, and the file system of a folder."""
    lines = [line.split(":") for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
    info = {key.strip(): value.strip() for key, value in lines}
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    above = {str(path) for path in (folder.resolve(), *folder.resolve().parents)}
    mount = max((m for m in mounts if m[1] in above), key=lambda m: len(m[1]))
    return {
        "cpu": info.get("model name", platform.machine()),
        "family": info.get("cpu family", ""),  # of AMD's: 25 is Zen 3 and 4, 26 is Zen 5
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "file_system": mount[2],
        "kernel": platform.release(),
        "load_average": round(os.getloadavg()[0], 2),  # before anything ran: what others did
    }


def cpu() -> str:
    """This processor's name and family, as they can stand in a file name: a virtual one does not say its generation."""
    found = machine(Path.cwd())
    return re.sub(r"[^a-z0-9]+", "-", f"{found['cpu']} {found['family']}".lower()).strip("-")


def versions(*packages: str) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def write_results(name: str, content: dict[str, Any]) -> Path:
    path = Path(__file__).parent / "results" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path
