"""`matexport VERB`: finds the verb's file, and turns errors into one message and an exit code."""

from __future__ import annotations

import importlib
import signal
import sys
import traceback
from typing import Any

import click

from matexport.errors import MatexportError, printable
from matexport.version import __version__

VERBS = {  # verb -> its line in the help; the code is in matexport.cli.VERB
    "slices": "Lists the rows of a slice table for a model; --fit picks one.",
    "slice": "Writes one row as a standalone checkpoint.",
    "onnx": "Writes ONNX, from a full checkpoint and a row or from a slice.",
    "trt": "Builds a TensorRT engine from ONNX.",
    "bench": "Measures an ONNX model on this machine.",
    "verify": "Proves that an artefact computes what its source does.",
    "inspect": "Says what a folder is: family, widths, sizes, provenance.",
    "doctor": "Says which runtimes are usable here and how to get the rest.",
}

EXAMPLES = """\b
Examples:
  matexport slices -m checkpoint --fit 200KB
  matexport slice  -m checkpoint -s half -o half
  matexport onnx   -m checkpoint -s half -o half-onnx
  matexport trt    -m half-onnx -o half-rtx --target rtx
  matexport verify -m half-onnx --source checkpoint

\b
Exit codes:
  0 ok   1 unexpected or I/O   2 usage   3 parity or provenance mismatch
  4 bad input   5 missing dependency or hardware   130 interrupted

\b
Any verb takes -vv, which shows where an error came from.
"""


class Verbs(click.Group):
    """A group whose commands are modules, imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        command: click.Command = importlib.import_module(f"matexport.cli.{name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


@click.group(
    cls=Verbs, epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="matexport")
def cli() -> None:
    """Cuts nested (Matryoshka) checkpoints to size, exports them, and proves that they compute the same."""


def main(args: list[str] | None = None) -> Any:
    """The entry point; returns the exit code."""
    arguments = sys.argv[1:] if args is None else args
    verbose = "-vv" in arguments
    try:
        return cli.main([a for a in arguments if a != "-vv"], "matexport", standalone_mode=False) or 0
    except click.ClickException as e:
        e.show()
        return e.exit_code
    except (click.exceptions.Abort, KeyboardInterrupt) as e:
        said = str(e.__cause__ or e)  # click turns Ctrl-C into an Abort
        click.echo(f"interrupted; {printable(said)}" if said else "interrupted", err=True)
        return 130
    except MatexportError as e:
        if verbose:
            traceback.print_exc()
        click.echo(f"error: {e}", err=True)
        return e.exit_code
    except BrokenPipeError:
        return 1
    except Exception as e:
        if verbose:
            traceback.print_exc()
        click.echo(f"error: unexpected {type(e).__name__}: {printable(str(e))}\n  (-vv shows where)", err=True)
        return 1


def run() -> None:
    """Console script; being asked to end (SIGTERM) cleans up as Ctrl-C does."""
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    sys.exit(main())


if __name__ == "__main__":
    run()
