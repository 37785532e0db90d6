"""Writing checkpoints: nothing half-written, nothing lost, the same bytes every time."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import matexport as mx
from matexport.checkpoint import open_checkpoint
from matexport.dims import Dims
from matexport.errors import CheckpointError, OutputError, UsageError
from matexport.slice_table import Row
from matexport.staging import staged_folder
from support import content, matexport, vision_checkpoint, vision_config, vision_tensors, write_checkpoint

ROW = Row("mixed", skipped=(1,), mamba=Dims(head=(32, 5)))


def test_the_files_of_a_slice(vision: Path, tmp_path: Path) -> None:
    planned = mx.plan(vision, ROW)
    planned.write(tmp_path / "out")
    assert sorted(content(tmp_path / "out")) == [
        "README.md", "config.json", "matexport.json", "model.safetensors", "modeling_matmamba.py",
    ]  # fmt: skip
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as f:  # the library, not our own reader
        assert set(f.keys()) == set(planned.plan.tensors)
        assert f.metadata().keys() == {"format", "notice"}
        for name, tensor in planned.plan.tensors.items():
            want = tensor.view.of(planned.checkpoint.read(tensor.view.source))
            assert np.array_equal(f.get_tensor(name), want)
    manifest = json.loads((tmp_path / "out" / "matexport.json").read_text())
    for name, entry in manifest["files"].items():
        data = (tmp_path / "out" / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert manifest["tensors"] == planned.plan.to_json()["tensors"]


def test_same_input_same_bytes(vision: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        mx.plan(vision, ROW).write(tmp_path / name)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_shards(vision: Path, tmp_path: Path) -> None:
    planned = mx.plan(vision, ROW)
    planned.write(tmp_path / "one")
    planned.write(tmp_path / "many", max_shard_size=20_000)
    one, many = open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "many")
    assert len(many.files) > 3
    assert set(one.tensors) == set(many.tensors)
    assert all(np.array_equal(one.read(name), many.read(name)) for name in one.tensors)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == planned.plan.nbytes
    planned.write(tmp_path / "tiny", max_shard_size=1)  # a tensor is never split
    assert len(open_checkpoint(tmp_path / "tiny").files) == len(planned.plan.tensors)


def test_a_slice_of_a_slice_is_the_slice_of_the_source(vision: Path, tmp_path: Path) -> None:
    mx.plan(vision, ROW).write(tmp_path / "one")
    mx.plan(tmp_path / "one", Row("again", skipped=(0,), mamba=Dims(fill=3))).write(tmp_path / "two")
    mx.plan(vision, Row("again", skipped=(0, 1), mamba=Dims(fill=3))).write(tmp_path / "direct")
    two, direct = content(tmp_path / "two"), content(tmp_path / "direct")
    assert two["model.safetensors"] == direct["model.safetensors"]
    assert two["config.json"] == direct["config.json"]


def test_companions_are_copied_and_nothing_else(tmp_path: Path) -> None:
    source = vision_checkpoint(tmp_path / "source")
    for name in (
        "preprocessor_config.json",
        "tokenizer.json",
        "LICENSE.txt",
        "evil.py",
        "slices.csv.bak",
        "optimizer.bin",
    ):
        (source / name).write_text(name)
    mx.plan(source, ROW).write(tmp_path / "out")
    written = content(tmp_path / "out")
    assert {"preprocessor_config.json", "tokenizer.json", "LICENSE.txt"} <= written.keys()
    assert not {"evil.py", "slices.csv.bak", "optimizer.bin"} & written.keys()


# -------------------------------------------------------------------------------------- the output
def test_outputs_that_are_refused(vision: Path, tmp_path: Path) -> None:
    planned = mx.plan(vision, ROW)
    source = content(vision)

    def refused(output: Path, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            planned.write(output)

    (tmp_path / "file").write_text("precious")
    refused(tmp_path / "file", "output is a file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("precious")
    refused(tmp_path / "full", "not empty")
    refused(vision, "overlaps the input")
    refused(vision / "inside", "overlaps the input")
    refused(vision.parent, "overlaps the input")
    (tmp_path / "link").symlink_to(vision)
    refused(tmp_path / "link", "overlaps the input")
    assert (tmp_path / "full" / "precious").read_text() == "precious"
    assert content(vision) == source


def test_empty_and_forced_outputs(vision: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    mx.plan(vision, ROW).write(tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").exists()
    mx.plan(vision).write(tmp_path / "empty", force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty"]


def test_force_does_not_cost_anybodys_files(vision: Path, tmp_path: Path) -> None:
    mx.plan(vision, ROW).write(tmp_path / "out")
    (tmp_path / "out" / "adapter.safetensors").write_text("precious")
    with pytest.raises(UsageError, match="did not write: adapter"):
        mx.plan(vision).write(tmp_path / "out", force=True)
    assert (tmp_path / "out" / "adapter.safetensors").read_text() == "precious"


def test_a_name_that_is_too_long(vision: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="too long a name"):
        mx.plan(vision).write(tmp_path / ("x" * 243))


def test_a_source_that_changed_after_it_was_planned(tmp_path: Path) -> None:
    """Offsets are those of the headers that were read: another file at that path is another source."""
    source = vision_checkpoint(tmp_path / "source")
    planned = mx.plan(source)
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        planned.write(tmp_path / "out")
    (source / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="changed"):
        planned.write(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_digests_sizes_are_verified(vision: Path, tmp_path: Path) -> None:
    mx.plan(vision, ROW).write(tmp_path / "out", digest=False)
    assert "sha256" not in json.loads((tmp_path / "out" / "matexport.json").read_text())["files"]["config.json"]
    assert mx.verify(tmp_path / "out", vision).passed
    with (tmp_path / "out" / "README.md").open("a") as f:
        f.write("more")
    assert not mx.verify(tmp_path / "out", vision).passed


def test_a_symlinked_output_is_written_through(vision: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    mx.plan(vision, ROW).write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "model.safetensors").exists()


def test_modes_follow_the_umask(vision: Path, tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        mx.plan(vision, ROW).write(tmp_path / "out")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").iterdir()} == {0o640}


def test_two_runs_into_one_output(vision: Path, tmp_path: Path) -> None:
    with staged_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("mine")
        with pytest.raises(UsageError, match="another run"):
            mx.plan(vision, ROW).write(tmp_path / "out")
        assert (folder / "half").exists()
    assert (tmp_path / "out" / "half").read_text() == "mine"


def test_what_a_killed_run_left_is_replaced(vision: Path, tmp_path: Path) -> None:
    stale = tmp_path / ".out.partial"
    stale.mkdir()
    (stale / "model.safetensors").write_bytes(b"half")
    (stale / "junk").mkdir()
    mx.plan(vision, ROW).write(tmp_path / "out")
    assert not stale.exists()
    assert "junk" not in content(tmp_path / "out")


def test_an_interrupted_run_leaves_what_the_next_one_needs(vision: Path, tmp_path: Path) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"\.out\.partial is kept"):
        mx.plan(vision, ROW).write(tmp_path / "out", progress=interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", ".out.partial.journal"]
    with pytest.raises(KeyboardInterrupt):  # without digests there is nothing to go on from
        mx.plan(vision, ROW).write(tmp_path / "plain", digest=False, progress=interrupt)
    assert not (tmp_path / ".plain.partial").exists()


def test_a_killed_run_leaves_no_output(vision: Path, tmp_path: Path) -> None:
    """kill -9 from within, after the first block: the output is absent, and the next run completes it."""
    code = (
        "import os, signal, sys\nimport matexport as mx\n"
        "mx.plan(sys.argv[1]).write(sys.argv[2], progress=lambda n: os.kill(os.getpid(), signal.SIGKILL))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(vision), str(tmp_path / "out")], check=False)
    assert done.returncode == -9
    assert not (tmp_path / "out").exists()
    mx.plan(vision).write(tmp_path / "out")
    mx.plan(vision).write(tmp_path / "fresh")
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


def test_an_error_keeps_the_older_output(vision: Path, tmp_path: Path) -> None:
    mx.plan(vision, ROW).write(tmp_path / "out")
    before = content(tmp_path / "out")

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors")

    with pytest.raises(OutputError, match=r"No space left(.|\n)*free some space"):
        mx.plan(vision).write(tmp_path / "out", force=True, progress=fail)
    assert content(tmp_path / "out") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_full_disk(vision: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match="1,000 are free"):
        mx.plan(vision, ROW).write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_disk_fills_up_for_real(vision: Path, tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes the kernel refuse a write in the middle of the weights."""
    code = (
        "import resource, signal, sys\nfrom matexport.cli.main import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "sys.exit(main(['slice', '-m', sys.argv[1], '-o', sys.argv[2]]))"
    )
    command = [sys.executable, "-c", code, str(vision), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_folder(vision: Path, tmp_path: Path) -> None:
    result = matexport("slice", "-m", vision, "-o", "/proc/out")
    assert result.code == 1
    assert "cannot be written" in result.stderr
    assert "Traceback" not in result.stderr


# -------------------------------------------------------------------------------------- the source
def test_a_source_that_changes_during_the_run(tmp_path: Path) -> None:
    source = vision_checkpoint(tmp_path / "source")

    def touch(_: int) -> None:
        os.utime(source / "model.safetensors", ns=(1, 1))

    with pytest.raises(CheckpointError, match="changed while it was read"):
        mx.plan(source, ROW).write(tmp_path / "out", progress=touch)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(tmp_path: Path, value: float) -> None:
    config = vision_config()
    tensors = vision_tensors(config)
    tensors["layers.0.mixer.norm.weight"][3] = value
    source = write_checkpoint(tmp_path / "source", config, tensors)
    warnings: list[str] = []
    mx.plan(source).write(tmp_path / "out", warn=warnings.append)
    assert warnings == [
        "tensor 'layers.0.mixer.norm.weight' holds NaN or infinity (source 'layers.0.mixer.norm.weight')"
    ]
    result = matexport("slice", "-m", source, "-o", tmp_path / "strict", "--strict")
    assert result.code == 4
    assert not (tmp_path / "strict").exists()


def test_what_a_cast_cannot_hold(tmp_path: Path) -> None:
    config = vision_config()
    tensors = vision_tensors(config)
    tensors["layers.0.mixer.norm.weight"][3] = 70_000  # float16 ends at 65,504
    source = write_checkpoint(tmp_path / "source", config, tensors)
    warnings: list[str] = []
    for dtype in ("float16", "bfloat16"):
        mx.plan(source, dtype=dtype).write(tmp_path / dtype, warn=warnings.append)
    name = "'layers.0.mixer.norm.weight'"
    assert warnings == [f"tensor {name} holds NaN or infinity as float16 (source {name})"]


def test_the_lock_is_on_the_folder_itself(tmp_path: Path) -> None:
    """A lock that another process holds on the staging folder is seen (negative control of the test above)."""
    staging = tmp_path / ".out.partial"
    staging.mkdir()
    fd = os.open(staging, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(UsageError, match="another run"), staged_folder(tmp_path / "out"):
        pass
    os.close(fd)
    with staged_folder(tmp_path / "out"):
        pass


def test_force_replaces_only_what_matexport_wrote(vision: Path, tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="matexport did not write it"):
        mx.plan(vision, ROW).write(tmp_path / "project", force=True)
    assert (tmp_path / "project" / "thesis.txt").read_text() == "precious"


def test_links_and_folders_in_the_way(vision: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("precious")
    (tmp_path / ".out.partial").symlink_to(tmp_path / "precious")
    with pytest.raises(UsageError, match="is a link"):
        mx.plan(vision, ROW).write(tmp_path / "out")
    (tmp_path / ".two.old").mkdir()
    mx.plan(vision, ROW).write(tmp_path / "two")
    mx.plan(vision, ROW).write(tmp_path / "two", force=True)
    assert (tmp_path / ".two.old").exists()
    assert (tmp_path / "precious" / "file").read_text() == "precious"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UsageError, match="while it is in use"):
        mx.plan(vision, ROW).write(".")


def test_an_output_that_appears_during_the_run(vision: Path, tmp_path: Path) -> None:
    def appear(_: int) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "other").write_text("precious")

    with pytest.raises(UsageError, match="not empty"):
        mx.plan(vision, ROW).write(tmp_path / "out", progress=appear)
    assert (tmp_path / "out" / "other").read_text() == "precious"


def test_everything_is_synced_before_the_rename(vision: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, folder, rename, parent folder: in this order."""
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1])
    monkeypatch.setattr(Path, "rename", lambda self, to: (events.append("rename"), rename(self, to))[1])
    mx.plan(vision, ROW).write(tmp_path / "out")
    names = [Path(event).name for event in events]
    at = names.index("rename")
    assert {"model.safetensors", "config.json", "matexport.json", ".out.partial"} <= set(names[:at])
    assert names[at + 1 :] == [tmp_path.name]


def test_model_cards_hold_no_markup_of_others(tmp_path: Path) -> None:
    source = vision_checkpoint(tmp_path / "c")
    name = "x |\n# [evil](http://e) `code` <b>**bold**"
    mx.plan(source, Row(name, metrics={"a|b": "<script>"})).write(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.count("\n# ") == 1
    assert "\\[evil\\]" in card
    assert "<script>" not in card
    assert "**bold**" not in card
