"""One pass over a source: its documents are encoded, compared, split and written."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from apt_core.data.pipeline.dedup import SeenDocuments
from apt_core.data.pipeline.prepare import KEPT, STEPS
from apt_core.data.pipeline.split import BY_POSITION, TRAIN, VAL, SplitTally
from apt_core.data.store.chunks import ChunkEncoder, Prepared, results_of
from apt_core.data.store.format import PARTS, Begun, PartName, PartRow
from apt_core.data.store.held_out import HeldOut
from apt_core.data.store.input import SourceReader, naming
from apt_core.data.store.writer import PartWriter
from apt_core.log import get_logger
from apt_core.providers.dataset import DatasetProvider
from apt_core.providers.documents import FORMS, TEXT

log = get_logger("apt.data")

LOG_SECONDS = 10.0

LEAST_TOKENS = 2
"""The fewest held-out tokens in which something can be predicted."""

COUNTS = (
    *("read", *STEPS.values(), "duplicates", "near_duplicates", "replaced", *PARTS),
    *(f"{form}s" for form in FORMS),
)
"""What the manifest counts: documents, but for ``replaced``, which are characters. Of those that
are kept it tells the form."""

Publisher = Callable[[Path, Mapping[PartName, PartWriter], Begun], None]
"""Called with the folder, the writers of the parts and what was held out at the first call,
whenever a shard to train on is whole and nothing can void it any more."""

ProgressCallback = Callable[[int, int, int], None]
"""Called now and then with the documents read, the tokens written and the bytes of text read."""


class Engine(Protocol):
    """Encodes the chunks of a build, anywhere; the results come in the order of the chunks.
    ``folder`` is for files that are needed while it does so."""

    def __call__(
        self, encoder: ChunkEncoder, chunks: Iterable[bytes], workers: int, folder: Path
    ) -> Iterator[bytes]: ...


@dataclass(frozen=True)
class Assembled:
    """What was made of a source in a folder."""

    parts: dict[PartName, PartRow]
    begun: Begun | None
    counts: dict[str, int]
    seen: SplitTally

    @property
    def num_kept(self) -> int:
        """The documents that are left."""
        return self.counts["train"] + self.counts["val"]


class Assembly:
    """Writes the parts of a store into ``folder``, of what ``reader`` reads."""

    def __init__(
        self,
        folder: Path,
        reader: SourceReader,
        encoder: ChunkEncoder,
        publish: Publisher | None = None,
    ) -> None:
        self._publish = publish
        self._begun: Begun | None = None
        self._reader, self._encoder = reader, encoder
        self._folder = folder
        self._counts: dict[str, int] = dict.fromkeys(COUNTS, 0)
        self._tally = SplitTally()
        self._held_out = HeldOut(encoder.rule.most or 0)
        self._writers = {name: PartWriter(folder, name, encoder.dtype) for name in PARTS}
        settings = encoder.settings
        near = settings.near_threshold if settings.deduplicate == "near" else None
        self._seen = None if settings.deduplicate == "none" else SeenDocuments(folder, near)

    def run(
        self, engine: Engine, workers: int, progress: ProgressCallback | None = None
    ) -> Assembled:
        """Do it all. Raises what the source, the tokenizer and the engine raise, and OSError where
        something cannot be written; then the folder is of no use."""
        replaced = getattr(self._reader.source, "replaced", 0)
        report = Report(self._reader.source, progress)
        results: Any = engine(self._encoder, self._reader.chunks(), workers, self._folder)
        try:
            with closing(results):
                for result in results:
                    for document in results_of(result, self._encoder.dtype):
                        self._add(document)
                    tokens = sum(writer.num_tokens for writer in self._writers.values())
                    report(self._counts["read"], tokens, self._reader.next_size())
            self._tally.all_too_long = self._held_out.all_too_long
            self._settle()
            parts = {name: writer.close() for name, writer in self._writers.items()}
        finally:
            for writer in self._writers.values():
                writer.abandon()
            if self._seen is not None:
                self._seen.close()
        counts = self._counts | {str(name): row.documents for name, row in parts.items()}
        counts["replaced"] = int(getattr(self._reader.source, "replaced", 0) - replaced)
        return Assembled(parts, self._begun, counts, self._tally)

    def _add(self, document: Prepared) -> None:
        self._counts["read"] += 1
        if document.status != KEPT:
            self._counts[STEPS[document.status]] += 1
            return
        if not any(len(piece.ids) for piece in document.pieces):
            self._counts["empty"] += 1
            return
        if self._seen is not None:
            if self._seen.repeats(document.digest):
                self._counts["duplicates"] += 1
                return
            if document.signature is not None and self._seen.nearly_repeats(document.signature):
                self._counts["near_duplicates"] += 1
                return
        form = FORMS[document.form]
        self._counts[f"{form}s"] += 1
        self._tally.add(document.position, is_text=form == TEXT)
        if document.pieces[0].side != BY_POSITION or document.position >= self._encoder.rule.below:
            self._write(document, TRAIN)
            return
        if self._encoder.rule.most is None or self._held_out.is_settled(document):
            self._write(document, VAL)
            return
        for each in self._held_out.add(document):
            self._write(each, TRAIN)

    def _write(self, document: Prepared, side: int) -> None:
        """Append the pieces of a document, each to the part of its side, by default ``side``."""
        for piece in document.pieces:
            if not len(piece.ids):
                continue
            held_out = (piece.side or side) == VAL
            writer = self._writers["val" if held_out else "train"]
            if writer.ends_shard(len(piece.ids)):
                writer.end_shard()
                if not held_out:
                    self._offer()
            writer.add(piece.ids, piece.learned, piece.num_bytes, piece.digest)

    def _settle(self) -> None:
        """Write what is held out so far, which stays so."""
        for document in self._held_out.settle():
            self._write(document, VAL)

    def _offer(self) -> None:
        """Publish what is whole, if the split will not be corrected and something is held out."""
        if self._begun is None:
            self._settle()
        by_rule = not self._reader.holds_out
        if by_rule and self._encoder.rule.corrected(self._tally) is not None:
            return
        if self._writers["val"].num_tokens < LEAST_TOKENS:
            return
        if self._begun is None:
            known = self._writers["val"].row_so_far().model_dump(exclude={"shards"})
            train = self._writers["train"].at_border.tokens_sha256
            self._begun = Begun(**known, train_sha256=train)
        if self._publish is not None:
            self._publish(self._folder, self._writers, self._begun)


class Report:
    """Tells how far a build is: in the log every ten seconds, and by a callback."""

    def __init__(self, source: DatasetProvider, progress: ProgressCallback | None) -> None:
        self._source, self._progress = source, progress
        self._began = self._said = time.monotonic()
        self._bytes = 0

    def __call__(self, documents: int, tokens: int, more_bytes: int) -> None:
        self._bytes += more_bytes
        if self._progress is not None:
            self._progress(documents, tokens, self._bytes)
        now = time.monotonic()
        if now - self._said < LOG_SECONDS:
            return
        self._said = now
        with naming("dataset", self._source, "share_read()"):
            share = self._source.share_read()
        done = "" if share is None else f", {share:.0%} of the source"
        log.info(
            "building the token store: %s documents, %s tokens, %.1f MB/s%s",
            f"{documents:,}",
            f"{tokens:,}",
            self._bytes / max(1e-9, now - self._began) / 1e6,
            done,
        )
