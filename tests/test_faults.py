"""The thirty faults that this program must survive: what proves each, and those that no other file proves."""

from __future__ import annotations

import ast
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import matexport as mx
from faults import Act, Driver, Event, bounded_memory, digests, injected
from gemma import multimodal_checkpoint, tensors, text_checkpoint, text_config, write_gemma
from matexport import writer
from matexport.dims import Dims
from matexport.errors import CheckpointError, TableError, UsageError
from matexport.slice_table import Row, format_table, parse_table
from matexport.staging import staged_folder
from support import REPOSITORY, content, matexport

TABLE, CHECKPOINT, WRITER = "test_slice_table.py", "test_checkpoint.py", "test_writer.py"
PICKLES, KILL, FAULTS_FILE = "test_pickles.py", "test_kill.py", "test_faults.py"
MATMAMBA, SKIPS = "families/matmamba/test_matmamba.py", "families/gemma3n/test_skips.py"
SLICES = "families/gemma3n/test_slices.py"

FAULTS = {  # what each is stands in the comment; the tests that prove it: file -> functions
    1: {TABLE: ["test_refused_cells"]},  # a cell with code
    2: {TABLE: ["test_refused_cells"]},  # powers, nested parentheses, a million digits
    3: {TABLE: ["test_cell_size_is_bounded", "test_tables_are_bounded"], FAULTS_FILE: ["test_lists_have_a_budget"]},
    4: {TABLE: ["test_variations_of_the_format", "test_refused_tables", "test_seed_style_table"],
        FAULTS_FILE: ["test_quoted_newlines"]},
    5: {TABLE: ["test_refused_tables"]},  # duplicate names
    6: {MATMAMBA: ["test_rows_that_do_not_fit"], SKIPS: ["test_other_refusals"]},  # length of a list
    7: {MATMAMBA: ["test_rows_that_do_not_fit"], FAULTS_FILE: ["test_widths_that_no_layer_has"]},
    8: {MATMAMBA: ["test_rows_that_do_not_fit"], SKIPS: ["test_other_refusals"],
        FAULTS_FILE: ["test_reserved_layers"]},
    9: {FAULTS_FILE: ["test_a_skip_that_breaks_the_pattern_is_noted"]},
    10: {TABLE: ["test_names_are_safe_to_print"], "cli/test_cli.py": ["test_names_reach_no_terminal_unescaped"]},
    11: {TABLE: ["test_formulas_are_defused_when_written"]},
    12: {CHECKPOINT: ["test_damaged_headers", "test_header_above_the_limit"]},
    13: {CHECKPOINT: ["test_damaged_headers"]},  # overlaps and holes
    14: {CHECKPOINT: ["test_damaged_indexes"]},
    15: {CHECKPOINT: ["test_tensors_that_do_not_fit_the_config"], SLICES: ["test_a_config_that_contradicts_itself"]},
    16: {WRITER: ["test_weights_that_are_not_finite"], KILL: ["test_a_warning_outlives_the_run_that_gave_it"]},
    17: {CHECKPOINT: ["test_tensors_that_do_not_fit_the_config"], SLICES: ["test_an_unknown_tensor_is_named"]},
    18: {CHECKPOINT: ["test_damaged_headers", "test_configs"]},  # quantised
    19: {"families/matmamba/test_language.py": ["test_untied_heads"], FAULTS_FILE: ["test_tied_weights"]},
    20: {PICKLES: ["test_globals_that_could_run_code", "test_zip_bombs_and_compression", "test_the_command_line"]},
    21: {CHECKPOINT: ["test_configs", "test_custom_code_is_not_run_and_told"],
         FAULTS_FILE: ["test_custom_code_of_a_gemma_is_ignored_and_told"]},
    22: {WRITER: ["test_a_full_disk", "test_the_disk_fills_up_for_real"],
         FAULTS_FILE: ["test_a_disk_that_fills_up", "test_a_disk_that_is_too_small", "test_calls_that_fail"]},
    23: {FAULTS_FILE: ["test_short_reads", "test_reads_that_fail", "test_calls_that_fail"]},
    24: {KILL: ["test_interrupted_at_any_point", "test_a_rename_that_fails_keeps_the_older_output"]},
    25: {KILL: ["test_killed_at_any_point", "test_killed_while_an_older_output_is_replaced"]},
    26: {WRITER: ["test_outputs_that_are_refused", "test_force_replaces_only_what_matexport_wrote"]},
    27: {WRITER: ["test_two_runs_into_one_output", "test_the_lock_is_on_the_folder_itself"],
         FAULTS_FILE: ["test_a_second_process_is_refused", "test_a_lock_on_a_folder_that_is_gone"]},
    28: {WRITER: ["test_a_source_that_changes_during_the_run"], KILL: ["test_a_source_that_changed_starts_over"],
         FAULTS_FILE: ["test_a_source_that_shrinks_during_the_run"]},
    29: {WRITER: ["test_a_read_only_folder", "test_a_symlinked_output_is_written_through",
                  "test_modes_follow_the_umask"],
         FAULTS_FILE: ["test_calls_that_fail", "test_links_as_outputs", "test_names_that_differ_in_case_only"]},
    30: {WRITER: ["test_everything_is_synced_before_the_rename"], FAULTS_FILE: ["test_the_order_of_syncs"]},
}  # fmt: skip


@pytest.mark.parametrize("number", range(1, 31))
def test_each_fault_has_its_tests(number: int) -> None:
    for file, names in FAULTS[number].items():
        tree = ast.parse((REPOSITORY / "tests" / file).read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert names
        assert set(names) <= functions, file


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_checkpoint(tmp_path_factory.mktemp("faults") / "source")


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    driver = Driver()
    yield driver
    driver.close()


# -------------------------------------------------------------------------------------- tables
def test_lists_have_a_budget() -> None:
    """A few kilobytes of CSV that ask for gigabytes of lists."""
    table = "name,FFN Hidden Dims,Mamba Dims\n" + "".join(f"r{i},[1] * 100000,[1] * 100000\n" for i in range(2000))
    with bounded_memory(), pytest.raises(TableError):
        parse_table(table)


def test_quoted_newlines() -> None:
    rows = parse_table('name,FFN Hidden Dims,Note\n"two\nlines","[8,\n 4]","a\nb"\nnext,8,\n').rows
    assert [row.name for row in rows] == ["two\nlines", "next"]
    assert rows[0].ffn == Dims(head=(8, 4))
    assert rows[0].metrics == {"Note": "a\nb"}
    assert parse_table(format_table(rows)).rows == rows


@pytest.mark.parametrize("width", ["0", "65", "[64] * 9 + [65]", "[64] * 9 + [0]", "-8", "2147483648"])
def test_widths_that_no_layer_has(source: Path, width: str) -> None:
    with pytest.raises(TableError, match="FFN Hidden Dims"):
        mx.plan(source, "r", table=parse_table(f'name,FFN Hidden Dims\nr,"{width}"\n'))


@pytest.mark.parametrize("skipped", [(4,), (5,), (4, 5), (4, 6), (5, 7)])
def test_reserved_layers(source: Path, skipped: tuple[int, ...]) -> None:
    with pytest.raises(TableError, match="reserved"):
        mx.plan(source, Row("r", skipped=skipped))


def test_a_skip_that_breaks_the_pattern_is_noted(tmp_path: Path) -> None:
    source = text_checkpoint(tmp_path / "source", "ssssf" * 4, shared=5)
    whole, cut = (mx.plan(source, Row("r", skipped=skipped)) for skipped in ((), (1,)))
    assert not any("every fifth layer" in note for note in whole.plan.notes)
    assert any("every fifth layer" in note for note in cut.plan.notes)
    assert len(cut.plan.layers) == 19


# -------------------------------------------------------------------------------------- checkpoints
def test_tied_weights(tmp_path: Path) -> None:
    """A tied head that is stored twice is written once; without its embedding it is no model."""
    config = {"architectures": ["Gemma3nForCausalLM"], **text_config()}
    weights = tensors(config)
    embedding = "model.embed_tokens.weight"
    single = mx.plan(write_gemma(tmp_path / "single", config, weights)).plan
    double = write_gemma(tmp_path / "double", config, {**weights, "lm_head.weight": weights[embedding].copy()})
    assert set(mx.plan(double).plan.tensors) == set(single.tensors)
    alone = {**weights, "lm_head.weight": weights[embedding]}
    del alone[embedding]
    with pytest.raises(CheckpointError, match=r"missing \['model.embed_tokens.weight'\]"):
        mx.plan(write_gemma(tmp_path / "alone", config, alone))


@pytest.mark.parametrize("make", [text_checkpoint, multimodal_checkpoint])
def test_custom_code_of_a_gemma_is_ignored_and_told(tmp_path: Path, make: Any) -> None:
    source = make(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Model"}}))
    (source / "evil.py").write_text("raise SystemExit")
    result = matexport("slice", "-m", source, "-o", tmp_path / "out")
    assert result.code == 0
    assert "evil" not in (tmp_path / "out" / "config.json").read_text()
    assert "auto_map" in result.stderr


# -------------------------------------------------------------------------------------- writing
def small_disk(folder: Path, size: int) -> Driver | None:
    """A driver with a disk of its own; None where this machine does not allow it."""
    folder.mkdir()
    driver = None
    try:
        driver = Driver(disk=folder, size=size)
        driver.content(folder)
    except (ValueError, OSError):  # no answer, or no such program
        if driver:
            driver.close()
        return None
    return driver


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("force", [False, True], ids=["new", "force"])
def test_a_disk_that_fills_up(source: Path, tmp_path: Path, share: float, force: bool) -> None:
    """Somebody else takes what is left in the middle of the weights: a message, and only the older output is there."""
    small = small_disk(tmp_path / "disk", 8 << 20)
    driver, out = small or Driver(), tmp_path / "disk" / "out"
    command = ["slice", "-m", source, "-o", out, "--max-shard-size", "300KB", "--force"]
    if force:
        assert driver.run(*command, "--dtype", "bfloat16").code == 0
    before = driver.content(tmp_path / "disk")
    act = Act(int(share * 390), "fill") if small else Act(int(share * 390), "ENOSPC", "half")
    done = driver.run(*command, act=act)
    after = driver.content(tmp_path / "disk")
    driver.close()
    assert done.code == 1
    assert "No space left on device" in done.stderr
    assert "free some space" in done.stderr
    assert ("hog" in after) == (small is not None)
    assert {name: digest for name, digest in after.items() if name != "hog"} == before


def test_a_disk_that_is_too_small(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written to a disk that cannot hold all of it."""
    small = small_disk(tmp_path / "disk", 1 << 20)
    if small is None:
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
        result: Any = matexport("slice", "-m", source, "-o", tmp_path / "disk" / "out")
    else:
        result = small.run("slice", "-m", source, "-o", tmp_path / "disk" / "out")
        assert not any(event.file.endswith(".safetensors") for event in result.events)
        assert small.content(tmp_path / "disk") == {}
        small.close()
    assert result.code == 1
    assert "bytes are needed and" in result.stderr
    assert digests(tmp_path / "disk") == {}


Clean = tuple[list[str], list[Event], dict[str, str]]


@pytest.fixture(scope="module")
def clean(source: Path, driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> Clean:
    """A command without its output, what it does if nothing happens, and what it leaves."""
    folder = tmp_path_factory.mktemp("clean")
    command = ["slice", "-m", str(source), "--max-shard-size", "1MB", "-o"]
    return command, driver.run(*command, folder / "out").events, digests(folder)


@pytest.mark.parametrize("error", ["ENOSPC", "EIO", "EDQUOT", "EROFS", "EACCES"])
@pytest.mark.parametrize("call", ["mkdir", "append", "ftruncate", "pwrite", "fsync", "rename"])
def test_calls_that_fail(clean: Clean, driver: Driver, tmp_path: Path, call: str, error: str) -> None:
    """Each kind of call, its first time and its last time: exit code 1, where and why and the fix, nothing left."""
    command, events, complete = clean
    at = [number for number, event in enumerate(events) if event.call == call]
    for number in (at[0], at[-1]):
        folder = tmp_path / str(number)
        done = driver.run(*command, folder / "out", act=Act(number, error, "half"))
        assert done.code == 1, done.stderr
        assert f"cannot be written: {os.strerror(getattr(errno, error))}" in done.stderr
        assert "fix: " in done.stderr
        assert "Traceback" not in done.stderr
        assert not folder.exists() or digests(folder) in ({}, complete)
        assert (number == at[-1] and call == "fsync") or not (folder / "out").exists()  # after the rename


def test_hashing_may_lag_behind_writing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digests are those of the files, however late the hashing thread gets its turn."""

    class Late:
        """Hashes a block when its digest is asked for."""

        def __init__(self, function: Any, arguments: Any):
            self.result = lambda: function(*arguments)

    class Executor:
        def __init__(self, workers: int):
            pass

        def __enter__(self) -> Executor:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def submit(self, function: Any, *arguments: Any) -> Late:
            return Late(function, arguments)

    monkeypatch.setattr(writer, "ThreadPoolExecutor", Executor)
    with injected():
        mx.plan(source, Row("r", ffn=Dims(fill=32))).write(tmp_path / "out")
    files = json.loads((tmp_path / "out" / "matexport.json").read_text())["files"]
    for name, entry in files.items():
        assert entry["sha256"] == hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest(), name


def test_the_order_of_syncs(source: Path, driver: Driver, tmp_path: Path) -> None:
    """Every file is synced after its last write and before the rename, the folder above after it."""
    done = driver.run("slice", "-m", source, "-o", tmp_path / "out", "--max-shard-size", "300KB")
    calls = [(event.call, event.file) for event in done.events]
    renamed = calls.index(("rename", str(tmp_path / ".out.partial")))
    last = {call: number for number, call in enumerate(calls)}
    assert len(content(tmp_path / "out")) > 8
    for name in content(tmp_path / "out"):
        file = str(tmp_path / ".out.partial" / name)
        assert last["pwrite", file] < last["fsync", file] < renamed
    assert last["fsync", str(tmp_path / ".out.partial")] < renamed < last["fsync", str(tmp_path)]


# -------------------------------------------------------------------------------------- reading
def test_short_reads(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system may give fewer bytes than were asked for."""
    matexport("slice", "-m", source, "-o", tmp_path / "clean")
    real, lengths = os.preadv, []

    def short(fd: int, buffers: list[memoryview], offset: int, *flags: int) -> int:
        lengths.append(real(fd, [buffers[0][:999]], offset, *flags))
        return lengths[-1]

    monkeypatch.setattr(os, "preadv", short)
    assert matexport("slice", "-m", source, "-o", tmp_path / "out").code == 0
    assert len(lengths) > 1200
    assert content(tmp_path / "out") == content(tmp_path / "clean")


@pytest.mark.parametrize("number", [0, 1, 2, 3, 40, 200])
@pytest.mark.parametrize("how", ["EIO", "ESTALE", "ends"])
def test_reads_that_fail(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, number: int) -> None:
    """A read that fails or finds the end, in the header and in the weights: exit code 4, the file and the byte."""
    real, offsets = os.preadv, []

    def failing(fd: int, buffers: list[memoryview], offset: int, *flags: int) -> int:
        if flags:  # a look into the page cache, which may fail
            raise BlockingIOError
        offsets.append(offset)
        if len(offsets) != number + 1:
            return real(fd, buffers, offset)
        if how == "ends":
            return 0
        raise OSError(getattr(errno, how), os.strerror(getattr(errno, how)))

    monkeypatch.setattr(os, "preadv", failing)
    result = matexport("slice", "-m", source, "-o", tmp_path / "out")
    assert result.code == 4
    words = f"ends at byte {offsets[number]}" if how == "ends" else f"reading at byte {offsets[number]} failed"
    assert f"{source}/model.safetensors: {words}" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_shrinks_during_the_run(tmp_path: Path) -> None:
    source = text_checkpoint(tmp_path / "source")
    file = source / "model.safetensors"
    size = file.stat().st_size // 2
    with pytest.raises(CheckpointError, match=f"ends at byte {size}, inside a tensor"):
        mx.plan(source).write(tmp_path / "out", progress=lambda count: os.truncate(file, size))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


# -------------------------------------------------------------------------------------- outputs
def test_a_second_process_is_refused(source: Path, driver: Driver, tmp_path: Path) -> None:
    """While one process writes, another one is refused and disturbs nothing; afterwards it is not."""
    refused = []

    def second(_: int) -> None:
        if not refused:
            refused.append(driver.run("slice", "-m", source, "-o", tmp_path / "out"))

    mx.plan(source).write(tmp_path / "out", progress=second)
    assert refused[0].code == 2
    assert "another run is writing this output" in refused[0].stderr
    assert not [event for event in refused[0].events if event.call not in ("mkdir",)]
    again = driver.run("slice", "-m", source, "-o", tmp_path / "out", "--force")
    assert again.code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_lock_on_a_folder_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening the folder and locking it, another run finished and a third one began: it is not disturbed."""
    staging, real = tmp_path / ".out.partial", fcntl.flock

    def late(fd: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        staging.rename(tmp_path / "finished")
        staging.mkdir()
        (staging / "theirs").write_text("precious")
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(UsageError, match="another run"), staged_folder(tmp_path / "out"):
        pass
    assert (staging / "theirs").read_text() == "precious"


def test_links_as_outputs(source: Path, tmp_path: Path) -> None:
    """A link to an output, or to nothing yet: what it points to is written and replaced, the link stays."""
    (tmp_path / "link").symlink_to(tmp_path / "real")
    mx.plan(source).write(tmp_path / "link")
    assert (tmp_path / "real" / "model.safetensors").is_file()
    mx.plan(source, Row("r", ffn=Dims(fill=8))).write(tmp_path / "link", force=True)
    assert (tmp_path / "link").readlink() == tmp_path / "real"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]
    assert not (tmp_path / "real").is_symlink()


def test_names_that_differ_in_case_only(tmp_path: Path) -> None:
    """They would be one file on other file systems: ours come first, two of the source's are refused."""
    source = text_checkpoint(tmp_path / "source")
    for name in ("Notice", "Readme.md", "MATEXPORT.json", "LICENSE.txt"):
        (source / name).write_text("theirs")
    mx.plan(source).write(tmp_path / "out")
    names = [path.name for path in (tmp_path / "out").iterdir()]
    assert len({name.casefold() for name in names}) == len(names)
    assert {"NOTICE", "README.md", "matexport.json", "LICENSE.txt"} <= set(names)
    assert "theirs" not in (tmp_path / "out" / "README.md").read_text()
    (source / "LICENSE.TXT").write_text("theirs, too")
    with pytest.raises(mx.MatexportError, match="two files are called"):
        mx.plan(source).write(tmp_path / "again")
    assert not (tmp_path / "again").exists()
