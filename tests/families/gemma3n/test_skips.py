"""Which layers may go: those whose keys and values no kept layer reads."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gemma
from matexport.errors import TableError
from matexport.families.gemma3n.config import read_config, sliced_config
from matexport.families.gemma3n.layout import check_donors
from matexport.families.rows import kept_layers
from matexport.slice_table import Row
from support import matexport


def donor_of(config: dict, layer: int) -> int | None:
    """The layer whose keys and values a layer uses, as transformers finds it: the last one of its type that has any."""
    types, n, shared = config["layer_types"], config["num_hidden_layers"], config["num_kv_shared_layers"]
    if layer < n - shared:
        return layer
    return next((i for i in reversed(range(n - shared)) if types[i] == types[layer]), None)


@given(
    types=st.text("sf", min_size=4, max_size=12),
    shared=st.integers(0, 6),
    skipped=st.sets(st.integers(0, 11), max_size=9),
)
@settings(max_examples=600, deadline=None, derandomize=True)
def test_a_skip_is_legal_iff_no_kept_layer_gets_another_donor(types: str, shared: int, skipped: set[int]) -> None:
    n = len(types)
    if shared >= n or set(types[n - shared :]) - set(types[: n - shared]):
        return
    source = gemma.text_config(types, shared=shared, activation_sparsity_pattern=[0.0] * n)
    row = Row("row", skipped=tuple(sorted(layer for layer in skipped if layer < n)))
    if len(row.skipped) == n:
        return
    text, kept = read_config(source, ""), kept_layers(row, n)
    sliced = sliced_config(source, text, kept, [64] * len(kept))
    after = [donor_of(sliced, j) for j in range(len(kept))]
    moved = [None if d is None else kept[d] for d in after] != [donor_of(source, i) for i in kept]
    if moved:
        with pytest.raises(TableError, match="reserved: layer"):
            check_donors(row, text, kept)
    else:
        check_donors(row, text, kept)


def refused(tmp_path: Path, source: Path, skipped: str, widths: str, *words: str) -> None:
    (tmp_path / "t.csv").write_text(f'name,FFN Hidden Dims,Layers Skipped\nrow,"{widths}","{skipped}"\n')
    result = matexport("slice", "-m", source, "-c", tmp_path / "t.csv", "-s", "row", "-o", tmp_path / "out")
    assert result.code == 4, result
    assert "t.csv, line 2 ('row')" in result.stderr
    assert "\n  fix: " in result.stderr
    for word in words:
        assert word in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_message_is_the_one_that_users_of_mistral_know(tmp_path: Path) -> None:
    source = gemma.write_hollow(tmp_path / "e4b", gemma.e4b_config())
    refused(
        tmp_path, source, "[18]", "[8192, ...]", "Layers 18 and 19 are reserved",
        "layer 18 holds the keys and values that layers [20, 21, 22, 23, 25, 26, 27, 28, 30, 31, 32, 33] read",
        "keep layer 18, or skip [18, 20, 21, 22, 23, 25, 26, 27, 28, 30, 31, 32, 33] together",
    )  # fmt: skip
    refused(tmp_path, source, "[19, 24, 29]", "[8192, ...]", "of these [34] are kept", "skip [19, 24, 29, 34] together")


@pytest.mark.parametrize(
    ("skipped", "widths", "words"),
    [
        ("[10]", "[32, ...]", "layer 10 does not exist"),
        ("[2, 2]", "[32, ...]", "layer 2 is skipped twice"),
        ("[0,1,2,3,4,5,6,7,8,9]", "[32, ...]", "skips every layer"),
        ("[0]", "[32, 32, 32, 32, 32, 32, 32, 32]", "gives 8 widths for 9 kept layers"),
        ("[0]", "[32] * 10", "gives 10 widths for 9 kept layers"),
        ("[]", "65", "width 65 of layer 0 is not between 1 and 64"),
        ("[]", "[64, 0, ...]", "0"),
        ("[]", "[64, 128, ...]", "width 128 of layer 1 is not between 1 and 64"),
    ],
    ids=["range", "twice", "all", "short", "long", "wide", "zero", "one-wide"],
)
def test_other_refusals(tmp_path: Path, skipped: str, widths: str, words: str) -> None:
    refused(tmp_path, gemma.text_checkpoint(tmp_path / "source"), skipped, widths, words)


def test_mamba_widths_are_refused(tmp_path: Path) -> None:
    source = gemma.text_checkpoint(tmp_path / "source")
    (tmp_path / "t.csv").write_text("name,Mamba Dims\nrow,32\n")
    result = matexport("slice", "-m", source, "-c", tmp_path / "t.csv", "-s", "row", "--dry-run")
    assert result.code == 4
    assert "not nested along 'Mamba Dims'" in result.stderr
    assert "'FFN Hidden Dims'" in result.stderr
