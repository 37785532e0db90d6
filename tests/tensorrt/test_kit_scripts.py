"""The scripts of kits, used as on the target, with ONNX Runtime behind a stub of trtexec; polygraphy on their values.

That TensorRT itself builds and runs what they contain is NOT tested here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kits import bash, shellcheck

VERSIONS = (100300, 101600, 110100)


@pytest.fixture
def copy(kit: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kit, tmp_path / "kit"))


def test_the_scripts_are_clean(kit: Path) -> None:
    scripts = sorted(kit.glob("*.sh"))
    assert [script.name for script in scripts] == ["build.sh", "verify.sh"]
    done = subprocess.run([shellcheck(), *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert all(os.access(script, os.X_OK) for script in scripts)
    done = subprocess.run(
        [shellcheck(), "-"], input="#!/bin/bash\ncd $1\n", capture_output=True, text=True, check=False
    )
    assert done.returncode == 1  # it can fail


@pytest.mark.parametrize("version", VERSIONS)
def test_built_and_verified(kit: Path, tmp_path: Path, tools: Path, version: int) -> None:
    folder = shutil.copytree(kit, tmp_path / "kit")
    built = bash(folder / "build.sh", tools, "--timingCacheFile=timing.cache", version=version)
    assert built.code == 0, built
    assert (folder / "timing.cache").read_text() == f"timings of {version}"
    (folder / "timing.cache").unlink()
    checked = bash(folder / "verify.sh", tools, version=version)
    assert checked.code == 0, checked
    assert checked.stdout.splitlines()[-1].startswith("PASSED")
    outputs = len(list(folder.glob("golden/*/out/*.bin")))
    assert checked.stdout.count(": ok, largest error ") == outputs
    assert outputs == (1 if "default" in checked.stdout else 2 * 5)
    used = (folder / "results").rglob("trtexec.log")
    assert {"--accuracyAlgorithm=cos" in log.read_text() for log in used} == {version >= 110100}
    other = bash(folder / "verify.sh", tools, version=100900)
    assert other.code == 1
    assert "not compatible with this version" in other.stderr


def test_a_wrong_engine_fails(copy: Path, tools: Path) -> None:
    """In one output of one profile; also where trtexec compares too, whose own comparison lets NaN pass."""
    vision = (copy / "golden" / "default").is_dir()
    profile, output = ("default", "logits") if vision else ("decode", "present.1.recurrent_state")
    cases = [("1.00005", 0, 101600), ("1.0003", 3, 101600), ("nan", 3, 110100), ("-1", 3, 110100)]
    for fault, code, version in cases:
        assert bash(copy / "build.sh", tools, version=version).code == 0
        found = bash(copy / "verify.sh", tools, version=version, fault=f"{output}:{fault}")
        assert found.code == code, (fault, found)
        assert (f"{profile}: {output}: FAILED" in found.stdout) == (code == 3)
        assert ("FAILED, by trtexec's own comparison" in found.stdout) == (fault == "-1")
        assert found.stdout.splitlines()[-1].startswith("PASSED" if code == 0 else "FAILED")


def test_a_wrong_golden_value_fails(copy: Path, tools: Path) -> None:
    assert bash(copy / "build.sh", tools).code == 0
    file = next(copy.glob("golden/*/out/logits.bin"))
    values = np.fromfile(file, np.float32)
    values[values.size // 2] += 1e-2 * np.abs(values).max()
    file.write_bytes(values.tobytes())
    found = bash(copy / "verify.sh", tools)
    assert found.code == 3
    assert found.stdout.count(": FAILED") == 1
    file.write_bytes(values.tobytes()[:-4])
    assert "no such output of this size" in bash(copy / "verify.sh", tools).stdout


def test_a_missing_input_or_a_shape_outside_the_profile_fails(copy: Path, tools: Path) -> None:
    assert bash(copy / "build.sh", tools).code == 0
    script = copy / "verify.sh"
    whole = script.read_text()
    script.write_text(re.sub(r"^  (pixel_values|input_ids):2x", r"  \1:65x", whole, count=1, flags=re.M))
    found = bash(script, tools)
    assert found.code == 1
    assert "does not satisfy any optimization profiles" in found.stderr
    script.write_text(whole)
    file = next(copy.glob("golden/*/in/*.bin"))
    file.unlink()
    found = bash(script, tools)
    assert found.code == 1
    assert f"Cannot open file ../../{file.relative_to(copy)}" in found.stderr


def test_without_trtexec_or_an_engine(copy: Path, tools: Path) -> None:
    for name in ("build.sh", "verify.sh"):
        found = bash(copy / name, None)
        assert found.code == 5
        assert "TRTEXEC=/path/to/trtexec" in found.stderr
    found = bash(copy / "verify.sh", tools)
    assert found.code == 1
    assert "./build.sh" in found.stderr


def test_a_failed_build_leaves_no_engine(copy: Path, tools: Path) -> None:
    (copy / "onnx" / "model.onnx_data").unlink()
    found = bash(copy / "build.sh", tools)
    assert found.code != 0
    assert not (copy / "model.engine").exists()


def test_every_file_that_is_named_exists(kit: Path) -> None:
    """In scripts and README, and what the scripts make of inputs and outputs."""
    texts = {name: (kit / name).read_text() for name in ("build.sh", "verify.sh", "README.md")}
    named = {path for text in texts.values() for path in re.findall(r"\b(?:onnx|golden)/[\w./-]*[\w]", text)}
    for blocks in re.finditer(r"^inputs=\((.*?)\)\noutputs=\((.*?)\)\ncheck (\w+) \d", texts["verify.sh"], re.M | re.S):
        for group, items in zip(("in", "out"), blocks.groups()[:2], strict=True):
            named |= {f"golden/{blocks[3]}/{group}/{item.split(':')[0]}.bin" for item in items.split()}
    assert len([path for path in named if path.endswith(".bin")]) == len(list(kit.rglob("*.bin")))
    for path in named:
        assert (kit / path).exists(), path
    assert "@" not in "".join(texts.values()).replace('"$@"', "").replace("[@]", "")


def test_numbers_of_sixteen_bits_are_read_right(vision_kit: Path, tmp_path: Path) -> None:
    """verify.sh decodes them with awk: all bit patterns, against NumPy."""
    import ml_dtypes

    text = (vision_kit / "verify.sh").read_text()
    functions = "".join(re.findall(r"^(?:numbers|halves)\(\) \{\n.*?^\}\n", text, re.M | re.S))
    patterns = np.arange(65536, dtype=np.uint16)
    for kind in ("float16", "bfloat16"):
        (tmp_path / "raw").write_bytes(patterns.tobytes())
        done = subprocess.run(
            ["bash", "-c", f"{functions}\nnumbers {kind} raw"], cwd=tmp_path, capture_output=True, text=True
        )
        got = np.array(done.stdout.split(), np.float64)
        with np.errstate(invalid="ignore"):
            want = patterns.view(getattr(ml_dtypes, kind, kind)).astype(np.float64)
        finite = np.isfinite(want)
        assert np.isnan(got[~finite]).all()
        np.testing.assert_allclose(got[finite], want[finite], rtol=1e-8)


def test_golden_values_in_polygraphys_format(kit: Path, tmp_path: Path) -> None:
    """Read by polygraphy itself; then it runs the model on them, as the README says, and compares."""
    from polygraphy.comparator import RunResults
    from polygraphy.json import load_json

    for folder in (kit / "golden").iterdir():
        [inputs] = load_json(str(folder / "inputs.json"))
        [(_, [outputs])] = RunResults.load(str(folder / "outputs.json")).items()
        for group, arrays in (("in", inputs), ("out", outputs)):
            assert {f"{name}.bin" for name in arrays} == {path.name for path in (folder / group).iterdir()}
            for name, array in arrays.items():
                assert array.tobytes() == (folder / group / f"{name}.bin").read_bytes()
    readme = (kit / "README.md").read_text()
    commands = re.findall(r"^ {4}(polygraphy run .*?)\n\n", readme, re.M | re.S)
    assert len(commands) == len(list((kit / "golden").iterdir()))
    here = [re.sub(r"model.engine .*?\\", r"onnx/model.onnx --onnxrt \\", command) for command in commands]
    assert polygraphy(here[-1], kit) == 0
    bad = Path(shutil.copytree(kit, tmp_path / "bad"))
    [file] = re.findall(r"--load-outputs (\S+)", here[-1])
    results = RunResults.load(str(bad / file))
    array = results[0][1][0]["logits"]
    array.ravel()[3] += 1e-2 * np.abs(array).max()
    results.save(str(bad / file))
    assert polygraphy(here[-1], bad) == 1


def polygraphy(command: str, folder: Path) -> int:
    variables = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=variables, capture_output=True, text=True, check=False
    )
    assert "Comparing Output" in done.stdout, done
    return done.returncode
