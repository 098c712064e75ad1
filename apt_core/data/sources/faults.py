"""What is wrong with the content of a source, collected, so that all of it is told at once."""

from __future__ import annotations

from typing import ClassVar, Literal, NoReturn

from apt_core.errors import ConfigError, Problem
from apt_core.providers.dataset import Columns

MAX_NAMED = 20
"""Faults that are named; the others are counted."""

MAX_COUNTED = 1000
"""With so many faults nothing is read on: it is of another kind."""

_MAGIC = (
    (b"\x1f\x8b", "gzip, so that its name should end in .gz"),
    (b"\x28\xb5\x2f\xfd", "Zstandard, so that its name should end in .zst"),
    (b"PAR1", "parquet, so that its name should end in .parquet"),
    (b"PK\x03\x04", "a zip archive (unpack it, or read zip://*.txt::FILE by fsspec)"),
    (b"BZh", "bzip2 (unpack it)"),
    (b"\xfd7zXZ", "xz (unpack it)"),
    (b"%PDF", "a PDF"),
)


class Faults:
    """A file, table or result of a query while it is read, and what was found to be wrong with it.

    ``where`` names it in messages, ``key`` is the profile's key that led to it. ``replaced`` counts
    the bytes that ``errors: replace`` has replaced by U+FFFD.
    """

    unit: ClassVar[str] = "lines"

    def __init__(
        self,
        where: str,
        key: str = "data.train_path",
        columns: Columns | None = None,
        errors: Literal["strict", "replace"] = "strict",
    ) -> None:
        self.where, self.key = where, key
        self.columns, self.errors = columns or Columns(), errors
        self.replaced = 0
        self.num_faults = 0
        self._problems: list[Problem] = []

    def place(self, line: int) -> str:
        """Where a line or row is, for messages."""
        return f"{self.where}:{line}"

    def fault(self, message: str, line: int | None = None, hint: str = "") -> None:
        """Note what is wrong with a line, to be raised at the end. Raises ConfigError once there
        are MAX_COUNTED."""
        self.num_faults += 1
        if self.num_faults <= MAX_NAMED:
            where = self.where if line is None else self.place(line)
            self._problems.append(Problem(message, self.key, where, hint))
        if self.num_faults == MAX_COUNTED:
            self.raise_faults(at_least=True)

    def fail(self, message: str, line: int | None = None, hint: str = "") -> NoReturn:
        """Raise ConfigError: what is wrong leaves nothing to read on."""
        self.fault(message, line, hint)
        self.raise_faults()
        raise AssertionError

    def raise_faults(self, at_least: bool = False) -> None:
        """Raise ConfigError with all that was noted, if anything was."""
        if more := self.num_faults - MAX_NAMED if self.num_faults > MAX_NAMED else 0:
            number = f"at least {more:,}" if at_least else f"{more:,}"
            self._problems.append(
                Problem(f"{number} more {self.unit} cannot be read", self.key, self.where)
            )
        if self._problems:
            raise ConfigError(self._problems)

    def decoded(self, data: bytes, offset: int = 0, line: int | None = None) -> str:
        """``data``, which begins at byte ``offset``, as text.

        What is no UTF-8, and NUL, which no text file has, is a fault, or with ``errors: replace``
        becomes U+FFFD and is counted.
        """
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            if self.errors == "strict":
                self.fault(
                    f"is not UTF-8: byte 0x{data[error.start]:02x} at offset "
                    f"{offset + error.start:,}{_kind(data if offset == 0 else b'')}",
                    line,
                    "convert it to UTF-8, for instance with iconv, or set data.errors to replace",
                )
                return ""
            text = data.decode("utf-8", "replace")
            self.replaced += text.count("\ufffd") - data.count(b"\xef\xbf\xbd")
        if "\0" in text:
            if self.errors == "strict":
                self.fault(
                    f"holds a NUL byte at offset {offset + data.index(0):,}: it is binary, or "
                    f"UTF-16{_kind(data if offset == 0 else b'')}",
                    line,
                    "name text files alone, convert it to UTF-8, or set data.errors to replace",
                )
                return ""
            self.replaced += text.count("\0")
            text = text.replace("\0", "\ufffd")
        return text


def _kind(begins: bytes) -> str:
    for magic, kind in _MAGIC:
        if begins.startswith(magic):
            return f"; it looks like {kind}"
    return ""
