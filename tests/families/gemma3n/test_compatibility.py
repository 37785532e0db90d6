"""Which runtimes load a slice: the table's facts, one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import gemma
import matexport as mx
from matexport.dims import Dims
from matexport.families.gemma3n.compatibility import LOADERS, unmet, verdicts
from matexport.slice_table import Row

CONFIG = gemma.e4b_config()
NAMES = list(gemma.shapes(CONFIG))
ALL = {loader.name for loader in LOADERS}
NEVER = "onnxruntime-genai builder, optimum-onnx"


def takers(config: dict[str, Any], names: list[str]) -> set[str]:
    return {verdict.loader for verdict in verdicts(config, names) if verdict.takes}


def test_the_released_model_loads_everywhere() -> None:
    assert takers(CONFIG, NAMES) == ALL - {NEVER}
    assert all(loader.source for loader in LOADERS)


@pytest.mark.parametrize(
    ("row", "refusers"),
    [
        (Row("E2B", skipped=(20, 21, 22, 23, 24), ffn=Dims(fill=8192)), set()),
        (Row("mixed", ffn=Dims(head=(8192, 16384), fill=8192)), {"llama.cpp"}),
        (Row("aperiodic", skipped=(20,), ffn=Dims(fill=8192)), {"llama.cpp"}),
        (Row("sparse block", skipped=(0, 1, 2, 3, 4), ffn=Dims(fill=8192)), {"llama.cpp"}),
        (Row("near a donor", skipped=(17,), ffn=Dims(fill=8192)), {"llama.cpp"}),
        (Row("a donor", skipped=(19, 24, 29, 34), ffn=Dims(fill=8192)), {"llama.cpp", "vLLM"}),
        (Row("both donors", skipped=(18, *range(20, 24), *range(25, 29), *range(30, 34))), {"llama.cpp"}),
    ],
    ids=lambda value: value.name if isinstance(value, Row) else "",
)
def test_rows(tmp_path: Path, row: Row, refusers: set[str]) -> None:
    plan = mx.plan(gemma.write_hollow(tmp_path / "e4b", CONFIG), row).plan
    assert takers(plan.config, list(plan.tensors)) == ALL - {NEVER} - refusers
    assert any("llama.cpp would misread" in note for note in plan.notes) is (bool(refusers) and row.name != "mixed")


def test_fixed_donor_offsets() -> None:
    """vLLM takes the last two layers with keys and values for the donors, a sliding one and a full one."""
    text = {**CONFIG["text_config"], "num_kv_shared_layers": 14}
    assert "donor offsets" in unmet({**CONFIG, "text_config": text}, NAMES)
    assert "vLLM" not in takers({**CONFIG, "text_config": text}, NAMES)


@pytest.mark.parametrize(
    ("edit", "names", "fact", "refusers"),
    [
        ({"activation_sparsity_pattern": [0.95] * 10 + [0] * 25}, NAMES, "floats", {"transformers >= 5"}),
        ({"rope_theta": None}, NAMES, "rope keys", {"mlx-lm"}),
        (
            {}, [name for name in NAMES if "layers.30.self_attn.k_proj" not in name], "unused K/V",
            {"transformers 4.57", "transformers 4.53", "vLLM", "mistral.rs", "llama.cpp"},
        ),
    ],
    ids=["floats", "rope", "keys"],
)  # fmt: skip
def test_other_facts(edit: dict[str, Any], names: list[str], fact: str, refusers: set[str]) -> None:
    text = {key: value for key, value in {**CONFIG["text_config"], **edit}.items() if value is not None}
    config = {**CONFIG, "text_config": text}
    assert fact in unmet(config, names)
    assert takers(config, names) == ALL - {NEVER} - refusers


def test_the_text_model_alone() -> None:
    config = CONFIG["text_config"]
    names = [name.replace("language_model.", "") for name in NAMES if name not in gemma.TOWERS]
    assert takers(config, names) == ALL - {NEVER, "mlx-lm", "llama.cpp", "mistral.rs"}
