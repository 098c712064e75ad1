"""The held-out documents of a run, as items of tasks."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import overload

from apt_core.data.loading import named_sources, source_of, stores_sha256
from apt_core.data.store.build import build_store
from apt_core.data.store.parts import TokenPart
from apt_core.data.store.reader import TokenStore
from apt_core.evaluation.responses import pairs_of
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
        return _Passages(self._parts, self.tokenizer)

    def pairs(self) -> Iterable[Question]:
        """The documents that are a prompt and a response, as texts."""
        decode = self.tokenizer.decode
        for part in self._parts:
            for pair in pairs_of(part):
                yield Question(decode(pair.prompt), decode(pair.response))


class _Passages(Sequence[EncodedPassage]):
    def __init__(self, parts: Sequence[TokenPart], tokenizer: TokenizerProvider) -> None:
        self._parts, self._tokenizer = parts, tokenizer
        self._ends = [*accumulate(part.num_documents for part in parts)]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> EncodedPassage: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[EncodedPassage]: ...
    def __getitem__(self, index: int | slice) -> EncodedPassage | Sequence[EncodedPassage]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self._ends, index)
        part = self._parts[number]
        document = index - (self._ends[number] - part.num_documents)
        start, stop = (int(each) for each in part.spans(document, document + 1))
        ids = part.read(start, stop).tolist()
        learned = part.marks(start, stop).tolist() if part.marked else None
        kept = ids if learned is None else [i for i, it in zip(ids, learned, strict=True) if it]
        num_bytes = len(self._tokenizer.decode(kept).encode("utf-8"))
        return EncodedPassage(tuple(ids), None if learned is None else tuple(learned), num_bytes)


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
