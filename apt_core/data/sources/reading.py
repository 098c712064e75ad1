"""Reads one file of data: bounded streams of bytes, lines and text, and everything that is wrong
with them."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, Literal, NoReturn

from apt_core.data.sources.files import INSTALL, DataFile, unreadable
from apt_core.error_text import one_line
from apt_core.errors import ConfigError, Problem
from apt_core.files import open_file
from apt_core.providers.dataset import Columns

BLOCK = 1 << 20
MAX_RECORD = 1 << 26
"""Bytes of the longest line, cell or record: it is held in memory as a whole."""

MAX_NAMED = 20
"""Faults of a file that are named; the others are counted."""

MAX_COUNTED = 1000
"""With so many faults a file is not read on: it is of another kind."""

ZST_WINDOW = 1 << 27
"""The most bytes of memory that a zst frame may ask for; it is what the command zstd admits."""

_ZST_PIECE = 1024
"""Bytes that are decompressed at a time: four of them may stand for 128 KiB, so all for 32 MiB."""

_BOMS = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
_MAGIC = (
    (b"\x1f\x8b", "gzip, so that its name should end in .gz"),
    (b"\x28\xb5\x2f\xfd", "Zstandard, so that its name should end in .zst"),
    (b"PAR1", "parquet, so that its name should end in .parquet"),
    (b"PK\x03\x04", "a zip archive (unpack it, or read zip://*.txt::FILE by fsspec)"),
    (b"BZh", "bzip2 (unpack it)"),
    (b"\xfd7zXZ", "xz (unpack it)"),
    (b"%PDF", "a PDF"),
)


class Reading:
    """One file while it is read: how, and what was found to be wrong with it.

    ``key`` is the profile's key that led to it, ``replaced`` counts what ``errors: replace`` has
    replaced by U+FFFD.
    """

    def __init__(
        self,
        file: DataFile,
        key: str = "data.train_path",
        columns: Columns | None = None,
        errors: Literal["strict", "replace"] = "strict",
    ) -> None:
        self.file, self.key = file, key
        self.columns, self.errors = columns or Columns(), errors
        self.where = file.where
        self.replaced = 0
        self.num_faults = 0
        self._problems: list[Problem] = []

    def fault(self, message: str, line: int | None = None, hint: str = "") -> None:
        """Note what is wrong with a line, to be raised at the end of the file. Raises ConfigError
        once there are MAX_COUNTED."""
        self.num_faults += 1
        if self.num_faults <= MAX_NAMED:
            where = self.where if line is None else f"{self.where}:{line}"
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
                Problem(f"{number} more lines cannot be read", self.key, self.where)
            )
        if self._problems:
            raise ConfigError(self._problems)

    @contextmanager
    def open(self, decompress: bool = True) -> Iterator[IO[bytes]]:
        """The content of the file, decompressed as it is read.

        Raises ConfigError for what cannot be read, is truncated or damaged, and for a file that is
        not, before and after, what it was when it was found.
        """
        zstd = _zstandard() if decompress and self.file.compression == ".zst" else None
        if decompress and self.file.compression == ".zst" and zstd is None:
            self.fail("reading .zst needs zstandard, which is not installed", hint=INSTALL)
        damaged: tuple[type[Exception], ...] = (zlib.error, gzip.BadGzipFile)
        damaged += () if zstd is None else (zstd.ZstdError,)
        stream: Any = None
        try:
            self._require_unchanged()
            with _open_raw(self.file) as raw:
                stream = raw
                if decompress and self.file.compression == ".gz":
                    stream = gzip.GzipFile(fileobj=raw)
                elif zstd is not None:
                    stream = io.BufferedReader(_Zst(raw, zstd), BLOCK)
                yield stream
            self._require_unchanged()
        except (ConfigError, GeneratorExit):
            raise
        except EOFError:
            position = stream.tell() if stream is not None else 0
            self.fail(
                f"is truncated: its {self.file.compression} stream ends after {position:,} bytes "
                "of content, before its end mark",
                hint="fetch or compress it again",
            )
        except damaged as error:
            self.fail(f"is damaged: {one_line(error)}", hint="fetch or compress it again")
        except OSError as error:
            raise ConfigError(unreadable(self.where, self.key, error)) from error
        except Exception as error:
            if self.file.filesystem is None:
                raise
            raise ConfigError(unreadable(self.where, self.key, error)) from error

    def _require_unchanged(self) -> None:
        if self.file.identity is not None and self.file.identity_now() != self.file.identity:
            self.fail(
                "has changed since the run began to read it",
                hint="start again when nothing writes to it",
            )

    def lines(self) -> Iterator[tuple[int, str]]:
        """Each line with its number, from 1, and its line feed; a byte order mark goes.

        Faults are noted, and the line is left out: bytes that are no UTF-8, NUL, and more than
        MAX_RECORD bytes.
        """
        with self.open() as stream:
            offset = number = 0
            while line := stream.readline(MAX_RECORD + 1):
                number += 1
                start, length, begins = offset, len(line), line[:8]
                if length > MAX_RECORD and not line.endswith(b"\n"):
                    del line
                    while (rest := stream.readline(BLOCK)) and not rest.endswith(b"\n"):
                        length += len(rest)
                    offset += length + len(rest)
                    self.fault(f"is longer than {MAX_RECORD >> 20} MiB", number)
                    continue
                offset += length
                if number == 1:
                    line, skipped = self._after_bom(line, begins)
                    start += skipped
                text = self._line(line, start, number)
                if text is not None:
                    yield number, text

    def _line(self, line: bytes, start: int, number: int) -> str | None:
        faults = self.num_faults
        text = self.decoded(line, start, number)
        return text if self.num_faults == faults else None

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

    def text(self) -> Iterator[str]:
        """The text in blocks of about BLOCK bytes, its line ends as they are; a byte order mark
        goes. Raises ConfigError at the first byte that is no UTF-8."""
        with self.open() as stream:
            offset, rest = 0, b""
            while block := stream.read(BLOCK):
                if offset == 0:
                    block, offset = self._after_bom(block, block[:8])
                data = rest + block
                cut = len(data) - _unfinished(data)
                yield self.decoded(data[:cut], offset)
                if self.num_faults:
                    self.raise_faults()
                offset, rest = offset + cut, data[cut:]
            if rest:
                yield self.decoded(rest, offset)
                self.raise_faults()

    def _after_bom(self, data: bytes, begins: bytes) -> tuple[bytes, int]:
        for mark, name in _BOMS:
            if begins.startswith(mark):
                self.fail(
                    f"is {name}, as its byte order mark says, not UTF-8",
                    hint=f"convert it: iconv -f {name} -t UTF-8",
                )
        return (data[3:], 3) if begins.startswith(b"\xef\xbb\xbf") else (data, 0)


def _kind(begins: bytes) -> str:
    for magic, kind in _MAGIC:
        if begins.startswith(magic):
            return f"; it looks like {kind}"
    return ""


def _unfinished(data: bytes) -> int:
    """How many of the last bytes of ``data`` begin a character that they do not end."""
    for back in range(1, min(4, len(data) + 1)):
        byte = data[-back]
        if byte & 0xC0 != 0x80:
            lengths = ((0xF5, 1), (0xF0, 4), (0xE0, 3), (0xC0, 2), (0, 1))
            needed = next(length for least, length in lengths if byte >= least)
            return back if needed > back else 0
    return 0


def _open_raw(file: DataFile) -> IO[bytes]:
    if file.filesystem is None:
        return open_file(file.path)
    return io.BufferedReader(file.filesystem.open(file.path, "rb"), BLOCK)


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        return None
    return zstandard


class _Zst(io.RawIOBase):
    """The content of zst frames, one after the other. Unlike zstandard's own reader it tells a
    stream that ends too early; and what one call may give is bounded."""

    def __init__(self, raw: IO[bytes], module: Any) -> None:
        self._raw = raw
        self._frames = module.ZstdDecompressor(max_window_size=ZST_WINDOW)
        self._frame: Any = None
        self._input = b""
        self._content = memoryview(b"")
        self._position = 0

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            data = self._input or self._raw.read(_ZST_PIECE)
            if not data:
                if self._frame is not None:
                    raise EOFError
                return 0
            self._input = b""
            if self._frame is None:
                self._frame = self._frames.decompressobj()
            self._content = memoryview(self._frame.decompress(data))
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._content))
        buffer[:size] = self._content[:size]
        self._content = self._content[size:]
        self._position += size
        return size
