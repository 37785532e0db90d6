"""Runs that are killed or interrupted: afterwards nothing is lost, and the same command goes on and ends the same."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from faults import BLOCK, MARK, Act, Driver, Outcome, digests
from gemma import INNER, multimodal_checkpoint, tensors, text_checkpoint, text_config, write_gemma

RANDOM = random.Random(20)
WHEN = ("before", "half", "after")
# events, as shares of a run or counted from its start or its end; when; and the share at which the next run is killed
POINTS = [(RANDOM.random(), RANDOM.choice(WHEN), RANDOM.random() * 0.6) for _ in range(54)]
ENDS = [(number, when, 0.1) for number in (*range(5), *range(-7, 0)) for when in ("before", "after")]
TAIL = MARK + 10 * BLOCK  # most bytes that are written and not in the journal yet


@dataclass(frozen=True)
class Run:
    """A command, and what it does if nothing happens."""

    driver: Driver
    source: Path
    clean: Outcome
    want: dict[str, str]
    total: int  # bytes of weight files

    def __call__(self, output: Path, *options: str, act: Act | None = None, source: Path | None = None) -> Outcome:
        command = ["slice", "-m", source or self.source, "-o", output, "--max-shard-size", "300KB"]
        return self.driver.run(*command, *options, act=act)

    def number(self, event: float) -> int:
        """The number of an event: a share of the run, or counted from its start or its end."""
        count = len(self.clean.events)
        return int(event * count) if isinstance(event, float) else event % count

    def killed(self, output: Path, share: float = 0.6, **options: Any) -> Outcome:
        return self(output, act=Act(int(share * len(self.clean.events)), "kill", "half"), **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder, driver = tmp_path_factory.mktemp("kill"), Driver()
    source = text_checkpoint(folder / "source")
    run = Run(driver, source, Outcome(0, "", []), {}, 0)
    clean = run(folder / "clean")
    assert clean.code == 0, clean.stderr
    yield Run(driver, source, clean, digests(folder / "clean"), clean.written())
    driver.close()


def journals(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith(".journal")]


def finished(folder: Path) -> int:
    """Bytes of weights that a journal in a folder proves to be written (read here without matexport)."""
    marks: dict[str, int] = {}
    for journal in journals(folder):
        lines = journal.read_bytes().split(b"\n")[:-1]
        for mark in (json.loads(line) for line in lines):
            if "file" in mark:
                data = next(folder.rglob(mark["file"])).read_bytes()[: mark["bytes"]]
                assert (len(data), hashlib.sha256(data).hexdigest()) == (mark["bytes"], mark["sha256"])
                marks[mark["file"]] = max(marks.get(mark["file"], 0), mark["bytes"])
    return sum(marks.values())


def listing(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.exists() else []


# -------------------------------------------------------------------------------------- kill -9
@pytest.mark.parametrize("point", [*POINTS, *ENDS], ids=lambda point: f"{point[0]:.3g}-{point[1]}")
def test_killed_at_any_point(run: Run, tmp_path: Path, point: tuple[float, str, float]) -> None:
    """Killed, resumed and killed again, resumed: bit-identical, and only what was unfinished was written again."""
    event, when, again = point
    at, out = run.number(event), tmp_path / "out"
    acts = [Act(at, "kill", when), Act(int(again * len(run.clean.events)), "kill"), None]
    written = 0
    for act in acts:
        known = finished(tmp_path)
        done = run(out, act=act)
        assert done.code == (-9 if act and len(done.events) > act.at else 0), done.stderr
        assert known + done.written() >= written - TAIL, "more than what was unfinished is missing"
        if not act or len(done.events) <= act.at:
            assert done.written() == run.total - known
            assert done.written() <= run.total - written + TAIL
        written = max(written, known + done.written())
        if out.exists():
            break
    assert digests(out) == run.want
    if done.code:  # killed once it was in place
        assert run(out, "--force").code == 0
    assert listing(tmp_path) == ["out"]


def test_what_is_rewritten_can_be_too_much(run: Run, tmp_path: Path) -> None:
    """Negative control of the counts above."""
    assert run.killed(tmp_path / "out").code == -9
    assert 0.3 * run.total < finished(tmp_path) < 0.9 * run.total
    assert run(tmp_path / "out", "--no-resume").written() == run.total
    assert digests(tmp_path / "out") == run.want


def test_points_that_matter_are_hit(run: Run) -> None:
    """The points above lie in every kind of call, and before and after the renames."""
    hit = [run.clean.events[run.number(event)].call for event, _, _ in (*POINTS, *ENDS)]
    assert set(hit) == {event.call for event in run.clean.events}
    assert hit.count("pwrite") > 30
    assert len(hit) >= 50


# -------------------------------------------------------------------------------------- an older output
@pytest.fixture(scope="module")
def older(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output of another command, to be replaced."""
    folder = tmp_path_factory.mktemp("older") / "out"
    run(folder, "--dtype", "bfloat16")
    return folder


def placed(folder: Path, want: list[dict[str, str]]) -> bool:
    """Whether one of these outputs lies in its place, whole; what lies there is never a mix."""
    if (folder / "out").exists():
        assert digests(folder / "out") in want
    return (folder / "out").exists()


@pytest.fixture(scope="module")
def replacing(run: Run, older: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The calls of a run that replaces the older output."""
    folder = tmp_path_factory.mktemp("replacing")
    shutil.copytree(older, folder / "out")
    return [event.call for event in run(folder / "out", "--force").events]


REPLACING = [(-number, when) for number in range(1, 22) for when in ("before", "after")]


@pytest.mark.parametrize(("end", "when"), REPLACING, ids=str)
def test_killed_while_an_older_output_is_replaced(
    run: Run, older: Path, replacing: list[str], tmp_path: Path, end: int, when: str
) -> None:
    """The older output or the new one is there, whole; the next run leaves only the new one."""
    old, folder = digests(older), tmp_path
    shutil.copytree(older, folder / "out")
    assert run(folder / "out", "--force", act=Act(len(replacing) + end, "kill", when)).code == -9
    if not placed(folder, [old, run.want]):
        assert old in [digests(path) for path in folder.iterdir()], "the older output is lost"
    assert run(folder / "out", "--force").code == 0
    assert digests(folder / "out") == run.want
    assert listing(folder) == ["out"]


def test_killed_between_the_renames_and_then_a_full_disk(
    run: Run, older: Path, replacing: list[str], tmp_path: Path
) -> None:
    """What a killed run set aside outlives a next run that fails, too."""
    old, folder = digests(older), tmp_path
    shutil.copytree(older, folder / "out")
    run(folder / "out", "--force", act=Act(replacing.index("rename"), "kill", "after"))
    assert run(folder / "out", "--force", act=Act(40, "ENOSPC")).code == 1
    if not placed(folder, [old, run.want]):
        assert old in [digests(path) for path in folder.iterdir()]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("what", ["EIO", "EACCES", "int", "term"])
def test_a_rename_that_fails_keeps_the_older_output(
    run: Run, older: Path, replacing: list[str], tmp_path: Path, last: bool, what: str
) -> None:
    at, folder = [number for number, call in enumerate(replacing) if call == "rename"][-1 if last else 0], tmp_path
    shutil.copytree(older, folder / "out")
    when = "after" if what in ("int", "term") else "before"
    assert run(folder / "out", "--force", act=Act(at, what, when)).code == (130 if when == "after" else 1)
    assert placed(folder, [digests(older), run.want]), listing(folder)
    assert run(folder / "out", "--force").code == 0
    assert listing(folder) == ["out"]


# -------------------------------------------------------------------------------------- SIGINT, SIGTERM
@pytest.mark.parametrize("event", [0, 1, 2, 0.3, 0.7, 0.95, *range(-4, 0)])
@pytest.mark.parametrize("what", ["int", "term"])
def test_interrupted_at_any_point(run: Run, tmp_path: Path, what: str, event: float) -> None:
    """Exit code 130, a word on whether something was kept, and the same command completes it."""
    done = run(tmp_path / "out", act=Act(run.number(event), what, "before" if event in (0, 1) else "after"))
    assert done.code == 130, done.stderr
    assert "interrupted" in done.stderr
    assert "Traceback" not in done.stderr
    assert ("is kept: the same command goes on" in done.stderr) == (tmp_path / ".out.partial").exists()
    if not (tmp_path / "out").exists():
        known = finished(tmp_path)
        assert (known > 0) == (event not in (0, 1, 2))
        assert run(tmp_path / "out").written() == run.total - known
    assert digests(tmp_path / "out") == run.want
    assert listing(tmp_path) == ["out"]


# -------------------------------------------------------------------------------------- what is not trusted
def edited(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[Path], None]:
    """A change of the journal's lines."""

    def apply(folder: Path) -> None:
        [journal] = journals(folder.parent)
        journal.write_bytes(b"".join(change(journal.read_bytes().splitlines(keepends=True))))

    return apply


def marked(name: str, **changes: Any) -> Callable[[Path], None]:
    """A file of this name, and a mark in the journal that it is written."""

    def apply(folder: Path) -> None:
        with (folder / name).open("ab") as f:
            f.write(b"more")
        data = (folder / name).read_bytes()
        mark = {"file": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), **changes}
        edited(lambda lines: [*lines, json.dumps(mark).encode() + b"\n"])(folder)

    return apply


FIRST = "model-00001-of-00005.safetensors"


def flip(folder: Path) -> None:
    data = bytearray((folder / FIRST).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / FIRST).write_bytes(data)


def linked(link: Callable[[Path, Path], None], find: Callable[[Path], Path]) -> Callable[[Path], None]:
    """A file that is another name of one that belongs to somebody else, with the same content and some more."""

    def apply(folder: Path) -> None:
        path, precious = find(folder), folder.parent / "precious"
        precious.write_bytes(path.read_bytes() + b"no newline at the end")
        path.unlink()
        link(path, precious)

    return apply


def instead(make: Callable[[Path], object], find: Callable[[Path], Path]) -> Callable[[Path], None]:
    """Something else where a file was."""

    def apply(folder: Path) -> None:
        path = find(folder)
        path.unlink()
        make(path)

    return apply


def unfinished(folder: Path) -> Path:
    """The weights file that was being written."""
    return max(folder.glob("*.safetensors"))


def journal_of(folder: Path) -> Path:
    return journals(folder.parent)[0]


TAMPERED: dict[str, Callable[[Path], Any]] = {
    "more than is on disk": marked(FIRST, bytes=10**9),
    "another digest": edited(lambda lines: [line.replace(b'256": "', b'256": "0') for line in lines]),
    "another run": edited(lambda lines: [b'{"run": "' + b"0" * 64 + b'"}\n', *lines[1:]]),
    "no run": edited(lambda lines: lines[1:]),
    "garbage": edited(lambda lines: [random.Random(1).randbytes(4000)]),
    "garbage between": edited(lambda lines: [*lines[:4], random.Random(2).randbytes(50) + b"\n", *lines[4:]]),
    "a torn line": edited(lambda lines: [*lines[:-1], lines[-1][:9]]),
    "a torn first line": edited(lambda lines: [lines[0][:30]]),
    "nothing": edited(lambda lines: []),
    "a negative size": marked(FIRST, bytes=-1),
    "an infinite size": marked(FIRST, bytes=float("inf")),
    "no object": edited(lambda lines: [*lines, b"[]\n", b"3\n"]),
    "a deep line": edited(lambda lines: [*lines, b"[" * 100_000 + b"\n"]),
    "many digits": edited(lambda lines: [*lines, b"9" * 10_000 + b"\n"]),
    "a file of nobody": marked("stranger"),
    "a symbolic link for a file": linked(Path.symlink_to, unfinished),
    "a symbolic link for a finished file": linked(Path.symlink_to, lambda folder: folder / FIRST),
    "a hard link for a file": linked(Path.hardlink_to, unfinished),
    "a symbolic link for the journal": linked(Path.symlink_to, journal_of),
    "a hard link for the journal": linked(Path.hardlink_to, journal_of),
    "a folder for the journal": instead(Path.mkdir, journal_of),
    "a folder for a file": instead(Path.mkdir, unfinished),
    "no file": instead(lambda path: None, lambda folder: folder / FIRST),
    "a bit flipped": flip,
    "a file cut short": lambda folder: os.truncate(folder / FIRST, 5000),
    "a longer file": lambda folder: os.truncate(folder / FIRST, 10**6),
}


@pytest.mark.parametrize("how", TAMPERED)
def test_nothing_is_believed(run: Run, tmp_path: Path, how: str) -> None:
    """Whatever was done to what a killed run left, the next one ends as if nothing had been there."""
    assert run.killed(tmp_path / "out").code == -9
    TAMPERED[how](tmp_path / ".out.partial")
    precious = {path: path.read_bytes() for path in tmp_path.glob("precious")}
    done = run(tmp_path / "out")
    assert done.code == 0, done.stderr
    assert digests(tmp_path / "out") == run.want
    assert not any(path.is_symlink() or path.stat().st_nlink > 1 for path in (tmp_path / "out").glob("*.safetensors"))
    assert {path: path.read_bytes() for path in precious} == precious
    assert listing(tmp_path) == sorted(["out", *(path.name for path in precious)])


def test_a_flipped_bit_is_written_again_and_not_more(run: Run, tmp_path: Path) -> None:
    run.killed(tmp_path / "out")
    known, size = finished(tmp_path), (tmp_path / ".out.partial" / FIRST).stat().st_size
    flip(tmp_path / ".out.partial")
    written = run(tmp_path / "out").written()
    assert run.total - known + size // 2 <= written <= run.total - known + size // 2 + MARK + BLOCK


def test_another_command_starts_over(run: Run, tmp_path: Path) -> None:
    """Another row, dtype, shard size or source: nothing of the killed run is used."""
    (tmp_path / "rows.csv").write_text("name,FFN Hidden Dims\nhalf,32\n")
    for number, options in enumerate(
        [["-c", str(tmp_path / "rows.csv"), "-s", "half"], ["--dtype", "float16"], ["--max-shard-size", "200KB"]]
    ):
        folder = tmp_path / str(number)
        clean = run(folder / "clean", *options)
        run.killed(folder / "out")
        again = run(folder / "out", *options)
        assert again.written() == clean.written()
        assert digests(folder / "out") == digests(folder / "clean")


def test_a_source_that_changed_starts_over(run: Run, tmp_path: Path) -> None:
    source = shutil.copytree(run.source, tmp_path / "source")
    run.killed(tmp_path / "out", source=source)
    write_gemma(source, json.loads((source / "config.json").read_text()), tensors(text_config(), seed=1))
    clean = run(tmp_path / "clean", source=source)
    again = run(tmp_path / "out", source=source)
    assert again.written() == run.total == clean.written()
    assert digests(tmp_path / "out") == digests(tmp_path / "clean") != run.want


@pytest.mark.parametrize("options", [[], ["--strict"]], ids=["warned", "strict"])
def test_a_warning_outlives_the_run_that_gave_it(run: Run, tmp_path: Path, options: list[str]) -> None:
    """NaN in what was written before the kill is told, and refused with --strict, by the run that goes on."""
    config = {"architectures": ["Gemma3nForCausalLM"], **text_config()}
    weights = tensors(config)
    name = min(weights)
    weights[name].reshape(-1)[0] = np.nan
    source = write_gemma(tmp_path / "source", config, weights)
    run.killed(tmp_path / "out", 0.8, source=source)
    done = run(tmp_path / "out", *options, source=source)
    assert 0 < done.written() < run.total / 2  # the tensor was not read again
    assert done.stderr.count(f"tensor {name!r} holds NaN") == 1
    assert done.code == (4 if options else 0)
    assert (tmp_path / "out").exists() != bool(options)


def test_a_multimodal_source_in_shards(run: Run, tmp_path: Path) -> None:
    """bf16, towers, skipped layers and narrower ones, companions: resumed like everything else."""
    source = multimodal_checkpoint(tmp_path / "source")
    (source / "slices.csv").write_text('name,FFN Hidden Dims,Layers Skipped\ncut,"[32, 64, ...]","[0, 1]"\n')
    clean = run(tmp_path / "clean", "-s", "cut", source=source)
    for number, share in enumerate((0.3, 0.5, 0.8)):
        out = tmp_path / str(number) / "out"
        assert run(out, "-s", "cut", act=Act(int(share * len(clean.events)), "kill", "half"), source=source).code == -9
        assert finished(out.parent) > 0
        assert run(out, "-s", "cut", source=source).code == 0
        assert digests(out) == digests(tmp_path / "clean")
    assert any(name.startswith(INNER) for name in json.loads((out / "matexport.json").read_text())["tensors"])
