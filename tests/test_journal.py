"""The journal of a run: what it notes is found again, what it cannot prove is not believed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matexport.journal import Journal, clear

RUN, FILE, DATA = "0" * 64, "model.safetensors", bytes(range(256)) * 40


def opened(folder: Path, run: str = RUN) -> Journal:
    folder.mkdir(parents=True, exist_ok=True)
    return Journal(folder, run)


def sha256(size: int) -> str:
    return hashlib.sha256(DATA[:size]).hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a run left that was killed: a file with marks at 1000 and 5000 of its bytes, and a warning."""
    folder = tmp_path / ".out.partial"
    journal = opened(folder)
    (folder / FILE).write_bytes(DATA)
    journal.mark(FILE, 1000, sha256(1000))
    journal.warn("tensor 'a' holds NaN")
    journal.mark(FILE, 5000, sha256(5000))
    return folder


def test_a_new_one(tmp_path: Path) -> None:
    journal = opened(tmp_path / ".out.partial")
    size, seen = journal.written(FILE)
    assert (size, seen.hexdigest()) == (0, sha256(0))
    assert journal.warnings == []
    assert journal.resumed == 0
    assert [json.loads(line) for line in journal.path.read_text().splitlines()] == [{"run": RUN}]


def test_the_last_mark_that_holds_is_found_again(folder: Path) -> None:
    for _ in range(2):  # reading changes nothing
        journal = opened(folder)
        size, seen = journal.written(FILE)
        assert size == journal.resumed == 5000
        seen.update(DATA[5000:])
        assert seen.hexdigest() == sha256(len(DATA))  # a run goes on with the digest
        assert journal.warnings == ["tensor 'a' holds NaN"]
        assert journal.written("another file")[0] == 0


def test_lines_are_whole_once_they_are_written(folder: Path) -> None:
    """Each is on the disk's side of the process at once: a kill loses none."""
    journal = opened(folder)
    journal.mark(FILE, 7000, sha256(7000))
    assert json.loads(journal.path.read_bytes().splitlines()[-1])["bytes"] == 7000
    assert opened(folder).written(FILE)[0] == 7000


def test_warnings_are_noted_once(folder: Path) -> None:
    journal = opened(folder)
    for text in ("tensor 'a' holds NaN", "b", "b"):
        journal.warn(text)
    assert journal.warnings == ["tensor 'a' holds NaN", "b"]
    assert opened(folder).warnings == journal.warnings
    assert journal.path.read_text().count("warn") == 2


def test_marks_in_any_order(folder: Path) -> None:
    journal = opened(folder)
    journal.mark(FILE, 3000, sha256(3000))
    assert opened(folder).written(FILE)[0] == 5000


@pytest.mark.parametrize(
    ("change", "left"),
    [
        (lambda data: data, 5000),
        (lambda data: data[:4999], 1000),
        (lambda data: data[:999], 0),
        (lambda data: b"", 0),
        (lambda data: data[:3000] + b"\xff" + data[3001:], 1000),
        (lambda data: b"\xff" + data[1:], 0),
        (lambda data: data[:5000] + b"\xff" + data[5001:], 5000),
        (lambda data: data * 2, 5000),
    ],
    ids=["as it is", "short", "shorter", "empty", "changed", "changed at once", "changed after", "longer"],
)
def test_what_is_on_the_disk_counts(folder: Path, change: Callable[[bytes], bytes], left: int) -> None:
    (folder / FILE).write_bytes(change(DATA))
    size, seen = opened(folder).written(FILE)
    assert (size, seen.hexdigest()) == (left, sha256(left))


def test_a_file_that_is_gone(folder: Path) -> None:
    (folder / FILE).unlink()
    assert opened(folder).written(FILE)[0] == 0


def test_another_run_starts_over(folder: Path) -> None:
    journal = opened(folder, "1" * 64)
    assert not (folder / FILE).exists()
    assert journal.warnings == []
    assert journal.written(FILE)[0] == 0
    assert opened(folder).written(FILE)[0] == 0  # nor does the first one come back


def test_what_is_not_of_the_run_is_removed(folder: Path) -> None:
    for name in ("config.json", "stranger"):
        (folder / name).write_text("old")
    (folder / "tree" / "inside").mkdir(parents=True)
    (folder / "link").symlink_to(folder.parent)
    opened(folder)
    assert {path.name for path in folder.iterdir()} - {".journal"} == {FILE}
    assert folder.parent.is_dir()


BROKEN = {
    "garbage": b"\xff\xfe garbage\n",
    "an empty line": b"\n",
    "a list": b"[]\n",
    "a number": b"3\n",
    "a text": b'"warn"\n',
    "null": b"null\n",
    "no size": b'{"file": "x", "sha256": ""}\n',
    "no number": b'{"file": "x", "bytes": "many", "sha256": ""}\n',
    "an infinite number": b'{"file": "x", "bytes": Infinity, "sha256": ""}\n',
    "not a number": b'{"file": "x", "bytes": NaN, "sha256": ""}\n',
    "many digits": b"9" * 10_000 + b"\n",
    "depth": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("line", BROKEN.values(), ids=BROKEN)
def test_a_journal_with_a_broken_line_is_no_journal(folder: Path, line: bytes) -> None:
    path = opened(folder).path
    path.write_bytes(path.read_bytes() + line + path.read_bytes())
    journal = opened(folder)
    assert journal.written(FILE)[0] == 0
    assert not (folder / FILE).exists()
    assert journal.warnings == []
    journal.warn("tensor 'a' holds NaN")  # is noted again, for the file is written again
    assert opened(folder).warnings == ["tensor 'a' holds NaN"]


@pytest.mark.parametrize("cut", [1, 20, 60, 100])
def test_a_torn_last_line_is_cut_off(folder: Path, cut: int) -> None:
    path = opened(folder).path
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:-cut])
    journal = opened(folder)
    assert journal.written(FILE)[0] == 1000
    journal.mark(FILE, 6000, sha256(6000))
    assert opened(folder).written(FILE)[0] == 6000  # what follows does not stick to the torn line


def test_links_are_not_followed(folder: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("no newline at the end")
    path = opened(folder).path
    path.unlink()
    path.symlink_to(precious)
    opened(folder).mark(FILE, 1000, sha256(1000))
    assert precious.read_text() == "no newline at the end"
    assert not path.is_symlink()


@given(st.lists(st.tuples(st.integers(0, 12_000), st.booleans()), max_size=5), st.integers(0, len(DATA)))
@settings(max_examples=100, derandomize=True, deadline=None, database=None)
def test_only_right_marks_on_what_is_there(
    tmp_path_factory: pytest.TempPathFactory, marks: list[tuple[int, bool]], size: int
) -> None:
    """Against the definition: the largest right mark within the file, if every smaller one is right."""
    folder = tmp_path_factory.mktemp("journal") / ".out.partial"
    journal = opened(folder)
    (folder / FILE).write_bytes(DATA[:size])
    for end, right in marks:
        journal.mark(FILE, end, sha256(end) if right else "0" * 64)
    found, seen = opened(folder).written(FILE)
    assert seen.hexdigest() == sha256(found)
    good = [end for end, right in marks if right and end <= size]
    assert found in {0, *good}
    if all(right for _, right in marks):
        assert found == max(good, default=0)


def test_clear(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    (tmp_path / "b").mkdir()
    (tmp_path / "c").symlink_to(tmp_path / "a")
    clear(tmp_path, keep=["a"])
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
