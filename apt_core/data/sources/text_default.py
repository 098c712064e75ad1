"""``dataset:text_default``: text files, and by their suffix JSON and tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from apt_core.data.sources.base import FileSource, Reader
from apt_core.data.sources.csv import TABLES, read_csv
from apt_core.data.sources.jsonl import JSON, JSON_LINES, read_json, read_jsonl
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
    JSON: read_json,
    **dict.fromkeys(TABLES, read_csv),
    ".parquet": read_parquet,
}


class TextDataset(FileSource):
    """Reads text files, one document each if they have at most 64 Ki characters, else in pieces.

    Files of JSON, of CSV and of parquet are known by their suffix and read as the sources of these
    names do. Any other file is read as UTF-8 text.
    """

    name = "text_default"
    suffixes = (*TEXTS, *READERS.keys() - {JSON})

    def reader(self, suffix: str) -> Reader:
        return READERS.get(suffix, read_text)


def read_text(reading: Reading) -> Iterator[Document]:
    """The text as documents, which together are all of it; one of more than MAX_CHARS is cut into
    pieces. One that is blank is joined to another, since the pipeline would drop it, and with it
    the text's beginning or end; of more than MAX_CHARS blank characters some may be dropped."""
    waiting, line, begins = "", 1, True
    for piece in _pieces(reading.text()):
        says = waiting.strip() and piece.strip()
        if says or len(waiting) > MAX_CHARS:
            yield Document(waiting, where=f"{reading.where}:{line}", begins=begins, ends=False)
            line, begins, waiting = line + waiting.count("\n"), False, ""
        waiting += piece
    if waiting:
        where = reading.where if line == 1 else f"{reading.where}:{line}"
        yield Document(waiting, where=where, begins=begins)


def _pieces(blocks: Iterable[str]) -> Iterator[str]:
    rest = ""
    for block in blocks:
        text, start = rest + block, 0
        while len(text) - start > MAX_CHARS:
            end = border_of(text, start, start + MAX_CHARS)
            yield text[start:end]
            start = end
        rest = text[start:]
    if rest:
        yield rest


def border_of(text: str, start: int, end: int) -> int:
    """Where to cut ``text`` at ``end`` or before, but in the second half from ``start`` on. ``end``
    is less than the text's length.

    The words into which tokenizers split a text end there, so that its ids are those of the pieces:
    between a letter or digit and a space, else and a line end; else after a line end before a
    visible character. A text without any of these is cut anywhere, but not between CR and LF.
    """
    middle = (start + end) // 2
    for space in " \n":
        at = text.rfind(space, middle, end + 1)
        while at > middle:
            if text[at - 1].isalnum():
                return at
            at = text.rfind(space, middle, at)
    at = text.rfind("\n", middle, end)
    while at >= 0:
        if not text[at + 1].isspace():
            return at + 1
        at = text.rfind("\n", middle, at)
    return end - 1 if text[end - 1 : end + 1] == "\r\n" else end
