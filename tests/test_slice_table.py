from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from matexport.dims import MAX_CELL, MAX_INT, Dims, parse_dims
from matexport.errors import TableError, printable
from matexport.slice_table import MAX_FILE, Row, format_table, parse_table, read_table

# The published header, with cells as the MatFormer slicing configurations write them.
SEED_STYLE = """\
name,# Layers,# Effective Params (B),MMLU PT accuracy,FFN Hidden Dims,Layers Skipped
Main model,35,3.98,62.30%,"[16384, 16384, ...]",
Official E2B,30,1.91,50.9%,"[8192, ...]","[20, 21, 22, 23, 24]"
Mixed,4,,,"[2_048 * 4, 2_048 * 8, ...]",[]
"""


# ------------------------------------------------------------------------------------------- cells
@pytest.mark.parametrize(
    ("cell", "count", "widths"),
    [
        ("8192", 3, (8192,) * 3),
        ("2_048 * 8", 2, (16384,) * 2),
        ("[4096, ...]", 4, (4096,) * 4),
        ("[16384, 16384, ...]", 4, (16384,) * 4),
        ("[2_048 * 4, 2_048 * 8, ...]", 4, (8192, 16384, 16384, 16384)),
        ("[8192] * 2 + [16384] * 2", 4, (8192, 8192, 16384, 16384)),
        ("2 * [8, 4] + [2]", 5, (8, 4, 8, 4, 2)),
        ("[1, 2, ..., 9]", 5, (1, 2, 2, 2, 9)),
        ("[8, ...] + [4] * 2", 5, (8, 8, 8, 4, 4)),
        ("[5, …]", 2, (5, 5)),
        ("[1, ..., 9]", 2, (1, 9)),
        ("[1, 2]", 3, None),
        ("[1, 2, ..., 9]", 1, None),
    ],
)
def test_cells(cell: str, count: int, widths: tuple[int, ...] | None) -> None:
    dims = parse_dims(cell, "here")
    assert dims is not None
    assert dims.resolve(count) == widths


@pytest.mark.parametrize(
    "cell",
    [
        "__import__('os').system('touch /tmp/owned')",
        "[8192, ..., 16384, ..., 8192, ...]",
        "[8192, ...] * 2",
        "2**10**10",
        "2 * * 3",
        "((((((1))))))",
        "[[1], [2]]",
        "1" * 10**6,
        "4294967296",
        "2147483648 * 2",
        "[1] * 2147483648",
        "[1] * 100000" + " * 1" * 1000,
        "[1] * 100000" + " + [1] * 0" * 1000,
        "[" * 5000,
        "[1,] * ",
        "[...]",
        "[1, ..., ...]",
        "[1] * [2]",
        "[1] + 2",
        "-5",
        "1.5",
        "[1 2]",
        "0x10",
        "\u0661",
        "1, 2",
    ],
    ids=lambda cell: cell[:24],
)
def test_refused_cells(cell: str) -> None:
    with pytest.raises(TableError, match=r"t\.csv, line 2"):
        parse_dims(cell, "t.csv, line 2")
    assert not os.path.exists("/tmp/owned")


def test_ambiguous_fill_says_how_to_write_it() -> None:
    with pytest.raises(TableError, match=r"write how often each width occurs.*\[8192\] \* 10"):
        parse_dims("[8192, ..., 16384, ..., 8192, ...]", "x")


def test_cell_size_is_bounded() -> None:
    with pytest.raises(TableError, match="1 MiB"):
        parse_dims("1" + " " * MAX_CELL + "1", "x")


widths = st.integers(0, MAX_INT)
some_dims = st.builds(
    Dims, st.lists(widths, max_size=6).map(tuple), st.none() | widths, st.lists(widths, max_size=4).map(tuple)
).filter(lambda d: d.fill is not None or not d.tail)


@given(some_dims, st.integers(0, 20))
def test_dims_survive_printing(dims: Dims, extra: int) -> None:
    again = parse_dims(str(dims), "x")
    assert again is not None
    count = len(dims.head) + len(dims.tail) + (extra if dims.fill is not None else 0)
    assert again.resolve(count) == dims.resolve(count)
    assert parse_dims(str(again), "x") == again


# ------------------------------------------------------------------------------------------- tables
def test_seed_style_table() -> None:
    rows = parse_table(SEED_STYLE).rows
    assert [row.name for row in rows] == ["Main model", "Official E2B", "Mixed"]
    assert rows[0].ffn is not None
    assert rows[0].ffn.resolve(35) == (16384,) * 35
    assert rows[1].skipped == (20, 21, 22, 23, 24)
    assert (rows[1].layers, rows[1].effective) == (30, 1.91)
    assert rows[0].metrics == {"MMLU PT accuracy": "62.30%"}
    assert rows[2].metrics == {}
    assert rows[2].skipped == ()


@pytest.mark.parametrize(
    "text",
    [
        SEED_STYLE.replace("MMLU PT accuracy,", "").replace("62.30%,", "").replace("50.9%,", "").replace(",,,", ",,"),
        "\ufeff" + SEED_STYLE,
        SEED_STYLE.replace("\n", "\r\n"),
        SEED_STYLE.replace("name,# Layers", "NAME,# layers"),
        "\n" + SEED_STYLE + "\n\n",
        SEED_STYLE.replace("Layers Skipped\n", "Layers Skipped,\n"),
    ],
    ids=["no metric column", "BOM", "CRLF", "case", "blank lines", "trailing comma"],
)
def test_variations_of_the_format(text: str) -> None:
    plain = parse_table(SEED_STYLE).rows
    for row, want in zip(parse_table(text).rows, plain, strict=True):
        assert (row.name, row.skipped, row.ffn) == (want.name, want.skipped, want.ffn)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("name,Mamba Dims\n", "has no rows"),
        ("Names,Mamba Dims\na,1\n", "rename column 'names' to 'name'"),
        ("title,Mamba Dims\na,1\n", "no column 'name'"),
        ("name,name\na,b\n", "'name' occurs twice"),
        ("name,x\na,1\na,2\n", "line 3.*used before, in line 2"),
        ("name,x\n,1\n", "line 2: has no name"),
        ("name,x\na,1,2\n", "3 cells for 2 columns"),
        ('name,x\n"a,1\n', "is not CSV"),
        ("name,# Layers\na,[3]\n", "column '# Layers'"),
        ("name,Layers Skipped\na,3\n", r"write \[20, 21\]"),
        ('name,Layers Skipped\na,"[3, ...]"\n', "not a list of layers"),
        ("name,# Effective Params (B)\na,many\n", "'many' is not a number"),
        ("name,x\na\0,1\n", "NUL"),
        ("name,Mamba Dim\na,8\n", "'mamba dim' is not known(.|\n)*'Mamba Dims'"),
        ("name,FFN Hidden Dim\na,8\n", "'FFN Hidden Dims'"),
        ("name" + ",x" * 2000 + "\na\n", "more than 1000 columns"),
    ],
)
def test_refused_tables(text: str, message: str) -> None:
    with pytest.raises(TableError, match=message) as caught:
        parse_table(text, "t.csv")
    assert "t.csv" in str(caught.value)
    assert "fix:" in str(caught.value)


def test_tables_are_bounded(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="10000 rows"):
        parse_table("name\n" + "".join(f"r{i}\n" for i in range(10_001)))
    with pytest.raises(TableError, match="is not CSV"):
        parse_table("name\n" + "x" * (MAX_CELL + 1) + "\n")
    big = tmp_path / "big.csv"
    big.write_bytes(b"name\n" + b"x" * MAX_FILE)
    with pytest.raises(TableError, match="16 MiB"):
        read_table(big)
    big.write_bytes(b"name\n\xff\n")
    with pytest.raises(TableError, match="not UTF-8"):
        read_table(big)
    with pytest.raises(TableError, match="cannot be read"):
        read_table(tmp_path)


def test_names_are_safe_to_print() -> None:
    row = parse_table("name,x\n\x1b[31mred\u202eder,1\n").rows[0]
    with pytest.raises(TableError) as caught:
        parse_table("name,Mamba Dims\n\x1b[31mred\u202eder,?\n")
    assert "\x1b" not in str(caught.value)
    assert "\u202e" not in str(caught.value)
    assert printable("\x1b\u202ea\n") == "\\u001b\\u202ea\n"
    assert row.name.startswith("\x1b")


def test_formulas_are_defused_when_written() -> None:
    row = Row("=cmd|' /C calc'!A0", metrics={"note": "@SUM(1)", "loss": "-1.5"})
    text = format_table([row])
    assert "'=cmd" in text
    assert "'@SUM" in text
    assert ",-1.5" in text
    assert parse_table(text).rows == (row,)


text_cells = (
    st.text(st.characters(exclude_characters="\0\ufeff", exclude_categories=["Cs"]), min_size=1, max_size=20)
    .map(str.strip)
    .filter(bool)
)
table_rows = st.builds(
    Row,
    name=text_cells,
    skipped=st.lists(st.integers(0, 99), max_size=4).map(tuple),
    ffn=st.none() | some_dims.map(lambda d: parse_dims(str(d), "x")),
    mamba=st.none() | some_dims.map(lambda d: parse_dims(str(d), "x")),
    layers=st.none() | st.integers(0, 1000),
    effective=st.none() | st.floats(0, 1e6, allow_nan=False, allow_infinity=False).map(lambda f: round(f, 6)),
    metrics=st.dictionaries(st.sampled_from(["Accuracy", "a, b", "Loss"]), text_cells, max_size=3),
)


@given(st.lists(table_rows, min_size=1, max_size=4, unique_by=lambda row: row.name))
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_tables_survive_printing(rows: list[Row]) -> None:
    assert list(parse_table(format_table(rows)).rows) == rows


@given(st.binary(max_size=400))
@settings(max_examples=400)
def test_random_bytes_never_crash(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    for candidate in (text, "name,Mamba Dims\n" + text, f'name,Mamba Dims\na,"{text}"\n'):
        with contextlib.suppress(TableError):
            parse_table(candidate)


@given(st.text(st.sampled_from("0123456789_[],.*+ …"), max_size=60))
@settings(max_examples=400)
def test_random_cells_never_crash(cell: str) -> None:
    with contextlib.suppress(TableError):
        parse_dims(cell, "x")


# -------------------------------------------------------------------------------------------- names
def test_finding_rows() -> None:
    table = parse_table("name\nConfig for E2.49B\nConfig for E2.98B\nMain\nmain two\n", "t.csv")
    assert table.find("Main").name == "Main"  # exact before partial
    assert table.find("E2.49").name == "Config for E2.49B"
    assert table.find("#4").name == "main two"
    with pytest.raises(TableError, match=r"part of 2 names\n.*'Config for E2\.49B', 'Config for E2\.98B'"):
        table.find("Config")
    with pytest.raises(TableError, match=r"did you mean 'Config for E2\.49B'"):
        table.find("Confg for E2.49B")
    with pytest.raises(TableError, match="#1 to #4"):
        table.find("#9")
