"""The six released models, as headers without weights: the packaged tables fit them and the counts are exact."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import pytest

from matexport.checkpoint import open_checkpoint
from matexport.families import family_of
from support import language_config, language_tensors, matexport, vision_config, vision_tensors

# (kind, d_model, layers) -> parameters at levels 1, 2, 4 and 8: exact where they were counted on the released
# checkpoints, else as published, rounded to millions
RELEASED = {
    ("lm", 768, 24): (129_723_648, 87e6, 65e6, 54e6),
    ("lm", 1024, 48): (370e6, 217e6, 141e6, 102e6),
    ("lm", 1536, 48): (781e6, 439e6, 268e6, 182e6),
    ("lm", 2048, 48): (1.34e9, 736e6, 432e6, 280e6),
    ("vision", 512, 20): (35_916_008, None, None, None),
    ("vision", 1024, 20): (135e6, None, None, None),
}


def headers_only(folder: Path, kind: str, d_model: int, layers: int) -> Path:
    """A checkpoint whose weight file is a hole: shapes scaled up from a tiny model of the same kind."""
    if kind == "lm":
        config = language_config(d_model=64, n_layer=1, vocab_size=50277, d_state=128)
        tiny = language_tensors(config)
        del tiny["lm_head.weight"]
    else:
        config = vision_config(d_model=64, n_layer=1, image_size=224, patch_size=16, n_classes=1000, d_state=128)
        tiny = vision_tensors(config)
    scale = {64: d_model, 128: 2 * d_model, 128 + 256: 2 * d_model + 256, 256 + 256 + 64: 4 * d_model + 256 + 64}
    per_head = ("A_log", "dt_bias", ".D")
    header: dict[str, object] = {}
    end = 0
    for name, array in tiny.items():
        shape = list(array.shape) if name.endswith(per_head) else [scale.get(n, n) for n in array.shape]
        for i in range(layers if "layers.0." in name else 1):
            size = 4 * math.prod(shape)
            entry = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
            header[name.replace("layers.0.", f"layers.{i}.")] = entry
            end += size
    raw = json.dumps(header).encode()
    folder.mkdir()
    released = {**config, "d_model": d_model, "n_layer": layers, "ssm_cfg": {}}
    (folder / "config.json").write_text(json.dumps(released))
    with (folder / "model.safetensors").open("wb") as f:
        f.write(struct.pack("<Q", len(raw)) + raw)
        f.truncate(8 + len(raw) + end)
    return folder


@pytest.mark.parametrize("model", RELEASED, ids=str)
def test_packaged_tables(tmp_path: Path, model: tuple[str, int, int]) -> None:
    source = headers_only(tmp_path / "source", *model)
    assert family_of(open_checkpoint(source)).packaged_table(open_checkpoint(source)) is not None
    result = matexport("slices", "-m", source, "--format", "json")
    assert result.code == 0, result
    rows = {row["name"]: row["parameters"] for row in result.json["rows"]}
    assert len(rows) == 8
    assert "not trained" not in result.stderr
    for name, want in zip(("full", "half", "quarter", "eighth"), RELEASED[model], strict=True):
        if isinstance(want, int):
            assert rows[name] == want
        elif want is not None:
            assert rows[name] == pytest.approx(want, rel=0.005, abs=0.6e6)


def test_untrained_widths_of_a_released_model(tmp_path: Path) -> None:
    source = headers_only(tmp_path / "source", "lm", 768, 24)
    (tmp_path / "mine.csv").write_text("name,Mamba Dims\nmine,108\nodd,100\n")
    noted = matexport("slice", "-m", source, "-c", tmp_path / "mine.csv", "-s", "mine", "--dry-run")
    assert "widths [108] were not trained (trained: [96, 192, 384, 768])" in noted.stderr
    refused = matexport("slice", "-m", source, "-c", tmp_path / "mine.csv", "-s", "odd", "--dry-run")
    assert refused.code == 4
    assert "legal widths: 12, 24, 36, ..., 756, 768" in refused.stderr
