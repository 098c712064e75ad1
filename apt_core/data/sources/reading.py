"""Reads one file of data: bounded streams of bytes, lines and text, and everything that is wrong
with them."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, Literal

from apt_core.data.sources.faults import Faults
from apt_core.data.sources.files import INSTALL, DataFile, unreadable
from apt_core.errors import ConfigError
from apt_core.files import open_file
from apt_core.providers.dataset import Columns

BLOCK = 1 << 20
MAX_RECORD = 1 << 26
"""Bytes of the longest line, cell or record: it is held in memory as a whole."""

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


class Reading(Faults):
    """One file while it is read: how, and what was found to be wrong with it."""

    def __init__(
        self,
        file: DataFile,
        key: str = "data.train_path",
        columns: Columns | None = None,
        errors: Literal["strict", "replace"] = "strict",
    ) -> None:
        super().__init__(file.where, key, columns, errors)
        self.file = file
        self._raw: IO[bytes] | None = None
        self._end = 0

    @property
    def position(self) -> int:
        """The bytes of the file, compressed as it is, that have been read since it was opened; all
        of them once it was read to its end."""
        return self._end if self._raw is None else self._raw.tell()

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
                stream = self._raw = raw
                if decompress and self.file.compression == ".gz":
                    stream = gzip.GzipFile(fileobj=raw)
                elif zstd is not None:
                    stream = io.BufferedReader(_Zst(raw, zstd), BLOCK)
                yield stream
                self._end = raw.tell()
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
            self.fail(f"is damaged: {error}", hint="fetch or compress it again")
        except OSError as error:
            raise ConfigError(unreadable(self.where, self.key, error)) from error
        except Exception as error:
            if self.file.filesystem is None:
                raise
            raise ConfigError(unreadable(self.where, self.key, error)) from error
        finally:
            self._raw = None

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
