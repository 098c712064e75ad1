"""The held-out documents of a run, as items of tasks."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TypeVar, overload

from apt_core.data.loading import named_sources, source_of, stores_sha256
from apt_core.data.store.build import build_store
from apt_core.data.store.parts import TokenPart
from apt_core.data.store.reader import TokenStore
from apt_core.evaluation.responses import pair_at, pair_documents
from apt_core.json_files import read_json
from apt_core.log import get_logger
from apt_core.providers.task import EncodedPassage, Question
from apt_core.providers.tokenizer import TokenizerProvider
from apt_core.runs.finding import run_of
from apt_core.runs.session import Session

log = get_logger("apt.evaluation")


class HeldOut:
    """The documents of ``stores`` that are held out, of a run that begins ``early`` those that are
    from its start on; ``sha256`` is that of all their documents."""

    def __init__(
        self, stores: Sequence[TokenStore], tokenizer: TokenizerProvider, *, early: bool = False
    ) -> None:
        self.tokenizer = tokenizer
        self.sha256 = stores_sha256(stores, early=early)
        self._parts: list[TokenPart] = [
            store.held_out if early else store.part("val") for store in stores
        ]

    def passages(self) -> Sequence[EncodedPassage]:
        """Every document, with what is learned of it; each is read when it is asked for."""
        counts = [part.num_documents for part in self._parts]
        return _Lazily(counts, lambda part, number: self._passage(self._parts[part], number))

    def pairs(self) -> Sequence[Question]:
        """The documents that are a prompt and a response, as texts; each is read when it is asked
        for."""
        pairs = [pair_documents(part) for part in self._parts]

        def question(part: int, number: int) -> Question:
            pair = pair_at(self._parts[part], int(pairs[part][number]))
            decode = self.tokenizer.decode
            return Question(decode(pair.prompt), decode(pair.response))

        return _Lazily([len(documents) for documents in pairs], question)

    def _passage(self, part: TokenPart, document: int) -> EncodedPassage:
        start, stop = (int(each) for each in part.spans(document, document + 1))
        ids = part.read(start, stop).tolist()
        learned = part.marks(start, stop).tolist() if part.marked else None
        kept = ids if learned is None else [i for i, it in zip(ids, learned, strict=True) if it]
        num_bytes = len(self.tokenizer.decode(kept).encode("utf-8"))
        return EncodedPassage(tuple(ids), None if learned is None else tuple(learned), num_bytes)


Item = TypeVar("Item")


class _Lazily(Sequence[Item]):
    """Items of several parts, one part after the other: of each ``counts`` has how many, and
    ``read`` makes one of the number of its part and its own there."""

    def __init__(self, counts: Sequence[int], read: Callable[[int, int], Item]) -> None:
        self._counts, self._ends, self._read = counts, [*accumulate(counts)], read

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | Sequence[Item]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect.bisect_right(self._ends, index)
        return self._read(part, index - (self._ends[part] - self._counts[part]))


def open_held_out(session: Session) -> HeldOut:
    """The held-out documents of the run that was opened as ``session``, from its own sources by its
    own tokenizer: the token stores that it used, where they are still there, else new ones. Warns
    where the documents are not those that the run had.

    Raises ConfigError for what cannot be read, ProviderError for a source that fails.
    """
    stores = [
        build_store(source_of(session, section), session.tokenizer, session.config.data)
        for _, section in named_sources(session)
    ]
    held_out = HeldOut(stores, session.tokenizer, early=session.config.data.begin_early)
    if held_out.sha256 != (_recorded(session) or held_out.sha256):
        log.warning("the documents of the run have changed since: other ones may be held out now")
    return held_out


def _recorded(session: Session) -> str | None:
    """The hash of the documents that the run's manifest has, if it has one."""
    if session.checkpoint is None:
        return None
    try:
        manifest = read_json(run_of(session.checkpoint) / "manifest.json")
    except (OSError, ValueError):
        return None
    data = manifest.get("data") if isinstance(manifest, dict) else None
    sha256 = data.get("sha256") if isinstance(data, dict) else None
    return sha256 if isinstance(sha256, str) else None
