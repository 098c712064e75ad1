"""Computes many texts together, each in a slot of caches that all layers share.

Shapes: B rows, T new tokens a row, V token ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from apt_core.inference.texts import Text, common_length, window_start
from apt_core.modeling.compiled_rows import CompiledToken
from apt_core.modeling.masks import Tokens, padding_marked
from apt_core.modeling.row_decoding import RowStep

KEPT = 2
"""How many finished texts keep their caches, for a prompt that begins as they do: in a
conversation all but the last turns are known."""

LEAST_SHARED = 4
"""A beginning of fewer tokens is computed again rather than copied."""

PADDED_TOKENS = 8192
"""Tokens, padding included, that are computed together at most."""


class _Row:
    """A text that is worked on: the model sees it from ``start`` on, and its slot holds the next
    ``held`` tokens."""

    def __init__(self, text: Text, start: int) -> None:
        self.text, self.start, self.held = text, start, 0

    @property
    def held_ids(self) -> list[int]:
        return self.text.ids[self.start : self.start + self.held]


class Slots:
    """Texts in slots 0, 1, … without a gap, so that a step's rows are a slice of every cache.

    ``rows`` is what ``model.rows()`` has made: functions and caches of all layers. ``compiled`` is
    what ``rows.compiled()`` has made, by which one token of a text that is alone is computed.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: Any,
        *,
        device: torch.device,
        max_seq_len: int,
        compiled: CompiledToken | None = None,
    ) -> None:
        self._model, self._computed, self._device = model, rows, device
        self._compiled = compiled
        numbers = torch.zeros(2, 1, dtype=torch.int64)
        self._numbers = numbers, numbers[1:], numbers[:, 0].numpy()
        self._cuts = all(getattr(cache, "cuts", True) for cache in rows.caches)
        self._max_seq_len = max_seq_len
        self._kept: dict[Any, Tensor] = {}
        self._rows: list[_Row] = []
        self._slot_of: dict[Text, int] = {}
        self._finished: dict[int, list[int]] = {}  # the oldest first

    def __len__(self) -> int:
        """How many texts are worked on."""
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        """The bytes of all caches."""
        return sum(cache.nbytes for cache in self._computed.caches)

    # Slots -----------------------------------------------------------------------------------

    def add(self, text: Text) -> None:
        """Give ``text`` a slot, with what is known of its beginning."""
        start = window_start(len(text.ids), self._max_seq_len)
        row, slot = _Row(text, start), len(self._rows)
        # The last token is computed in any case, for its logits.
        wanted = text.ids[start:-1]
        known = {place: self._shared(ids, wanted) for place, ids in self._finished.items()}
        active = {place: self._shared(r.held_ids, wanted) for place, r in enumerate(self._rows)}
        finished = max(known, key=lambda place: known[place], default=-1)
        other = max(active, key=lambda place: active[place], default=-1)
        shared, copied = known.get(finished, 0), active.get(other, 0)
        if shared >= max(copied, LEAST_SHARED):
            self._exchange(finished, slot)
            row.held = shared
        else:
            if slot in self._finished:
                self._make_room(slot)
            if copied >= LEAST_SHARED:
                for cache in self._computed.caches:
                    cache.copy(other, slot, copied)
                row.held = copied
        self._finished.pop(slot, None)
        self._rows.append(row)
        self._slot_of[text] = slot

    def _known_of(self, text: Text) -> int:
        """How many tokens of the beginning of ``text`` some cache holds."""
        held = [*self._finished.values(), *(row.held_ids for row in self._rows)]
        return max((self._shared(ids, text.ids[:-1]) for ids in held), default=0)

    def _shared(self, held: Sequence[int], wanted: Sequence[int]) -> int:
        """How many tokens of the beginning of ``wanted`` are known by what is ``held``: where
        caches cannot be cut, all that is held or nothing."""
        shared = common_length(held, wanted)
        return shared if self._cuts or shared == len(held) else 0

    def _make_room(self, slot: int) -> None:
        """Move the finished text in ``slot``, or forget it."""
        ids = self._finished.pop(slot)
        if len(self._finished) + 1 < KEPT:
            free = slot + 1
            while free in self._finished:
                free += 1
            for cache in self._computed.caches:
                cache.copy(slot, free, len(ids))
            self._finished[free] = ids

    def _exchange(self, one: int, other: int) -> None:
        """Exchange the caches of two slots, which texts that are not worked on have."""
        if one == other:
            return
        ids = self._finished.pop(one)
        others = self._finished.pop(other, None)
        for cache in self._computed.caches:
            cache.swap(one, other, max(len(ids), len(others or ())))
        self._finished[other] = ids
        if others is not None:
            self._finished[one] = others

    def release(self, text: Text, *, spoiled: bool = False, keep: bool = True) -> None:
        """Free the slot of ``text``. Its caches are kept until they are in the way if ``keep`` says
        so, and if they are not ``spoiled`` by what is not finite."""
        slot, last = self._slot_of.pop(text, None), len(self._rows) - 1
        if slot is None:  # it ends before its first step
            return
        row = self._rows[slot]
        if spoiled:
            row.held = 0
            for cache in self._computed.caches:
                cache.erase(slot)
        if slot != last:
            moved = self._rows[slot] = self._rows[last]
            for cache in self._computed.caches:
                cache.swap(slot, last, max(row.held, moved.held))
            self._slot_of[moved.text] = slot
        self._rows.pop()
        if row.held and keep:
            self._finished[last] = row.held_ids
        while len(self._finished) > KEPT:
            del self._finished[next(iter(self._finished))]

    # Steps -----------------------------------------------------------------------------------

    def logits(self, texts: Sequence[Text]) -> Tensor:
        """The logits [B, V] after each of ``texts``: all that are worked on, or those that were
        added last."""
        similar = self._add_new(texts)
        first = min(self._slot_of[text] for text in texts if text in self._slot_of)
        parts = [self._unread_logits(first)]
        if similar:
            later = len(self._rows)
            for text in similar:
                self.add(text)
            parts.append(self._unread_logits(later))
        logits = parts[0] if len(parts) == 1 else torch.cat(parts)
        order = [self._slot_of[text] - first for text in texts]
        return logits if order == list(range(len(order))) else logits[order]

    def compiled(self, texts: Sequence[Text]) -> tuple[Tensor, Tensor] | None:
        """The logits [1, V] after ``texts``, and what
        :func:`~apt_core.modeling.row_decoding.likeliest` gives of them; None where that is not
        compiled."""
        if self._compiled is None or len(self._rows) != 1 or len(texts) != 1:
            return None
        (row,) = self._rows
        unread = self._unread(row) if texts[0] is row.text else ()
        if len(unread) != 1:
            return None
        numbers, places, written = self._numbers
        # As few operations as possible: the weights have driven their code from the CPU's caches.
        written[:] = unread[0], row.held
        step = RowStep(
            places,
            first=0,
            span=row.held + 1,
            mask=False,
            last=self._max_seq_len - 1,
            context=self._context([row], numbers[:1]) if self._computed.reach else None,
            kept=self._kept,
        )
        found = self._compiled(numbers, step)
        row.held += 1
        return found

    def _add_new(self, texts: Sequence[Text]) -> list[Text]:
        """Add the new ones of ``texts``, but for those of which another new one will have computed
        more than is known now: these can share it once it is done."""
        new: list[Text] = []
        similar: list[Text] = []
        for text in texts:
            if text in self._slot_of:
                continue
            shared = max((self._shared(other.ids, text.ids[:-1]) for other in new), default=0)
            if shared >= LEAST_SHARED and 2 * (shared - self._known_of(text)) >= len(text.ids):
                similar.append(text)
            else:
                new.append(text)
                self.add(text)
        return similar

    def _unread_logits(self, first: int) -> Tensor:
        """The logits after the rows from ``first`` on."""
        feeds = [self._unread(row) for row in self._rows[first:]]
        parts = [
            self._read(first + slots.start, feeds[slots.start : slots.stop])
            for slots in _groups(feeds)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def verified(self, texts: Sequence[Text], drafts: Sequence[Sequence[int]]) -> list[Tensor]:
        """For each of ``texts``, of which one token is unread, the logits [1 + k, V] after it and
        after each of its k tokens of ``drafts``. What of them is not appended to the text is to be
        forgotten by :meth:`truncate`."""
        by_slot = sorted(range(len(texts)), key=lambda index: self._slot_of[texts[index]])
        feeds = [[texts[index].ids[-1], *drafts[index]] for index in by_slot]
        logits = self._read(0, feeds, every=True)
        found: list[Tensor] = [logits] * len(texts)
        for slot, index in enumerate(by_slot):
            found[index] = logits[slot, : len(feeds[slot])]
        return found

    def truncate(self, text: Text) -> None:
        """Forget what was read beyond the last token of ``text``."""
        row = self._rows[self._slot_of[text]]
        row.held = min(row.held, len(text.ids) - 1 - row.start)

    def room(self, text: Text) -> int:
        """How many guesses after ``text`` may be verified: 0 if more than its last token is
        unread, or if wrong guesses could not be cut off."""
        slot = self._slot_of.get(text)
        if slot is None or not self._cuts:
            return 0
        row = self._rows[slot]
        length = len(text.ids) - row.start
        return max(0, self._max_seq_len - length) if length - row.held == 1 else 0

    def _unread(self, row: _Row) -> list[int]:
        start = window_start(len(row.text.ids), self._max_seq_len)
        if start != row.start:
            row.start, row.held = start, 0
        return row.text.ids[start + row.held :]

    def _read(self, first: int, feeds: Sequence[Sequence[int]], every: bool = False) -> Tensor:
        """The logits [B, V] after ``feeds``, the new tokens of the rows from ``first`` on; or after
        each of them [B, T, V]."""
        rows = self._rows[first : first + len(feeds)]
        length = max(map(len, feeds))
        held = [row.held for row in rows]
        ids = torch.tensor([[*feed, *[0] * (length - len(feed))] for feed in feeds])
        places = torch.tensor(held)[:, None]
        if length > 1:
            places = places + torch.arange(length)
        step = RowStep(
            places.to(self._device, non_blocking=True),
            first=first,
            span=max(held) + length,
            mask=len({*held}) > 1,
            last=self._max_seq_len - 1,
            context=self._context(rows, ids),
            tokens=self._tokens(feeds, length),
            ends=[end + length for end in held],
            kept=self._kept,
        )
        ids = ids.to(self._device, non_blocking=True)
        with self._padding_marked(step):
            hidden = self._computed.hidden(ids, step)
        for row, feed in zip(rows, feeds, strict=True):
            row.held += len(feed)
        if length == 1 or every:
            logits: Tensor = self._computed.logits(hidden)
            return logits.unflatten(0, (len(feeds), length)) if every else logits
        last = [index * length + len(feed) - 1 for index, feed in enumerate(feeds)]
        lasts = torch.tensor(last).to(self._device, non_blocking=True)
        found: Tensor = self._computed.logits(hidden[lasts])
        return found

    def _tokens(self, feeds: Sequence[Sequence[int]], length: int) -> Tokens | None:
        if all(len(feed) == length for feed in feeds):
            return None
        lengths = torch.tensor([len(feed) for feed in feeds])
        is_token = torch.arange(length) < lengths[:, None]
        return Tokens(is_token.to(self._device, non_blocking=True), sum(map(len, feeds)))

    def _context(self, rows: Sequence[_Row], ids: Tensor) -> Tensor | None:
        reach = self._computed.reach
        if not reach:
            return None
        before = []
        for row in rows:
            end = row.start + row.held
            known = row.text.ids[max(row.start, end - reach) : end]
            before.append([0] * (reach - len(known)) + [token + 1 for token in known])
        context = torch.cat([torch.tensor(before), ids + 1], dim=1)
        return context.to(self._device, non_blocking=True)

    def _padding_marked(self, step: RowStep) -> AbstractContextManager[None]:
        return nullcontext() if step.tokens is None else padding_marked(self._model, step.tokens)


def _groups(feeds: Sequence[Sequence[int]]) -> Iterator[range]:
    """Slices of rows that are computed together: of similar lengths, so that little is padding."""
    start = tokens = longest = 0
    for slot, feed in enumerate(feeds):
        wider = max(longest, len(feed))
        padded = (slot - start + 1) * wider
        if slot > start and (padded > PADDED_TOKENS or padded > 1.5 * (tokens + len(feed)) + 32):
            yield range(start, slot)
            start, tokens, wider = slot, 0, len(feed)
        tokens, longest = tokens + len(feed), wider
    yield range(start, len(feeds))
