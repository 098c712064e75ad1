"""Describes data as JSON values: windows as a model sees them, and figures of sources."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from apt_core.data.packing.rows import IGNORED, Extract, Ints, Windows
from apt_core.data.store.parts import TokenPart
from apt_core.providers.tokenizer import TokenizerProvider

if TYPE_CHECKING:
    from apt_core.data.order import Order

SAMPLE_TOKENS = 1 << 18
"""The most tokens that are decoded to count words."""

SAMPLE_DOCUMENTS = 256

BLOCK = 1 << 16
"""The documents, or windows, that are looked at at a time."""

MAX_STEPS = 12
"""The most steps at which the weights of a mixture are told unasked."""


def view_window(
    windows: Windows, part: TokenPart, tokenizer: TokenizerProvider, index: int
) -> dict[str, Any]:
    """Window ``index`` with the keys window, positions, tokens, targets, padding, documents,
    input_ids, target_ids and document_ids.

    ``documents`` are the stretches of documents in it, each with its number in the part, the
    ``first_token`` and ``tokens`` of the ``document_tokens`` that the document has, the ``place``
    of the first in the window, the ``first_position`` that the model gives it, and ``pieces``: the
    decoded text, each piece ``{"text", "learned"}``, or ``{"special", "learned"}`` for the name of
    a special token. A token is learned if a position of the window predicts it. Where documents do
    not see each other, and at the end of the window, the last token of the pieces may be one that
    is predicted and no input: ``next_id``, else null.
    """
    rows = windows.rows(np.array([index], dtype=np.int64))
    ids, targets = rows.ids[0], rows.targets[0]
    numbers = None if rows.document_ids is None else rows.document_ids[0]
    used = len(ids) if numbers is None else int(np.count_nonzero(numbers >= 0))
    seen = _Seen(ids, targets, tokenizer)
    found: list[dict[str, Any]] = []
    place = 0
    for extract in _within(windows.extracts(index), used):
        end = place + extract.num_tokens
        apart = rows.packed or place == 0
        next_id = int(targets[end - 1]) if rows.packed or end == used else IGNORED
        begin, stop = part.spans(extract.document, extract.document + 1).tolist()
        found.append(
            {
                "document": extract.document,
                "where": None,
                "first_token": extract.first_token,
                "tokens": extract.num_tokens,
                "document_tokens": int(stop) - int(begin),
                "place": place,
                "first_position": 0 if apart else place,
                "pieces": seen.pieces(place, end, predicted=not apart, more=next_id != IGNORED),
                "next_id": None if next_id == IGNORED else next_id,
            }
        )
        place = end
    return {
        "window": index,
        "positions": len(ids),
        "tokens": used,
        "targets": int(np.count_nonzero(targets != IGNORED)),
        "padding": len(ids) - used,
        "pad": tokenizer.special.names.get(int(ids[-1])) if used < len(ids) else None,
        "documents": found,
        "input_ids": ids.tolist(),
        "target_ids": targets.tolist(),
        "document_ids": None if numbers is None else numbers.tolist(),
    }


def _within(extracts: Sequence[Extract], used: int) -> Iterator[Extract]:
    """The extracts cut to the first ``used`` positions: the last token of a part is no input."""
    for extract in extracts:
        count = min(extract.num_tokens, used)
        if count > 0:
            yield extract._replace(num_tokens=count)
        used -= count


class _Seen(NamedTuple):
    """A window's ids and targets, each 1-D, and what decodes them."""

    ids: Ints
    targets: Ints
    tokenizer: TokenizerProvider

    def pieces(self, start: int, stop: int, *, predicted: bool, more: bool) -> list[dict[str, Any]]:
        """The text of the inputs ``start`` to ``stop``, the first of which may be ``predicted`` by
        the position before it, and where there is ``more``, of what the last one predicts."""
        before = np.array([IGNORED] if not predicted else self.targets[start - 1 : start])
        targets = np.concatenate([before, self.targets[start : stop if more else stop - 1]])
        ids = np.concatenate([self.ids[start:stop], self.targets[stop - 1 : stop] if more else []])
        return self._decoded(ids.astype(np.int64), targets != IGNORED)

    def _decoded(self, ids: Ints, learned: Ints) -> list[dict[str, Any]]:
        names = self.tokenizer.special.names
        special = np.isin(ids, list(names))
        changes = np.flatnonzero((np.diff(learned) != 0) | special[1:] | special[:-1]) + 1
        found = []
        for start, stop in pairwise([0, *changes.tolist(), len(ids)]):
            mark = bool(learned[start])
            if special[start]:
                found.append({"special": names[int(ids[start])], "learned": mark})
            else:
                text = self.tokenizer.decode(ids[start:stop].tolist())
                found.append({"text": text, "learned": mark})
        return found


def part_figures(part: TokenPart, windows: Windows | None) -> dict[str, Any]:
    """The sizes of a part: its documents, tokens and bytes of learned text, and of its windows,
    their number, the share of ``padding`` among their positions and that of ``learned`` targets
    among their tokens; null where there are none."""
    figures: dict[str, Any] = {
        "documents": part.num_documents,
        "tokens": part.num_tokens,
        "bytes": part.num_bytes,
        "lengths": length_figures(part),
        "windows": 0,
        "padding": None,
        "learned": None,
    }
    if windows is not None and len(windows):
        tokens, places = windows.num_tokens, len(windows) * windows.seq_len
        targets = sum(
            windows.num_targets(np.arange(first, min(first + BLOCK, len(windows))))
            for first in range(0, len(windows), BLOCK)
        )
        figures |= {
            "windows": len(windows),
            "padding": 1 - tokens / places,
            "learned": targets / tokens,
        }
    return figures


def length_figures(part: TokenPart) -> dict[str, Any]:
    """How long documents are, in tokens: the least, mean and greatest length, and a histogram, in
    which ``[first, last, count]`` are the documents of ``first`` to ``last`` tokens."""
    counts = np.zeros(64, dtype=np.int64)
    least, greatest = None, 0
    for first in range(0, part.num_documents, BLOCK):
        spans = part.spans(first, min(first + BLOCK, part.num_documents)).astype(np.int64)
        lengths = np.diff(spans)
        # frexp is exact: the bin of n is the number of its binary digits.
        bins = np.frexp(lengths.astype(np.float64))[1]
        counts += np.bincount(bins, minlength=64)
        shortest = int(lengths.min())
        least = shortest if least is None else min(least, shortest)
        greatest = max(greatest, int(lengths.max()))
    used = np.flatnonzero(counts)
    return {
        "least": least,
        "mean": part.num_tokens / part.num_documents if part.num_documents else None,
        "greatest": greatest if part.num_documents else None,
        "histogram": [
            [1 << (digits - 1) if digits else 0, (1 << digits) - 1, int(counts[digits])]
            for digits in (range(int(used[0]), int(used[-1]) + 1) if len(used) else ())
        ],
    }


def fertility(part: TokenPart, tokenizer: TokenizerProvider) -> dict[str, Any]:
    """How much text a token stands for, counted in the beginnings of documents that are spread
    evenly over the part: ``tokens`` were looked at, special ones left out; words are separated by
    white space."""
    documents = min(part.num_documents, SAMPLE_DOCUMENTS)
    most = SAMPLE_TOKENS // max(1, documents)
    special = list(tokenizer.special.names)
    tokens = words = num_bytes = 0
    for place in range(documents):
        document = place * part.num_documents // documents
        begin, end = part.spans(document, document + 1).tolist()
        ids = part.read(int(begin), min(int(end), int(begin) + most))
        ids = ids[~np.isin(ids, special)]
        text = tokenizer.decode(ids.tolist())
        tokens += len(ids)
        words += len(text.split())
        num_bytes += len(text.encode("utf-8", "surrogatepass"))
    return {
        "tokens": tokens,
        "tokens_per_word": tokens / words if words else None,
        "bytes_per_token": num_bytes / tokens if tokens else None,
    }


def mixture_figures(order: Order, last_step: int | None, steps: Sequence[int]) -> dict[str, Any]:
    """The ``weights`` of a mixture's sources, as shares of 1, at ``steps``, by default where they
    change; and how many ``epochs`` of each source the steps up to there have gone through, also
    ``at_end`` of the run where its ``last_step`` is known."""
    chosen = list(steps)
    if not chosen:
        ends = [1] if last_step is None else [1, last_step]
        within = [step for step in order.changes if last_step is None or step <= last_step]
        # Of many changes, those that are spread evenly over them.
        stride = -(-len(within) // MAX_STEPS) or 1
        chosen = sorted({*ends, *within[::stride]})
    return {
        "steps": [
            {
                "step": step,
                "weights": _named(order, _shares(order.weights(step))),
                "epochs": _named(order, _epochs(order, step)),
            }
            for step in chosen
        ],
        "at_end": None if last_step is None else _named(order, _epochs(order, last_step + 1)),
    }


def _shares(weights: Sequence[float]) -> list[float]:
    total = sum(weights)
    return [weight / total for weight in weights]


def _epochs(order: Order, step: int) -> list[float]:
    """The epochs of each source before ``step``."""
    drawn = order.drawn_before(step).tolist()
    return [count / size for count, size in zip(drawn, order.sizes, strict=True)]


def _named(order: Order, values: Sequence[float]) -> dict[str, float]:
    return dict(zip(order.names, values, strict=True))
