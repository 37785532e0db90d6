"""Checkpoints as the MatFormer Lab notebook leaves them: recognised, and put right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import Gemma3nForCausalLM

import gemma
import matexport as mx
from matexport.dims import Dims
from matexport.slice_table import Row
from support import matexport

FULL, HALF, BLOCK = 32, 16, (20, 21, 22, 23, 24)
TABLE = (
    "name,FFN Hidden Dims,Layers Skipped\n"
    f"E2B,{HALF},{list(BLOCK)!r}\n".replace("[", '"[').replace("]", ']"')
    + f"other widths,{FULL},\"{list(BLOCK)!r}\"\n"
    + f"other depth,{HALF},\"[5, 20, 21]\"\n"
    + f"other layers,{HALF},\"[5, 6, 7, 8, 9]\"\n"
)  # fmt: skip


def source(folder: Path) -> Path:
    """As deep as E4B, for the notebook knows no other depth."""
    config = gemma.text_config(
        "ssssf" * 7, shared=15, width=FULL, hidden_size=16, activation_sparsity_pattern=[0.95] * 10 + [0.0] * 25
    )
    return gemma.write_gemma(folder, gemma.multimodal_config(config), gemma.tensors(gemma.multimodal_config(config)))


def notebook(source: Path, output: Path, skipped: tuple[int, ...], width: int) -> Path:
    """What the notebook does, step by step: right tensors; sparsity in integers; `layer_types` as they were."""
    config = json.loads((source / "config.json").read_text())
    text, kept = config["text_config"], [i for i in range(35) if i not in skipped]
    sparse = 10 - sum(i <= 9 for i in skipped)
    text["num_kv_shared_layers"] -= sum(i >= 20 for i in skipped)
    text["activation_sparsity_pattern"] = [0.95] * sparse + [0] * (len(kept) - sparse)
    text["num_hidden_layers"] = len(kept)
    text["intermediate_size"] = [width] * len(kept)
    tensors: dict[str, np.ndarray] = {}
    for name, array in load_file(source / "model.safetensors").items():
        prefix, found, rest = name.partition("language_model.layers.")
        if found:
            index, _, rest = rest.partition(".")
            if int(index) in skipped:
                continue
            name = f"{prefix}{found}{kept.index(int(index))}.{rest}"
            if "gate_proj" in rest or "up_proj" in rest:
                array = array[:width]
            elif "down_proj" in rest:
                array = array[:, :width]
        elif "per_layer_model_projection" in name:
            array = array.reshape(35, -1, array.shape[1])[kept].reshape(-1, array.shape[1])
        elif "embed_tokens_per_layer" in name:
            array = array.reshape(len(array), 35, -1)[:, kept].reshape(len(array), -1)
        tensors[name] = np.ascontiguousarray(array)
    return gemma.write_gemma(output, config, tensors)


def same(one: Path, other: Path) -> bool:
    """The same tensors and config; the notebook's file has another order."""
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    equal = a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)
    return equal and (one / "config.json").read_bytes() == (other / "config.json").read_bytes()


def test_an_ffn_only_slice_needs_no_row(tmp_path: Path) -> None:
    full, lab = source(tmp_path / "source"), tmp_path / "lab"
    notebook(full, lab, (), HALF)
    with pytest.raises(Exception, match="activation_sparsity_pattern"):
        Gemma3nForCausalLM.from_pretrained(lab)
    result = matexport("inspect", "-m", lab, "--format", "json")
    assert result.json["damage"] == ["activation_sparsity_pattern holds integers: transformers 5 refuses to load it"]
    verdicts = {entry["loader"]: entry["takes"] for entry in result.json["loaders"]}
    assert not verdicts["transformers >= 5"]
    assert verdicts["transformers 4.57"]
    assert "--repair" in result.stderr
    assert matexport("slice", "-m", lab, "--repair", "-o", tmp_path / "repaired").code == 0
    mx.plan(full, Row("whole model", ffn=Dims(fill=HALF))).write(tmp_path / "direct")
    assert same(tmp_path / "repaired", tmp_path / "direct")


def test_a_slice_with_skipped_layers_asks_for_its_row(tmp_path: Path) -> None:
    full, lab = source(tmp_path / "source"), tmp_path / "lab"
    notebook(full, lab, BLOCK, HALF)
    table = tmp_path / "table.csv"
    table.write_text(TABLE)
    with pytest.raises(Exception, match=r"activation_sparsity_pattern|layer_types"):
        Gemma3nForCausalLM.from_pretrained(lab)
    result = matexport("inspect", "-m", lab)
    assert result.code == 0, result
    assert "layer_types is that of the 35 layers of the source, not of the 30 kept" in result.stdout
    refused: list[tuple[list[Any], str]] = [
        ([], "layer_types has 35 entries"),  # and the fix names --repair
        (["--repair"], "which layers were skipped cannot be inferred"),
        (["--repair", "-c", table, "-s", "other widths"], "its FFN widths are not those of row 'other widths'"),
        (["--repair", "-c", table, "-s", "other depth"], "its FFN widths are not those"),
        (["--repair", "-c", table, "-s", "other layers"], "the row keeps 30 layers, 30 with 10 shared ones are there"),
    ]
    for options, words in refused:
        result = matexport("slice", "-m", lab, *options, "-o", tmp_path / "repaired")
        assert result.code == 4, (options, result)
        assert words in result.stderr
        assert "--repair" in result.stderr or "-s ROW" in result.stderr
    repaired = tmp_path / "repaired"
    assert matexport("slice", "-m", lab, "--repair", "-c", table, "-s", "E2B", "-o", repaired).code == 0
    mx.plan(full, "E2B", table=table).write(tmp_path / "direct")
    assert same(repaired, tmp_path / "direct")
    result = matexport("verify", "-m", repaired, "--source", full, "-c", table, "-s", "E2B")
    assert result.code == 0, result
    (lab / "model.safetensors").unlink()


def test_what_can_be_inferred(tmp_path: Path) -> None:
    """All sharing layers were skipped: there is only one such slice."""
    full, lab = source(tmp_path / "source"), tmp_path / "lab"
    notebook(full, lab, tuple(range(20, 35)), HALF)
    assert matexport("slice", "-m", lab, "--repair", "-o", tmp_path / "repaired").code == 0
    mx.plan(full, Row("whole model", skipped=tuple(range(20, 35)), ffn=Dims(fill=HALF))).write(tmp_path / "direct")
    assert same(tmp_path / "repaired", tmp_path / "direct")


def test_nothing_to_repair(tmp_path: Path) -> None:
    """A row that it was not cut with must not become its name."""
    full = gemma.text_checkpoint(tmp_path / "source")
    result = matexport("slice", "-m", full, "--repair", "-o", tmp_path / "out")
    assert result.code == 2
    assert "nothing of it needs repair" in result.stderr
    assert "damage" not in matexport("inspect", "-m", full, "--format", "json").json


def test_the_row_is_checked_even_where_it_is_not_needed(tmp_path: Path) -> None:
    lab = notebook(source(tmp_path / "source"), tmp_path / "lab", (), HALF)
    (tmp_path / "t.csv").write_text(f"name,FFN Hidden Dims,Layers Skipped\nrow,{HALF},[7]\n")
    result = matexport("slice", "-m", lab, "--repair", "-c", tmp_path / "t.csv", "-s", "row", "-o", tmp_path / "out")
    assert result.code == 4
    assert "-s ROW" in result.stderr
