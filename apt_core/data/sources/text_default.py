"""``dataset:text_default``: text files, and by their suffix JSON lines and tables."""

from __future__ import annotations

from collections.abc import Iterator

from apt_core.data.sources.base import FileSource, Reader
from apt_core.data.sources.csv import TABLES, read_csv
from apt_core.data.sources.jsonl import JSON_LINES, read_jsonl
from apt_core.data.sources.parquet import read_parquet
from apt_core.data.sources.reading import Reading
from apt_core.providers.documents import Document

MAX_CHARS = 1 << 16
"""The most characters of a document out of a text file."""

TEXTS = (
    *(".adoc", ".c", ".cc", ".cpp", ".cs", ".css", ".go", ".h", ".hpp", ".htm", ".html", ".java"),
    *(".jl", ".js", ".kt", ".lua", ".markdown", ".md", ".org", ".php", ".pl", ".py", ".r", ".rb"),
    *(".rs", ".rst", ".scala", ".sh", ".sql", ".srt", ".swift", ".tex", ".text", ".ts", ".txt"),
    *(".vtt", ".xml", ".yaml", ".yml"),
)
"""The suffixes of text that are read in a folder."""

READERS: dict[str, Reader] = {
    **dict.fromkeys(JSON_LINES, read_jsonl),
    **dict.fromkeys(TABLES, read_csv),
    ".parquet": read_parquet,
}


class TextDataset(FileSource):
    """Reads text files, one document each if they have at most 64 Ki characters, else cut.

    Files of JSON lines, of CSV and of parquet are known by their suffix and read as the sources of
    these names do. Any other file is read as UTF-8 text.
    """

    name = "text_default"
    suffixes = (*TEXTS, *READERS)

    def reader(self, suffix: str) -> Reader:
        return READERS.get(suffix, read_text)


def read_text(reading: Reading) -> Iterator[Document]:
    """The text as documents, which together are all of it. One of more than MAX_CHARS is cut after
    the last blank line within them, if that leaves at least half, else after a line end there, else
    anywhere."""
    rest, line = "", 1
    blocks = reading.text()
    for block in blocks:
        text, start = rest + block, 0
        while len(text) - start > MAX_CHARS:
            end = _border(text, start, start + MAX_CHARS)
            piece = text[start:end]
            yield Document(text=piece, where=f"{reading.where}:{line}")
            line += piece.count("\n")
            start = end
        rest = text[start:]
    if rest:
        yield Document(text=rest, where=reading.where if line == 1 else f"{reading.where}:{line}")


def _border(text: str, start: int, end: int) -> int:
    middle = (start + end) // 2
    for border in ("\n\n", "\n\r\n", "\n"):
        found = text.rfind(border, middle, end)
        if found >= 0:
            return found + len(border)
    return end - 1 if text[end - 1] == "\r" else end
