"""The errors a user can cause or meet: what is wrong, where, and how to fix it."""

from __future__ import annotations

import unicodedata


class MatexportError(Exception):
    """What went wrong, where (file, row, column, tensor) and how to fix it.

    Attributes:
        exit_code: what the command line exits with (0 ok, 1 unexpected or I/O, 2 usage, 3 mismatch,
            4 bad input, 5 missing dependency or hardware, 130 interrupted).
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", fix: str = ""):
        super().__init__(what)
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return printable(f"{text}\n  fix: {self.fix}" if self.fix else text)


class UsageError(MatexportError):
    """Arguments that do not go together."""

    exit_code = 2


class MismatchError(MatexportError):
    """An artefact that is not what it should be: parity or provenance."""

    exit_code = 3


class InputError(MatexportError):
    """A table, checkpoint or artefact that cannot be used."""

    exit_code = 4


class TableError(InputError):
    """A slice table that cannot be read, or a row that does not fit the model."""


class CheckpointError(InputError):
    """A checkpoint that is damaged, incomplete or of an unknown kind."""


class MissingError(MatexportError):
    """A library or a piece of hardware that this step needs and this machine has not."""

    exit_code = 5


class OutputError(MatexportError):
    """An output that the file system refuses: full, read-only, failing."""

    exit_code = 1


def printable(text: str) -> str:
    """Text from a file made safe for a terminal: control and direction-changing characters are escaped."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") else f"\\u{ord(c):04x}"
        for c in text
    )
