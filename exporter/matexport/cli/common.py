"""What the verbs share: options spelled alike everywhere, output, progress."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from matexport.errors import InputError, printable
from matexport.writer import Progress

if TYPE_CHECKING:
    import numpy as np

Command = Callable[..., Any]

model_option = click.option(
    "-m",
    "--model",
    required=True,
    metavar="MODEL",
    help="FOLDER, or ORG/NAME[@REVISION] on the Hugging Face Hub.",
)
table_option = click.option(
    "-c",
    "--config",
    "table",
    metavar="CSV",
    help="Slice table; by default slices.csv beside the model, else the packaged one.",
)
slice_option = click.option(
    "-s", "--slice", "row", metavar="NAME", help="Row: its name, #3 for the third one, or a unique part of its name."
)
force_option = click.option("--force", is_flag=True, help="Replace an output that is not empty.")
pickle_option = click.option("--allow-pickle", is_flag=True, help="Also read pytorch_model.bin; nothing in it is run.")
format_option = click.option(
    "--format",
    "style",
    type=click.Choice(["human", "json"]),
    default="human",
    show_default=True,
    help="What stdout gets.",
)


def quantity(units: dict[str, int]) -> Callable[[click.Context, click.Parameter, str | None], int | None]:
    """A callback that reads numbers such as 200KB or 2.5B."""

    def read(_: click.Context, parameter: click.Parameter, text: str | None) -> int | None:
        if text is None:
            return None
        match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([A-Za-z]*)", text.strip())
        unit = {name.casefold(): factor for name, factor in units.items()}.get(match[2].casefold()) if match else None
        if match is None or unit is None:
            raise click.BadParameter(f"{text!r}: write a number and one of {', '.join(n for n in units if n)}")
        return int(float(match[1]) * unit)

    return read


BYTES = quantity(
    {"": 1, "B": 1}
    | {f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}
    | {f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)}
)
COUNT = quantity({"": 1, "K": 10**3, "M": 10**6, "B": 10**9})


def echo_json(value: Any) -> None:
    """Machine-readable data, to stdout."""
    click.echo(json.dumps(value, indent=2))


def echo_table(titles: list[str], rows: list[list[str]], *, left: int = 1) -> None:
    """A table to stdout, its first `left` columns aligned to the left."""
    cells = [[printable(cell).replace("\n", " ") for cell in row] for row in [titles, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(titles))]
    for row in cells:
        line = "  ".join(
            c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        click.echo(line.rstrip())


def say(text: str) -> None:
    """A line to stdout, safe for a terminal."""
    click.echo(printable(text))


def note(text: str) -> None:
    """A line to stderr."""
    click.echo(f"note: {printable(text)}", err=True)


def hint(*command: object) -> None:
    """The last line: the command that most users want next, its words quoted for a shell."""
    click.echo(f"hint: {printable(shlex.join(['matexport', *map(str, command)]))}", err=True)


@contextlib.contextmanager
def progress_bar(label: str, total: int) -> Iterator[Progress]:
    """A bar of bytes on stderr, on a terminal only."""
    if not sys.stderr.isatty():
        yield lambda n: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    # started by the first bytes, so that it does not meet huggingface_hub's own bars
    columns = "{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(label, total=total)

    def advance(count: int) -> None:
        bar.start()
        bar.advance(task, count)

    try:
        yield advance
    finally:
        bar.stop()


def load_arrays(path: Path | None, option: str) -> dict[str, np.ndarray] | None:
    """Arrays by name from an .npz file. Raises InputError."""
    if path is None:
        return None
    import numpy as np

    try:
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as data:
            return dict(data)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
        what = f"is not an .npz file: {e}"
        raise InputError(what, where=f"{option} {path}", fix="write it with numpy.savez") from None


def human_bytes(count: int) -> str:
    """12.3 MB, in powers of 1000."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def shape_ranges(profile: Mapping[str, Mapping[str, Sequence[int]]]) -> dict[str, str]:
    """The shapes that a profile takes, inputs that are alike in one line."""
    alike: dict[str, list[str]] = {}
    for name, shapes in profile.items():
        low, best, high = ("x".join(map(str, shapes.get(end, []))) for end in ("min", "opt", "max"))
        alike.setdefault(f"{low} to {high}, best {best}", []).append(name)
    return {names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else ""): text for text, names in alike.items()}
