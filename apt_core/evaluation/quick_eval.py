"""Loss, perplexity, bits per byte and accuracy on held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apt_core.data.batches import Batch
from apt_core.device import autocast
from apt_core.modeling.casts import KeptCasts
from apt_core.modeling.cross_entropy import cross_entropy_sum
from apt_core.modeling.modes import eval_mode
from apt_core.types import ModelOutput


@dataclass(frozen=True)
class BatchScore:
    """The score of one batch: the summed loss in nats, the number of correctly predicted targets
    (None if it was not asked for), and the number of targets."""

    loss: float
    correct: int | None
    num_targets: int


def sums_of(output: ModelOutput, targets: Tensor, *, accuracy: bool) -> Tensor:
    """The summed loss in nats over ``targets`` [B, T] and, with ``accuracy``, the number of
    correctly predicted ones, otherwise 0; fp64 [2]."""
    loss = cross_entropy_sum(output, targets)
    right = (output.logits.argmax(-1) == targets).sum() if accuracy else torch.zeros_like(loss)
    return torch.stack([loss.double(), right.double()])


@torch.no_grad()
def score_batches(
    model: nn.Module,
    batches: Iterable[Batch],
    sums: Callable[..., Tensor],
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    accuracy: bool = False,
    interrupted: Callable[[], bool] = lambda: False,
) -> list[BatchScore] | None:
    """Score ``model`` on each of ``batches`` in eval mode, then restore the modes of its modules.

    Returns None if ``interrupted()`` became true before the end. ``sums(batch, accuracy=…)``
    returns the :func:`sums_of` the model's output, compiled or not.
    """
    found, targets, casts = [], [], KeptCasts(model)
    with eval_mode(model):
        for batch in batches:
            if interrupted():
                return None
            batch = batch.to(device)
            with casts.used(dtype), autocast(device, dtype):
                found.append(sums(batch, accuracy=accuracy))
            targets.append(batch.num_targets)
    rows = torch.stack(found).tolist() if found else []
    return [
        BatchScore(loss, int(right) if accuracy else None, count)
        for (loss, right), count in zip(rows, targets, strict=True)
    ]


def told_shares(scores: Mapping[str, float]) -> list[str]:
    """What people are told of those ``scores`` that are shares and were asked for."""
    told = []
    if "val_accuracy" in scores:
        told.append(f"accuracy {scores['val_accuracy']:.1%}")
    if "val_reasoning_quality" in scores:
        told.append(f"reasoning quality {scores['val_reasoning_quality']:.1%}")
    return told


def summarize(scores: Sequence[BatchScore], bytes_per_token: float) -> dict[str, float]:
    """``val_loss`` (nats per token), ``val_ppl`` (its exponential), ``val_bpb`` (bits per byte of
    UTF-8: loss / ln 2 / bytes per token), and ``val_accuracy`` (of the next token) where it was
    counted."""
    targets = sum(score.num_targets for score in scores)
    # Of no target there is no mean: a window may have nothing but a prompt.
    mean = math.fsum(score.loss for score in scores) / targets if targets else math.nan
    figures = {
        "val_loss": mean,
        "val_ppl": math.inf if mean >= 700 else math.exp(mean),
        "val_bpb": mean / math.log(2) / bytes_per_token,
    }
    correct = [score.correct for score in scores if score.correct is not None]
    if correct:
        figures["val_accuracy"] = sum(correct) / targets if targets else math.nan
    return figures
