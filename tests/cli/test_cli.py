"""The command line as a contract: what stdout holds, what stderr holds, and the exit code."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from matexport.cli import common, main
from matexport.planning import Plan
from matexport.slice_table import number, read_table
from support import DIGITS, REPOSITORY, matexport, matexport_process, vision_checkpoint

TABLE = REPOSITORY / "slices" / "matmamba-digits.csv"


def test_slices() -> None:
    result = matexport("slices", "-m", DIGITS, "--format", "json")
    assert result.code == 0
    rows = {row["name"]: row for row in result.json["rows"]}
    assert len(rows) == 10
    assert set(rows["half"]) == {
        "name", "layers", "skipped", "parameters", "model_parameters", "effective_parameters", "bytes", "metrics",
        "dominated_by",
    }  # fmt: skip
    assert rows["half"]["parameters"] == 71370
    assert rows["half"]["metrics"]["Held-out accuracy"] > 95
    assert rows["half without layer 2"]["skipped"] == [2]
    assert rows["half without layer 2"]["layers"] == 3
    human = matexport("slices", "-m", DIGITS)
    assert all(name in human.stdout for name in rows)
    assert "costs quality" in human.stderr


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        (["--fit", "200KB"], ("bytes", 200_000)),
        (["--fit", "170 kib"], ("bytes", 170 * 1024)),
        (["--fit-params", "50K"], ("parameters", 50_000)),
        (["--fit-params", "0.05M", "--fit", "1GB"], ("parameters", 50_000)),
    ],
)
def test_fit(options: list[str], limit: tuple[str, int]) -> None:
    every = matexport("slices", "-m", DIGITS, "--format", "json").json["rows"]
    [row] = matexport("slices", "-m", DIGITS, "--format", "json", *options).json["rows"]
    fitting = [r for r in every if r[limit[0]] <= limit[1]]
    assert row["name"] in {r["name"] for r in fitting}
    assert row["metrics"]["Held-out accuracy"] == max(r["metrics"]["Held-out accuracy"] for r in fitting)


def test_nothing_fits() -> None:
    result = matexport("slices", "-m", DIGITS, "--fit", "1KB")
    assert result.code == 4
    assert "the smallest is 'eighth'" in result.stderr
    assert result.stdout == ""


def test_metric_direction(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("name,Mamba Dims,Loss,Score\na,64,3.0,1\nb,32,2.0,2\nc,16,2.5,x\n")
    command = ["slices", "-m", DIGITS, "-c", table, "--format", "json"]
    beaten = {r["name"]: r["dominated_by"] for r in matexport(*command, "--metric", "loss:min").json["rows"]}
    assert beaten == {"a": "b", "b": None, "c": None}
    rows = matexport(*command, "--metric", "Score").json["rows"]
    assert {r["name"]: r["dominated_by"] for r in rows} == {"a": "b", "b": None, "c": None}
    assert rows[2]["metrics"] == {"Loss": 2.5, "Score": "x"}
    assert matexport(*command, "--metric", "Nothing").code == 2


def test_dry_run_prints_the_plan() -> None:
    result = matexport("slice", "-m", DIGITS, "-s", "narrowing", "--dry-run", "--format", "json")
    assert result.code == 0
    assert {"tensors", "parameters", "bytes", "config"} <= result.json.keys()
    view = result.json["tensors"]["layers.1.mixer.in_proj.weight"]
    assert view == {
        "dtype": "F32",
        "source": "layers.1.mixer.in_proj.weight",
        "view_shape": [352, 64],
        "ranges": [[[0, 64], [128, 192], [256, 320]], [[0, 64]]],
        "shape": [192, 64],
    }
    assert Plan.from_json(result.json).parameters == result.json["parameters"]
    assert "in_proj.weight" in matexport("slice", "-m", DIGITS, "-s", "half", "--dry-run").stdout


def test_slice_and_inspect(tmp_path: Path) -> None:
    result = matexport("slice", "-m", DIGITS, "-s", "#2", "-o", tmp_path / "half", "--format", "json")
    assert result.code == 0
    assert result.json["parameters"] == 71370
    assert result.stderr.splitlines()[-1] == f"hint: matexport verify -m {tmp_path / 'half'} --source {DIGITS}"
    found = matexport("inspect", "-m", tmp_path / "half", "--format", "json").json
    assert (found["kind"], found["family"], found["slice"]["name"]) == ("checkpoint", "matmamba", "half")
    assert found["widths"] == [32] * 4
    assert matexport("inspect", "-m", DIGITS).stdout.startswith("kind: checkpoint")
    assert matexport("onnx", "-m", tmp_path / "half", "-o", tmp_path / "onnx").code == 0
    assert matexport("inspect", "-m", tmp_path / "onnx", "--format", "json").json["runs_here"].startswith("yes")


def test_doctor() -> None:
    parts = {part["part"]: part for part in matexport("doctor", "--format", "json").json["parts"]}
    assert parts["torch"]["version"]
    assert parts["torch"]["install"] is None
    assert "torch" in matexport("doctor").stdout
    assert parts["TensorRT plugins"]["version"] or "nvcc" in parts["TensorRT plugins"]["install"]


@pytest.mark.parametrize("verb", main.VERBS)
def test_help_has_examples(verb: str) -> None:
    result = matexport(verb, "--help")
    assert result.code == 0
    assert f"matexport {verb}" in result.stdout
    assert "Example" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["slice"], 2, "Missing option"),
        (["slice", "-m", DIGITS, "-s", "half"], 2, "--dry-run"),
        (["cook"], 2, "No such command"),
        (["slices", "-m", DIGITS, "--fit", "big"], 2, "write a number and one of"),
        (["slices", "-m", "nowhere"], 4, "is not a folder"),
        (["slice", "-m", DIGITS, "-s", "huge", "-o", "x"], 4, "no row is named 'huge'"),
        (["inspect", "-m", REPOSITORY], 4, "config.json"),
        (["slice", "-m", DIGITS, "-c", "nowhere.csv", "-s", "a", "-o", "x"], 4, "cannot be read"),
    ],
)
def test_errors(arguments: list[str], code: int, message: str) -> None:
    result = matexport(*arguments)
    assert result.code == code
    assert message in result.stderr
    assert result.stdout == ""


def test_no_table(tmp_path: Path) -> None:
    source = vision_checkpoint(tmp_path / "c", n_layer=1)
    for command in (["slices"], ["slice", "-s", "half", "-o", str(tmp_path / "x")]):
        result = matexport(command[0], "-m", source, *command[1:])
        assert result.code == 4
        assert "no slice table is packaged for this model" in result.stderr


def test_tracebacks_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Traceback" not in matexport("slices", "-m", "nowhere").stderr
    assert "Traceback" in matexport("slices", "-m", "nowhere", "-vv").stderr
    monkeypatch.setattr("matexport.cli.slices.open_checkpoint", lambda path, allow_pickle: 1 / 0)
    result = matexport("slices", "-m", DIGITS)
    assert result.code == 1
    assert "unexpected ZeroDivisionError" in result.stderr


def test_as_a_process(tmp_path: Path) -> None:
    result = matexport_process("slices", "-m", DIGITS, "--fit", "1KB")
    assert (result.code, result.stdout) == (4, "")
    quoted = matexport_process("slice", "-m", DIGITS, "-s", "half then eighth", "-o", tmp_path / "a folder")
    assert quoted.code == 0
    assert f"-m '{tmp_path / 'a folder'}'" in quoted.stderr.splitlines()[-1]


def test_interrupted(tmp_path: Path) -> None:
    """Ctrl-C in the middle of a write: exit code 130, no output, and a word on how to go on."""
    code = (
        "import os, signal, sys\nfrom matexport import writer\nfrom matexport.cli.main import main\n"
        "real = writer.write_blocks\n"
        "def slow(*a, **k):\n    os.kill(os.getpid(), signal.SIGINT)\n    return real(*a, **k)\n"
        "writer.write_blocks = slow\n"
        "sys.exit(main(['slice', '-m', sys.argv[1], '-o', sys.argv[2]]))"
    )
    command = [sys.executable, "-c", code, str(DIGITS), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=_default_sigint)
    assert done.returncode == 130, done.stderr
    assert "interrupted; .out.partial is kept" in done.stderr
    assert not (tmp_path / "out").exists()


def _default_sigint() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_units() -> None:
    assert common.human_bytes(999) == "999 B"
    assert common.human_bytes(285_480) == "285 kB"
    assert common.human_bytes(5 * 10**12) == "5 TB"


def test_the_table_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row of the packaged table says what measure.py measures now, to a third of a point (one digit is 0.28)."""
    monkeypatch.syspath_prepend(DIGITS.parent)
    from measure import METRIC, ROWS, measured

    written = read_table(TABLE).rows
    assert [row.name for row in written] == [row.name for row in ROWS]
    for row, again in zip(written, map(measured, ROWS), strict=True):
        assert (row.skipped, row.mamba, row.layers) == (again.skipped, again.mamba, again.layers)
        assert number(row.metrics[METRIC]) == pytest.approx(number(again.metrics[METRIC]), abs=0.3)


def test_names_reach_no_terminal_unescaped(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("name,Mamba Dims\n\033]0;pwned\007,8\n")
    result = matexport("slice", "-m", DIGITS, "-c", table, "-s", "#1", "-o", tmp_path / "out")
    assert result.code == 0
    assert "\033" not in result.stdout + result.stderr
    shown = matexport("slices", "-m", DIGITS, "-c", table, "--format", "json").stdout
    assert "\033" not in shown


def test_a_broken_table_beside_the_model_does_not_block_another_one(tmp_path: Path) -> None:
    source = vision_checkpoint(tmp_path / "c")
    (source / "slices.csv").write_text("nonsense")
    (tmp_path / "good.csv").write_text("name,Mamba Dims\na,8\n")
    assert matexport("slices", "-m", source).code == 4
    assert matexport("slices", "-m", source, "-c", tmp_path / "good.csv").code == 0


def test_a_slice_has_no_packaged_table(tmp_path: Path) -> None:
    matexport("slice", "-m", DIGITS, "-s", "half", "-o", tmp_path / "half")
    result = matexport("slices", "-m", tmp_path / "half")
    assert result.code == 4
    assert "no slice table is packaged" in result.stderr
