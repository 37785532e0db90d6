"""Weights of ONNX graphs: used in place, stored in other types, shared by the rows of an elastic bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest

import matexport as mx
from matexport.checkpoint import open_checkpoint
from matexport.dims import Dims
from matexport.errors import CheckpointError, UsageError
from matexport.graph.builder import Weight
from matexport.onnx.export import slug
from matexport.onnx.weights import offset_in
from matexport.planning import PlannedTensor, part
from matexport.slice_table import Row
from matexport.tensors import Tensor
from support import content, language_checkpoint, language_config, language_tensors, matexport, write_checkpoint

ROWS = [
    Row("Full", mamba=Dims(fill=64)),
    Row("Half", mamba=Dims(fill=32)),
    Row("mixed, 1 skipped", skipped=(1,), mamba=Dims(head=(32, 12))),
]


def places(model: Path) -> dict[str, dict[str, str]]:
    """External data of every weight."""
    found = onnx.load(model, load_external_data=False).graph.initializer
    return {i.name: {e.key: e.value for e in i.external_data} for i in found if i.external_data}


def run(model: Path, inputs: dict[str, np.ndarray], names: list[str] | None = None, **entries: str) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    for key, value in entries.items():
        options.add_session_config_entry(f"session.{key}", value)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    states = {
        i.name: np.zeros([len(next(iter(inputs.values()))), *i.shape[1:]], np.float32)
        for i in session.get_inputs()
        if i.name.startswith("past")
    }
    found: list[np.ndarray] = session.run(names, {**inputs, **states})
    return found


def tokens(batch: int = 2, length: int = 19) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(1).integers(0, 101, (batch, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


# ------------------------------------------------------------------------------------------ in place
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_in_place(language: Path, tmp_path: Path, dtype: str) -> None:
    mx.plan(language, ROWS[2], dtype=dtype).write(tmp_path / "slice", max_shard_size=40_000)
    before = content(tmp_path / "slice")
    result = matexport("onnx", "-m", tmp_path / "slice", "--in-place")
    assert result.code == 0, result.stderr
    after = content(tmp_path / "slice")
    assert after.keys() - before.keys() == {"model.onnx", "model.onnx.json"}
    assert all(after[name] == data for name, data in before.items())
    used = places(tmp_path / "slice" / "model.onnx")
    files = {place["location"] for place in used.values()}
    assert len(files) > 1
    assert all(file.endswith(".safetensors") for file in files)
    both = [("slice", language), ("slice/model.onnx", language), ("slice/model.onnx", tmp_path / "slice")]
    for artefact, source in both:  # the folder is whole with it
        report = mx.verify(tmp_path / artefact, source)
        assert report.passed, report.to_markdown()
    # and the same numbers as from weights that were written out
    mx.export_onnx(tmp_path / "slice", tmp_path / "copy")
    want, got = (run(p, tokens(), ["logits"])[0] for p in (tmp_path / "copy/model.onnx", tmp_path / "slice/model.onnx"))
    assert np.array_equal(got, want)


def test_in_place_is_refused(language: Path, tmp_path: Path) -> None:
    mx.plan(language, ROWS[1]).write(tmp_path / "slice")
    mx.export_in_place(tmp_path / "slice")
    with pytest.raises(UsageError, match="output exists"):
        mx.export_in_place(tmp_path / "slice")
    mx.export_in_place(tmp_path / "slice", force=True)
    with pytest.raises(UsageError, match="whole tensors"):
        mx.export_in_place(mx.plan(language, ROWS[1]))
    assert matexport("onnx", "-m", tmp_path / "slice", "--in-place", "-s", "half").code == 2
    assert matexport("onnx", "-m", tmp_path / "slice").code == 2
    torch = pytest.importorskip("torch")
    pickled = tmp_path / "pickled"
    config = language_config()
    pickled.mkdir()
    (pickled / "config.json").write_text(json.dumps(config))
    state = {name: torch.from_numpy(array) for name, array in language_tensors(config).items()}
    torch.save(state, pickled / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        mx.export_in_place(mx.plan(pickled, allow_pickle=True))
    assert sorted(content(pickled)) == ["config.json", "pytorch_model.bin"]


def test_in_place_of_a_link(language: Path, tmp_path: Path) -> None:
    """As in the Hub's cache: onnxruntime would refuse the data. A link to the whole folder is fine."""
    mx.plan(language, ROWS[1]).write(tmp_path / "slice")
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "config.json").write_bytes((tmp_path / "slice" / "config.json").read_bytes())
    (linked / "model.safetensors").symlink_to(tmp_path / "slice" / "model.safetensors")
    with pytest.raises(CheckpointError, match="is a link"):
        mx.export_in_place(linked)
    assert sorted(content(linked)) == ["config.json", "model.safetensors"]
    (tmp_path / "folder").symlink_to(tmp_path / "slice")
    mx.export_in_place(tmp_path / "folder")
    run(tmp_path / "folder" / "model.onnx", tokens())


def test_a_stranger_beside_a_slice_is_still_one(language: Path, tmp_path: Path) -> None:
    """Negative control: a model.onnx that does not say that it was put there."""
    mx.plan(language, ROWS[1]).write(tmp_path / "slice")
    mx.export_in_place(tmp_path / "slice")
    manifest = tmp_path / "slice" / "model.onnx.json"
    manifest.write_text(manifest.read_text().replace('"in_place": true', '"in_place": false'))
    assert not mx.verify(tmp_path / "slice", language).passed


# -------------------------------------------------------------------------------------------- dtypes
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_stored_in_half(vision: Path, tmp_path: Path, dtype: str) -> None:
    for name in ("float32", dtype):
        mx.export_onnx(mx.plan(vision, ROWS[1]), tmp_path / name, dtype=name)
    half, full = ((tmp_path / n / "model.onnx_data").stat().st_size for n in (dtype, "float32"))
    assert half < 0.55 * full
    report = mx.verify(tmp_path / dtype, vision)  # against the source with its weights rounded alike
    assert report.passed, report.to_markdown()
    source = open_checkpoint(vision)
    rounded = getattr(ml_dtypes, dtype, None) or np.float16
    stored = onnx.load(tmp_path / dtype / "model.onnx").graph.initializer
    head = next(i for i in stored if i.name == "head.weight")
    assert head.raw_data == source.read("head.weight").astype(rounded).tobytes()


@pytest.mark.parametrize("value", [1e6, -np.inf, np.nan])
def test_what_float16_cannot_hold(tmp_path: Path, value: float) -> None:
    config = language_config()
    tensors = language_tensors(config)
    tensors["backbone.layers.1.mixer.out_proj.weight"][3, 5] = value
    source = write_checkpoint(tmp_path / "source", config, tensors)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mixer\.out_proj\.weight' holds a value beyond float16"):
        mx.export_onnx(source, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    mx.export_onnx(source, tmp_path / "out", dtype="bfloat16")  # holds all of them


# -------------------------------------------------------------------------------------------- bundle
@pytest.fixture(scope="module", params=["language", "vision"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    source = request.getfixturevalue(request.param)
    folder = tmp_path_factory.mktemp("bundle") / "out"
    mx.export_bundle([mx.plan(source, row) for row in ROWS], folder)
    return source, folder


def test_one_file_for_all_rows(bundle: tuple[Path, Path]) -> None:
    source, folder = bundle
    names = [f"{slug(row.name)}.onnx" for row in ROWS]
    assert names == ["full.onnx", "half.onnx", "mixed-1-skipped.onnx"]
    manifest = json.loads((folder / "matexport.json").read_text())
    assert manifest["rows"] == dict(zip([row.name for row in ROWS], names, strict=True))
    assert {place["location"] for name in names for place in places(folder / name).values()} == {"model.onnx_data"}
    whole = sum(tensor.nbytes for tensor in open_checkpoint(source).tensors.values())
    assert (folder / "model.onnx_data").stat().st_size < 1.1 * whole + (64 << 10)  # nothing twice, but for alignment
    full, half = places(folder / names[0]), places(folder / names[1])
    assert full.keys() == half.keys()
    assert all(half[name]["offset"] == place["offset"] for name, place in full.items())
    assert sum(int(half[n]["length"]) < int(full[n]["length"]) for n in full) > 10


def test_rows_are_verified(bundle: tuple[Path, Path], tmp_path: Path) -> None:
    source, folder = bundle
    report = mx.verify(folder, source)
    assert report.passed, report.to_markdown()
    assert {c.name.split(":")[0] for c in report.comparisons if c.kind == "onnx"} == {
        f"{slug(r.name)}.onnx" for r in ROWS
    }
    assert mx.verify(folder / "half.onnx", source).passed
    shutil.copytree(folder, tmp_path / "broken")
    data = tmp_path / "broken" / "model.onnx_data"
    raw = bytearray(data.read_bytes())
    raw[
        int(places(folder / "half.onnx")[next(n for n in places(folder / "half.onnx") if "out_proj" in n)]["offset"])
    ] ^= 64
    data.write_bytes(raw)
    failed = {c.kind for c in mx.verify(tmp_path / "broken", source).comparisons if not c.passed}
    assert {"provenance", "digest"} <= failed


@pytest.mark.parametrize("prepack", ["0", "1"])
def test_rows_equal_their_own_export(bundle: tuple[Path, Path], tmp_path: Path, prepack: str) -> None:
    source, folder = bundle
    for row in ROWS:
        planned = mx.plan(source, row)
        mx.export_onnx(planned, tmp_path / "own", force=True)
        inputs: dict[str, np.ndarray] = tokens()
        if "image_size" in planned.checkpoint.config:
            inputs = planned.family.sample_inputs(planned.checkpoint.config, 3, seed=5)
        (want,) = run(tmp_path / "own" / "model.onnx", inputs, ["logits"])
        (got,) = run(folder / f"{slug(row.name)}.onnx", inputs, ["logits"], disable_prepacking=prepack)
        assert np.abs(got - want).max() <= 1e-6 * np.abs(want).max()


@pytest.mark.parametrize("form", ["contrib", "stock"])
def test_other_forms(language: Path, tmp_path: Path, form: str) -> None:
    table = tmp_path / "slices.csv"
    table.write_text("name,Mamba Dims\nfull,64\nhalf,32\n")
    options = ["--form", form, "--dtype", "float16"]
    command = ["onnx", "-m", language, "-c", table, "-s", "full", "-s", "half", "-o", tmp_path / "out", *options]
    assert matexport(*command).code == 0
    assert mx.verify(tmp_path / "out", language).passed
    assert matexport(*command).code == 2  # it is there
    assert matexport(*command, "--force").code == 0


def test_groups_are_stored_apart(tmp_path: Path) -> None:
    """The heads of a narrower slice are no range of the wider one's with several groups: both are right, and larger."""
    source = language_checkpoint(tmp_path / "c", ngroups=2)
    mx.export_bundle([mx.plan(source, row) for row in ROWS[:2]], tmp_path / "out")
    assert mx.verify(tmp_path / "out", source).passed
    full, half = places(tmp_path / "out" / "full.onnx"), places(tmp_path / "out" / "half.onnx")
    z = "backbone.layers.0.mixer.in_proj.weight.z"
    assert full[z]["offset"] != half[z]["offset"]


def test_rows_of_two_checkpoints(language: Path, vision: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="of one checkpoint"):
        mx.export_bundle([mx.plan(source, ROWS[1]) for source in (language, vision)], tmp_path / "out")


def test_names_that_collide(language: Path, tmp_path: Path) -> None:
    rows = [Row(name, mamba=Dims(fill=32)) for name in ("a b", "A/b")]
    with pytest.raises(UsageError, match=r"'a b' and 'A/b' would both be a-b\.onnx"):
        mx.export_bundle([mx.plan(language, row) for row in rows], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("axis", "transposed", "small", "large", "offset"),
    [
        (0, False, [(0, 2)], [(0, 5)], 0),
        (0, False, [(2, 4)], [(1, 5)], 1 * 6 * 4),
        (0, False, [(4, 5), (0, 2)], [(3, 5), (0, 3)], 1 * 6 * 4),
        (0, False, [(0, 1), (2, 3)], [(0, 5)], None),
        (0, False, [(0, 6)], [(0, 5)], None),
        (1, False, [(0, 2)], [(0, 5)], None),
        (1, True, [(1, 2)], [(0, 5)], 1 * 8 * 4),
        (0, True, [(0, 2)], [(0, 5)], None),
    ],
)
def test_ranges_of_others(axis: int, transposed: bool, small: Any, large: Any, offset: int | None) -> None:
    tensor = Tensor("w", "F32", (8, 6), Path("x"), 0)
    a, b = (Weight(None, PlannedTensor("F32", part(tensor, axis, r)), transposed) for r in (small, large))  # type: ignore[arg-type]
    assert offset_in(a, b) == offset
