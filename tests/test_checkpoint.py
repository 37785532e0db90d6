"""Opening checkpoints: what is damaged, hostile or not supported is named, with the fix."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from matexport.checkpoint import open_checkpoint, parse_json, read_header
from matexport.errors import CheckpointError
from matexport.families import family_of
from support import matexport, vision_checkpoint, vision_config, vision_tensors, write_checkpoint

ARRAYS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones((4,), ml_dtypes.bfloat16)}


def folder_with(path: Path, arrays: dict[str, np.ndarray], config: str = "{}") -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(config)
    save_file(arrays, path / "model.safetensors")
    return path


def sharded(path: Path, **shards: dict[str, np.ndarray]) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    weight_map = {}
    for shard, arrays in shards.items():
        save_file(arrays, path / f"{shard}.safetensors")
        weight_map |= dict.fromkeys(arrays, f"{shard}.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def raw_file(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_single_and_sharded_files_hold_the_same(tmp_path: Path) -> None:
    one = open_checkpoint(folder_with(tmp_path / "one", ARRAYS))
    two = open_checkpoint(sharded(tmp_path / "two", x={"a": ARRAYS["a"]}, y={"b": ARRAYS["b"]}))
    for checkpoint in (one, two):
        assert set(checkpoint.tensors) == {"a", "b"}
        for name, array in ARRAYS.items():
            assert np.array_equal(checkpoint.read(name), array)
    assert [file.name for file in two.files] == ["x.safetensors", "y.safetensors"]


ENTRY = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("header", "data", "length", "message"),
    [
        ({"a": ENTRY}, b"1234", 10**9, "header of 1000000000 bytes does not fit"),
        ({"a": ENTRY}, b"1234", 2**63, "does not fit"),
        ({"a": ENTRY}, b"1234", 0, "does not fit"),
        ({"a": ENTRY}, b"12", None, "truncated"),
        ({"a": ENTRY}, b"123456", None, "after its last tensor"),
        ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [2, 6]}}, b"123456", None, "'b' overlaps"),
        ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [6, 10]}}, b"1" * 10, None, "'b' leaves a hole of 2"),
        ({"a": {**ENTRY, "shape": [5]}}, b"1234", None, "offsets do not match"),
        ({"a": {**ENTRY, "shape": [-4]}}, b"1234", None, "no valid shape"),
        ({"a": {**ENTRY, "shape": [True]}}, b"1234", None, "no valid shape"),
        ({"a": {**ENTRY, "data_offsets": [4, 0]}}, b"1234", None, "offsets do not match"),
        ({"a": {**ENTRY, "data_offsets": [0]}}, b"1234", None, "no valid data_offsets"),
        ({"a": {**ENTRY, "dtype": "F8_E4M3"}}, b"1234", None, "quantised"),
        ({"a": {**ENTRY, "dtype": "X"}}, b"1234", None, "unknown dtype"),
        ({"a": 3}, b"", None, "no valid shape"),
        (b'{"a": 1, "a": 2}', b"", None, "occurs twice"),
        (b"[1]", b"", None, "not a JSON object"),
        (b"{" * 100, b"", None, "is not JSON"),
        (b'{"a":' * 50_000, b"", None, "is not JSON"),
        (b"\xff\xfe", b"", None, "is not JSON"),
    ],
)
def test_damaged_headers(tmp_path: Path, header: Any, data: bytes, length: int | None, message: str) -> None:
    path = raw_file(tmp_path / "model.safetensors", header, data, length=length)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert "fix:" in str(caught.value)


def test_header_above_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as f:
        f.write(struct.pack("<Q", (100 << 20) + 1))
        f.truncate((101 << 20) + 8)  # sparse
    with pytest.raises(CheckpointError, match="does not fit"):
        read_header(path)


def edit_index(change: Callable[[dict[str, str]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit_index(lambda m: m.update(a="../x.safetensors")), "is not the name of a shard"),
        (edit_index(lambda m: m.update(a="/etc/passwd")), "is not the name of a shard"),
        (edit_index(lambda m: m.update(a="..\\x.safetensors")), "is not the name of a shard"),
        (edit_index(lambda m: m.update(a=3)), "is not the name of a shard"),
        (edit_index(lambda m: m.update(a="z.safetensors")), "shard z.safetensors is missing"),
        (edit_index(lambda m: m.pop("b")), r"only in the shard \['b'\]|disagree|two shards"),
        (edit_index(lambda m: m.update(extra="x.safetensors")), r"only in the index \['extra'\]"),
        (edit_index(lambda m: m.clear()), "has no weight_map"),
        (lambda f: save_file(ARRAYS, f / "x.safetensors"), "in two shards|disagree"),
        (lambda f: (f / "model.safetensors.index.json").write_text("nonsense"), "is not JSON"),
    ],
)
def test_damaged_indexes(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    folder = sharded(tmp_path / "c", x={"a": ARRAYS["a"], "c": ARRAYS["a"]}, y={"b": ARRAYS["b"], "d": ARRAYS["b"]})
    open_checkpoint(folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_folders_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not a folder\n.*ORG/NAME"):
        open_checkpoint("name")
    with pytest.raises(CheckpointError, match="is not a folder"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"config.json: cannot be read"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"has no model.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pickled"):
        open_checkpoint(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pickled"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"quantization_config": {}}', "quantised"),
        ("[]", "not a JSON object"),
        ('{"a": ' * 100_000, "is not JSON"),
        ("9" * 5000, "is not JSON"),
        ('{"a": "' + "x" * (16 << 20) + '"}', "larger than 16 MiB"),
    ],
    ids=["quantised", "list", "deep", "digits", "huge"],
)
def test_configs(tmp_path: Path, config: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder_with(tmp_path / "c", ARRAYS, config))


@given(st.binary(max_size=300))
@settings(max_examples=300)
def test_random_bytes_never_crash(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    for content in (data, struct.pack("<Q", len(data)) + data, struct.pack("<Q", len(data) + 2) + b"{}" + data):
        path.write_bytes(content)
        try:
            read_header(path)
        except CheckpointError:
            continue
        assert content[8:].strip() == b"{}"


@given(st.text(max_size=200))
def test_random_json_never_crashes(text: str) -> None:
    with contextlib.suppress(CheckpointError):
        assert isinstance(parse_json(text.encode("utf-8", "replace"), "x"), dict)


# --------------------------------------------------------------------- does it fit its own config.json
def test_tensors_that_do_not_fit_the_config(tmp_path: Path) -> None:
    config = vision_config()
    tensors = vision_tensors(config)

    def refused(message: str, changed: dict[str, np.ndarray | None], **changes: Any) -> None:
        arrays = {name: array for name, array in {**tensors, **changed}.items() if array is not None}
        folder = write_checkpoint(tmp_path / "c", {**config, **changes}, arrays)
        result = matexport("slice", "-m", folder, "--dry-run")
        assert result.code == 4, result
        assert message in result.stderr
        assert "Traceback" not in result.stderr
        shutil.rmtree(folder)

    refused("unknown ['surplus']", {"surplus": np.zeros(3, np.float32)})
    refused("missing ['head.bias']", {"head.bias": None})
    refused("layers.1.mixer.out_proj.weight' is missing", {"layers.1.mixer.out_proj.weight": None})
    refused("'head.weight' has shape (3, 3), (7, 64) expected", {"head.weight": np.zeros((3, 3), np.float32)})
    refused(
        "'layers.0.mixer.A_log' has shape (64, 1), 1 axes expected", {"layers.0.mixer.A_log": np.zeros((64, 1), "f4")}
    )
    refused("do not fit together", {"layers.0.mixer.A_log": np.zeros(63, np.float32)})
    refused("is missing", {}, n_layer=4)
    refused("unknown ['layers.2", {}, n_layer=2)
    refused("n_layer = True is no size", {}, n_layer=True)
    refused("(1, 10, 64), (1, 5, 64) expected", {}, image_size=8)
    refused("d_intermediate = 128", {}, d_intermediate=128)
    refused("ssm_cfg expand = 1", {}, ssm_cfg={"d_state": 8, "expand": 1})
    refused("is of no family", {"patch_embed.proj.weight": None})
    refused("image_size 14 is no multiple of patch_size 4", {}, image_size=14)
    refused("pool = 'max'", {}, pool="max")
    refused("norm_epsilon = '1e-5'", {}, norm_epsilon="1e-5")
    refused("ssm_cfg activation = 'relu'", {}, ssm_cfg={"d_state": 8, "activation": "relu"})
    refused("ssm_cfg chunk_size = 0", {}, ssm_cfg={"d_state": 8, "chunk_size": 0})
    refused("ssm_cfg dt_limit = 'abc'", {}, ssm_cfg={"d_state": 8, "dt_limit": "abc"})
    refused("ssm_cfg = [1]", {}, ssm_cfg=[1])
    refused("has dtype I32", {"head.bias": np.zeros(7, np.int32)})


def test_custom_code_is_not_run_and_told(tmp_path: Path) -> None:
    folder = vision_checkpoint(tmp_path / "c")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Model"}}))
    (folder / "evil.py").write_text("open('/tmp/owned', 'w')")
    result = matexport("slice", "-m", folder, "-o", tmp_path / "out")
    assert result.code == 0
    assert "neither run nor copied" in result.stderr
    assert not (tmp_path / "out" / "evil.py").exists()
    assert "evil" not in (tmp_path / "out" / "config.json").read_text()
    assert not Path("/tmp/owned").exists()


def test_a_released_config_is_recognised(vision: Path) -> None:
    assert family_of(open_checkpoint(vision)).NAME == "matmamba"
