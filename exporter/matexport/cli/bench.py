"""`matexport bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from matexport.cli.common import echo_json, echo_table, format_option
from matexport.errors import InputError
from matexport.runtimes.bench import measure, summary


def numbers(text: str) -> tuple[int, ...]:
    """128,512: positive whole numbers."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise click.BadParameter(f"{text!r}: write positive whole numbers, as in 128,512")
    return tuple(map(int, parts))


@click.command()
@click.option(
    "-m",
    "--model",
    required=True,
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="An ONNX folder, or a .onnx file.",
)
@click.option(
    "--against",
    metavar="PATH",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Also measure this one, in turns; ratios are to the first.",
)
@click.option("--lengths", type=numbers, default="32,128,512", show_default=True, help="Tokens of a prompt.")
@click.option("--batches", type=numbers, default="1,8", show_default=True, help="Images at once.")
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True, help="Measurements of each.")
@click.option(
    "--threads",
    type=click.IntRange(0),
    default=1,
    show_default=True,
    help="Inside an operator; 0 lets ONNX Runtime choose.",
)
@click.option("--no-kernels", is_flag=True, help="Without the kernels of matexport-plugins: the functions in the file.")
@format_option
def command(
    model: Path, against: tuple[Path, ...], lengths: tuple[int, ...], batches: tuple[int, ...], rounds: int,
    threads: int, no_kernels: bool, style: str,
) -> None:  # fmt: skip
    """Measures an ONNX model in ONNX Runtime on this machine's CPU.

    For language models tokens a second of prompts and of single steps, for vision images a second; the
    time to open it, and its peak memory. Each model runs in a process of its own, all in turns.

    \b
    Examples:
      matexport bench -m half-onnx
      matexport bench -m half-onnx --against half-int4 --lengths 128,2048 --threads 2
    """
    files = [_file(path) for path in (model, *against)]
    found = measure(
        files, lengths=lengths, batches=batches, rounds=rounds, threads=threads, library=not no_kernels,
        progress=lambda text: click.echo(f"{text} ...", err=True),
    )  # fmt: skip
    report = [_report(each, found[0]) for each in found]
    if style == "json":
        echo_json({"threads": threads, "rounds": rounds, "models": report})
        return
    for path, each in zip((model, *against), report, strict=True):
        click.echo(f"{path}: opened in {each['load_seconds']:.2f} s, peak memory {each['peak_mib']:.0f} MiB")
        rows = [[name, _range(r), _range(each["ratio"].get(name))] for name, r in each["rates"].items()]
        echo_table(["", "median (range)", "over the first" if each is not report[0] else ""], rows)


def _file(path: Path) -> Path:
    """The model of a folder, or of a bundle's row."""
    file = path / "model.onnx" if path.is_dir() else path
    if not file.is_file():
        fix = "give a folder that matexport onnx wrote, or one .onnx file of a bundle"
        raise InputError("there is no ONNX model", where=str(file), fix=fix)
    return file


def _report(found: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    ratios = {
        name: summary([a / b for a, b in zip(rates, first["rates"][name], strict=True)])
        for name, rates in found["rates"].items()
    }
    rates = {name: summary(values) for name, values in found["rates"].items()}
    return {**found, "rates": rates, "ratio": {} if found is first else ratios}


def _range(values: dict[str, float] | None) -> str:
    return f"{values['median']:.3g} ({values['min']:.3g} to {values['max']:.3g})" if values else ""
