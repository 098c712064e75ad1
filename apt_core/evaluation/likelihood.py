"""How likely a model finds tokens: the one place where evaluations compute it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from apt_core.data.batches import Batch
from apt_core.data.packing.rows import IGNORED
from apt_core.evaluation.windows import Window, windows_of
from apt_core.modeling.calling import forward_batch
from apt_core.modeling.casts import KeptCasts
from apt_core.modeling.cross_entropy import cross_entropies
from apt_core.providers.task import Template, prompt_ids
from apt_core.providers.tokenizer import TokenizerProvider
from apt_core.runs.session import Session

PAD = 0
"""Fills rows behind their ends, where no layer looks and no target is."""


@dataclass(frozen=True)
class Stretch:
    """Token ids, of which those from ``first`` on are predicted, each from all before it."""

    ids: Sequence[int] | npt.NDArray[Any]
    first: int = 1


@dataclass(frozen=True)
class Predicted:
    """For each predicted token: its loss in nats, float64 [n], and whether it was the most likely
    one, bool [n]."""

    losses: npt.NDArray[np.float64]
    likeliest: npt.NDArray[np.bool_]


def default_stride(context: int) -> int:
    """Half of the context, so that no token but those of the first window has less before it."""
    return max(1, context // 2)


def beginning(tokenizer: TokenizerProvider) -> int:
    """The id before the first token of a text, from which that is predicted: the bos, else the eos
    of the document before, else 0; an empty prompt of a generation is the same."""
    special = tokenizer.special
    return next((each for each in (special.bos, special.eos) if each is not None), 0)


def encode_text(tokenizer: TokenizerProvider, text: str) -> Stretch:
    """``text`` after the :func:`beginning`: all of its tokens are predicted."""
    return after_beginning(tokenizer, tokenizer.encode_array(text))


def after_beginning(tokenizer: TokenizerProvider, ids: npt.ArrayLike) -> Stretch:
    """``ids`` after the :func:`beginning`, unless it is their first: all others are predicted."""
    tokens, first = np.asarray(ids, dtype=np.int64), beginning(tokenizer)
    if len(tokens) and tokenizer.special.bos == tokens[0]:
        return Stretch(tokens)
    return Stretch(np.concatenate([np.array([first]), tokens]))


def encode_pair(
    tokenizer: TokenizerProvider, prompt: str, continuation: str, template: Template = "text"
) -> Stretch:
    """``continuation`` after ``prompt``: its tokens are predicted.

    With the template ``text`` both are encoded together, as a text that has them in it would be;
    spaces between them belong to the continuation. An empty prompt is the :func:`beginning`.
    Otherwise the continuation is encoded for itself, as responses are.
    """
    if template != "text":
        ids = prompt_ids(tokenizer, prompt, template)
        return Stretch([*ids, *tokenizer.encode(continuation)], max(1, len(ids)))
    kept = prompt.rstrip()
    whole = tokenizer.encode(prompt + continuation)
    before = len(tokenizer.encode(kept))
    if not before:
        return Stretch([beginning(tokenizer), *whole], 1)
    special = tokenizer.special
    start = [] if special.bos is None else [special.bos]
    return Stretch([*start, *whole], len(start) + before)


@torch.no_grad()
def predict(
    session: Session,
    stretches: Sequence[Stretch],
    *,
    stride: int | None = None,
    batch_size: int = 16,
    interrupted: Callable[[], bool] = lambda: False,
    advance: Callable[[float], None] = lambda share: None,
) -> list[Predicted] | None:
    """Predict the tokens of each of ``stretches`` by :func:`windows_of` with the model's context
    and ``stride``, by default :func:`default_stride`, ``batch_size`` windows of similar length at a
    time; in the precision of the session.

    ``advance`` is told which share of all is done. Returns None once ``interrupted()`` is
    true.
    """
    context = session.config.model.max_seq_len
    stride = default_stride(context) if stride is None else stride
    places = [
        (number, window)
        for number, stretch in enumerate(stretches)
        for window in windows_of(len(stretch.ids), stretch.first, context, stride)
    ]
    # Of equal length as far as possible: padding is computed too.
    places.sort(key=lambda place: place[1].stop - place[1].start)
    sizes = [max(0, len(stretch.ids) - stretch.first) for stretch in stretches]
    found = [Predicted(np.zeros(size), np.zeros(size, dtype=bool)) for size in sizes]
    casts = KeptCasts(session.model)
    with session.computing():
        for at in range(0, len(places), batch_size):
            if interrupted():
                return None
            part = places[at : at + batch_size]
            batch = _batch([(stretches[number].ids, window) for number, window in part])
            moved = batch.to(session.device)
            with casts.used(session.dtype), session.autocast():
                logits = forward_batch(session.model, session.model, moved).logits
            losses, likeliest = _on_host(logits, moved.targets)
            for row, (number, window) in enumerate(part):
                first = stretches[number].first
                columns = slice(window.counted - window.start - 1, window.stop - window.start - 1)
                counted = slice(window.counted - first, window.stop - first)
                found[number].losses[counted] = losses[row, columns]
                found[number].likeliest[counted] = likeliest[row, columns]
            advance(min(1.0, (at + len(part)) / len(places)))
    return found


def _on_host(logits: Tensor, targets: Tensor) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """The losses and whether the target is the most likely id, both [B, T]."""
    losses = cross_entropies(logits, targets).view(targets.shape)
    return losses.double().cpu().numpy(), (logits.argmax(-1) == targets).cpu().numpy()


def _batch(rows: Sequence[tuple[Sequence[int] | npt.NDArray[Any], Window]]) -> Batch:
    width = max(window.stop - window.start - 1 for _, window in rows)
    ids = np.full((len(rows), width), PAD, dtype=np.int64)
    targets = np.full((len(rows), width), IGNORED, dtype=np.int64)
    is_token = np.zeros((len(rows), width), dtype=bool)
    for row, (tokens, window) in enumerate(rows):
        read = np.asarray(tokens[window.start : window.stop], dtype=np.int64)
        length = len(read) - 1
        ids[row, :length] = read[:-1]
        counted = window.counted - window.start - 1
        targets[row, counted:length] = read[counted + 1 :]
        is_token[row, :length] = True
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(targets),
        int((targets != IGNORED).sum()),
        num_tokens=int(is_token.sum()),
        is_token=None if is_token.all() else torch.from_numpy(is_token),
    )


def precision_of(session: Session) -> str:
    """The type in which :func:`predict` computes: the one in which the run was trained."""
    return str(session.dtype or torch.float32).removeprefix("torch.")


def num_too_long(stretches: Sequence[Stretch], context: int) -> int:
    """How many do not fit into ``context``: their last tokens do not see their first ones."""
    return sum(len(stretch.ids) - 1 > context for stretch in stretches)
