"""The published rows at the real size: exact counts, from headers alone."""

from __future__ import annotations

from pathlib import Path

import pytest

import gemma
from matexport.checkpoint import open_checkpoint
from matexport.families import family_of, table_of
from matexport.families.gemma3n.config import read_config
from matexport.families.rows import CLOSE
from matexport.slice_table import Row
from support import REPOSITORY, matexport

TABLE = REPOSITORY / "slices" / "gemma3n.csv"


@pytest.fixture(scope="module")
def e4b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """E4B's headers and config.json; the weights are holes."""
    return gemma.write_hollow(tmp_path_factory.mktemp("e4b") / "gemma-3n-E4B", gemma.e4b_config())


def counts(skipped: int, widths: list[int]) -> tuple[int, int]:
    """Effective and text parameters of a slice of E4B, by hand: the sizes of every tensor of the paper's model."""
    hidden, per_layer, rank, altup, queries, keys, head = 2048, 256, 64, 4, 8 * 256, 2 * 256, 256
    attention = 2 * hidden * queries + 2 * hidden * keys + 2 * head
    prediction = altup**3 + altup**2 + altup * hidden + 2 * hidden
    laurel, inputs, norms = 2 * rank * hidden + hidden, 2 * per_layer * hidden + hidden, 4 * hidden
    layer = attention + prediction + laurel + inputs + norms + per_layer * hidden
    layers = 35 - skipped
    effective = layers * layer + 3 * hidden * sum(widths) + 2 * (altup - 1) * hidden**2 + per_layer + hidden
    return effective, effective + 262_400 * hidden + 262_144 * layers * per_layer


def test_sixteen_rows_with_exact_counts(e4b: Path) -> None:
    result = matexport("slices", "-m", e4b, "--format", "json")
    assert result.code == 0, result
    rows = result.json["rows"]
    assert len(rows) == 16
    table = table_of(open_checkpoint(e4b), family_of(open_checkpoint(e4b)))
    assert table is not None
    for row, declared in zip(rows, table.rows, strict=True):
        assert declared.ffn is not None
        widths = declared.ffn.resolve(row["layers"])
        assert widths is not None
        effective, text = counts(len(declared.skipped), list(widths))
        assert row["effective_parameters"] == effective
        assert row["model_parameters"] == text
        assert row["parameters"] == text + sum(map(_size, gemma.TOWERS.values()))
        assert declared.effective is not None
        assert abs(effective / 1e9 - declared.effective) <= CLOSE
        assert set(widths) <= {8192, 16384}
    by_name = {row["name"]: row for row in rows}
    assert by_name["Main model"]["effective_parameters"] == 3_980_491_248
    assert by_name["Main model"]["model_parameters"] == 6_866_696_688
    assert by_name["Config for E2.49B (block-level)"]["effective_parameters"] == 2_470_541_808
    assert by_name["Config for E2.49B (block-level)"]["model_parameters"] == 5_356_747_248
    beaten = [i for i, row in enumerate(rows, 1) if row["dominated_by"]]
    assert beaten == [1, 10, 12, 14, 15, 16]
    assert result.stderr.count("note:") == 1
    assert "Config for E3.79B (block-level): is named E3.79B, it has 3.73 B" in result.stderr


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def test_a_declared_count_that_is_wrong_is_noted(e4b: Path, tmp_path: Path) -> None:
    """Negative control of the counts: 0.8 B is not what the published example has."""
    (tmp_path / "tiny.csv").write_text(gemma.TINY)
    result = matexport("slice", "-m", e4b, "-c", tmp_path / "tiny.csv", "-s", "Tiny", "--dry-run", "--format", "json")
    assert result.code == 0, result
    assert result.json["effective_parameters"] == counts(20, [4096] * 15)[0]
    assert "declares 0.8 B effective parameters, it has 0.59 B" in result.stderr
    assert "widths [4096] were never trained (trained: 8192 to 16384)" in result.stderr
    assert "was never trained (trained: [20, 21, 22, 23, 24])" in result.stderr


def test_transformers_counts_the_same() -> None:
    torch = pytest.importorskip("torch")
    from transformers import Gemma3nTextConfig
    from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextModel

    config = gemma.e4b_config()["text_config"]
    kept = [i for i in range(35) if i not in range(20, 25)]
    edits = {
        "num_hidden_layers": 30, "num_kv_shared_layers": 10, "intermediate_size": [8192] * 30,
        "layer_types": [config["layer_types"][i] for i in kept],
        "activation_sparsity_pattern": [config["activation_sparsity_pattern"][i] for i in kept],
    }  # fmt: skip
    with torch.device("meta"):
        model = Gemma3nTextModel(Gemma3nTextConfig(**{**config, **edits}))
    dead = 10 * (2 * 512 * 2048 + 256)  # keys and values of sharing layers, which transformers does not create
    assert sum(p.numel() for p in model.parameters()) + dead == counts(5, [8192] * 30)[1]


def test_the_defaults_are_transformers() -> None:
    from transformers import Gemma3nTextConfig

    ours, theirs = read_config({"model_type": "gemma3n_text"}, ""), Gemma3nTextConfig()
    assert ours.layers == theirs.num_hidden_layers
    assert list(ours.types) == theirs.layer_types
    assert list(ours.sparsity) == theirs.activation_sparsity_pattern
    assert list(ours.widths) == theirs.intermediate_size
    assert (ours.hidden, ours.per_layer, ours.shared) == (2048, 256, theirs.num_kv_shared_layers)
    assert (ours.vocab, ours.per_layer_vocab) == (theirs.vocab_size, theirs.vocab_size_per_layer_input)
    assert (ours.heads, ours.kv_heads, ours.head_dim) == (8, theirs.num_key_value_heads, theirs.head_dim)
    assert (ours.altup, ours.laurel) == (theirs.altup_num_inputs, theirs.laurel_rank)


def test_the_headers_do_not_grow_with_the_rows(e4b: Path) -> None:
    """A whole plan of the real size holds no weight: it is JSON of a few hundred kilobytes."""
    family = family_of(open_checkpoint(e4b))
    plan = family.plan_slice(open_checkpoint(e4b), Row("whole"), None)
    assert len(plan.tensors) == 851 + len(gemma.TOWERS)
    assert plan.notes == ()
