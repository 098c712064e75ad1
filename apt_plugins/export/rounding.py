"""Measures what an export's rounding of weights costs."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from apt_plugins.export.certificate import Measured, Rounding
from apt_plugins.export.comparing import Differences
from apt_plugins.export.own_answers import OwnAnswers
from apt_plugins.export.questions import RANDOM_PROMPTS, Questions

PLACES = 128
"""Places of a text whose probabilities are computed at once, in fp64."""


def cost_of_rounding(own: OwnAnswers, rounded: OwnAnswers, questions: Questions) -> Rounding:
    """How ``rounded`` answers differ from ``own`` at the prompts that are texts."""
    found, sums, tokens = Differences(), torch.zeros(3, dtype=torch.float64), 0
    drawn = range(len(questions.prompts) - 1 - RANDOM_PROMPTS, len(questions.prompts) - 1)
    for number, ids in enumerate(questions.prompts):
        if number in drawn:
            continue
        exact, held = (answers.forward(ids)[0] for answers in (own, rounded))
        found.add(exact.numpy(), held.numpy(), least=1.0)
        targets = torch.tensor(ids[1:], dtype=torch.int64)
        tokens += len(targets)
        parts = (each.split(PLACES) for each in (exact[:-1], held[:-1], targets))
        for mine, theirs, wanted in zip(*parts, strict=True):
            before, after = (logits.double().log_softmax(-1) for logits in (mine, theirs))
            sums += torch.stack(
                [
                    F.kl_div(after, before, reduction="sum", log_target=True),
                    F.nll_loss(before, wanted, reduction="sum"),
                    F.nll_loss(after, wanted, reduction="sum"),
                ]
            )
    divergence, before_sum, after_sum = (sums / max(1, tokens)).tolist()
    return Rounding(
        logits=Measured(absolute=found.found.absolute, relative=found.found.relative),
        tokens=tokens,
        divergence=divergence,
        loss_before=before_sum,
        loss_after=after_sum,
    )
