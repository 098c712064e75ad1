"""Loss, perplexity, bits per byte and accuracy on held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable

import torch
import torch.nn.functional as F
from torch import nn

from apt_core.data.batches import IGNORED, Batch
from apt_core.device import autocast


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    bytes_per_token: float,
    metrics: Collection[str] = (),
    dtype: torch.dtype | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Score ``model`` on ``batches``, in eval mode; the mode is put back.

    Returns ``val_loss`` (nats per token), ``val_ppl`` (its exponential) and ``val_bpb`` (bits per
    byte of UTF-8: loss / ln 2 / bytes per token), and ``val_accuracy`` (of the next token) if
    ``metrics`` has ``accuracy``. Empty when ``interrupted()`` became true before the end.
    """
    training = model.training
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    targets = 0
    try:
        for batch in batches:
            if interrupted():
                return {}
            batch = batch.to(device)
            with autocast(device, dtype):
                logits = model(batch.input_ids).logits.flatten(0, 1).float()
            expected = batch.targets.flatten()
            loss += F.cross_entropy(logits, expected, ignore_index=IGNORED, reduction="sum")
            if "accuracy" in metrics:
                correct += (logits.argmax(-1) == expected).sum()
            targets += batch.num_targets
    finally:
        model.train(training)
    mean = loss.item() / targets
    scores = {
        "val_loss": mean,
        "val_ppl": math.exp(mean) if mean < 700 else math.inf,
        "val_bpb": mean / math.log(2) / bytes_per_token,
    }
    if "accuracy" in metrics:
        scores["val_accuracy"] = correct.item() / targets
    return scores
