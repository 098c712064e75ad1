"""The objective ``align:bistate_default``: a divergence of predictions and a contrast of states.

Legend: B batch, T positions, D d_model, V token ids, N = BT tokens, m width of the vein.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_core import ModelOutput
from apt_core.data.packing.rows import IGNORED
from apt_core.providers import AlignProvider
from apt_plugins.align.divergence import divergence_sum
from apt_plugins.align.settings import BistateSettings

MAX_TOKENS = 1024
"""The most tokens of a micro-batch in the contrast, whose matrix grows with their square."""


class BistateProvider(AlignProvider):
    """alpha * KL(p_S ‖ p_A) + beta * InfoNCE_tau(Qᵀh_A, Qᵀh_S), with S the stable and A the live
    state.

    Q is the vein: the main directions of the residual stream, which the attention's normal
    compensator keeps apart from the rest. InfoNCE (van den Oord et al., arXiv:1807.03748) is the
    cross-entropy of picking a token's own stable state among those of all tokens, with
    cosine / tau as logits.

    Where both states are passes of one model, divergence and contrast are symmetric: half of the
    sum over both directions, as in R-Drop (Liang et al., arXiv:2106.14448).
    """

    name = "bistate_default"
    version = "1.0.0"

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        given = isinstance(config, BistateSettings)
        self.settings = config if given else BistateSettings.model_validate(dict(config or {}))

    def terms(
        self,
        live: ModelOutput,
        stable: ModelOutput,
        targets: Tensor,
        *,
        vein: Tensor | None = None,
        mutual: bool = False,
    ) -> Mapping[str, Tensor]:
        """``kl`` and ``info_nce``, each 0-d; a term with a coefficient of 0 is left out.

        ``targets`` [B, T] are token ids or IGNORED, ``vein`` is [D, m]. ``mutual``: both states
        are passes of one model. Raises ValueError for a contrast without a vein.
        """
        settings, counts = self.settings, targets.flatten() != IGNORED
        terms = {}
        if settings.alpha:
            terms["kl"] = settings.alpha * _divergence(live.logits, stable.logits, counts, mutual)
        if settings.beta:
            if vein is None:
                raise ValueError(
                    "model.bistate.beta: the contrastive term needs the vein of a normal "
                    "compensator: set model.tva.s to 1 or more, or model.bistate.beta to 0"
                )
            terms["info_nce"] = settings.beta * info_nce(
                live.hidden, stable.hidden, counts, vein, settings.tau_align, mutual=mutual
            )
        return terms


def _divergence(live: Tensor, stable: Tensor, counts: Tensor, mutual: bool) -> Tensor:
    """The mean divergence of logits [B, T, V] over the tokens that count, in nats."""
    live, stable = live.flatten(0, 1), stable.flatten(0, 1)
    if mutual:
        total = divergence_sum(live, stable, counts) + divergence_sum(stable, live, counts)
        total = total / 2
    else:
        total = divergence_sum(live, stable.detach(), counts)
    return total / counts.sum().clamp_min(1)


def info_nce(
    live: Tensor,
    stable: Tensor,
    counts: Tensor,
    vein: Tensor,
    tau: float,
    *,
    mutual: bool = False,
    max_tokens: int = MAX_TOKENS,
) -> Tensor:
    """The contrast of hidden states [B, T, D] projected on ``vein`` [D, m]: 0-d, nats per token.

    ``counts`` [N] says which tokens count. Of more than ``max_tokens`` that count, that many are
    used, evenly spaced among them.
    """
    live, stable = live.flatten(0, 1), stable.flatten(0, 1)
    if len(live) > max_tokens:
        taken, counts = _spread(counts, max_tokens)
        live, stable = live[taken], stable[taken]
    wide = torch.promote_types(live.dtype, torch.float32)
    vein = vein.detach().to(wide)
    a = F.normalize(live.to(wide) @ vein, dim=-1)
    s = F.normalize((stable if mutual else stable.detach()).to(wide) @ vein, dim=-1)
    cosines = a @ s.T / tau
    loss = _diagonal_cross_entropy(cosines, counts)
    return (loss + _diagonal_cross_entropy(cosines.T, counts)) / 2 if mutual else loss


def _spread(counts: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """``number`` places among the N of ``counts`` [N], evenly spaced among those that count, and
    which of them count: all, or the first ones if fewer places count. Both [number], found without
    waiting for the device."""
    reached = counts.cumsum(0)
    total, wanted = reached[-1], torch.arange(number, device=counts.device)
    ranks = torch.where(total > number, wanted * total // number, wanted)
    places = torch.searchsorted(reached, ranks + 1).clamp_max(len(counts) - 1)
    return places, wanted < total


def _diagonal_cross_entropy(scores: Tensor, counts: Tensor) -> Tensor:
    """The mean cross-entropy of ``scores`` [N, N] with the diagonal as targets, over the rows and
    among the columns that count."""
    own = torch.arange(len(scores), device=scores.device).where(counts, IGNORED)
    scores = scores.masked_fill(~counts, float("-inf"))
    total = F.cross_entropy(scores, own, ignore_index=IGNORED, reduction="sum")
    return total / counts.sum().clamp_min(1)
