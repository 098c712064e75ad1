"""The router ``router:topk_moe``: chooses experts for each token, with weights.

Legend: N tokens, D d_model, E experts in each of G groups, K of them a token in each group.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_core.modeling.growth import Larger, Sizes, resized
from apt_core.providers import Beyond, PlainRouter, RouterProvider

ROUTER_STD = 0.02


class TopKRouter(nn.Module):
    """Scores s of logits x Wᵀ / T, of which the K largest in each group are chosen.

    ``softmax`` scores are probabilities within the group; ``sigmoid`` scores are independent. The
    weights of the chosen experts are their scores divided by the sum of these, so that they sum to
    one in each group. With K = 1 the divisor counts as a constant: the weight is one, but the
    router still gets a gradient.

    ``bias`` [G*E] is added to the scores for the choice alone (Wang et al., arXiv:2408.15664).
    While it ``explores``, in training, the choice is made by the scores of logits with Gumbel noise
    of scale ``noise`` (0-d): of scale 1 with softmax scores it draws K experts without replacement,
    by their probabilities (Kool et al., arXiv:1903.06059). ``temperature`` (0-d) is T.

    Everything is computed in fp32 or wider, also under autocast.
    """

    reads_stream = ("weight",)
    # Its rows are learned separately, like those of an output head.
    elementwise = ("weight",)

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        *,
        groups: int = 1,
        scores: Literal["softmax", "sigmoid"] = "softmax",
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(
                f"model.moe.top_k: {top_k} experts per token, and model.moe.experts is "
                f"{num_experts}: choose top_k from 1 to experts"
            )
        self.num_experts, self.top_k, self.groups, self.scores = num_experts, top_k, groups, scores
        self.explores = False
        self.weight = nn.Parameter(torch.empty(groups * num_experts, d_model))
        self.register_buffer("bias", torch.empty(groups * num_experts))
        # Buffers, and so part of checkpoints: they outlast the plugin that has set them.
        self.register_buffer("temperature", torch.empty(()))
        self.register_buffer("noise", torch.empty(()))
        self.register_buffer("offsets", torch.empty(groups, 1, dtype=torch.int64), persistent=False)
        self.probabilities: Tensor | None = None
        self.logits: Tensor | None = None
        self.reset_buffers()
        nn.init.normal_(self.weight, 0.0, ROUTER_STD)

    def init_parameter(
        self, name: str, tensor: Tensor, generator: torch.Generator | None, *, num_layers: int
    ) -> bool:
        nn.init.normal_(tensor, 0.0, ROUTER_STD, generator=generator)
        return True

    def grow(self, sizes: Sizes) -> dict[str, Larger]:
        """Take on a larger ``sizes.d_model``."""
        rows, width = self.weight.shape
        self.weight = resized(self.weight, rows, sizes.d_model or width)
        return {"weight": Larger({1: "zero"})}

    @torch.no_grad()
    def reset_buffers(self) -> None:
        self.bias.zero_()
        self.temperature.fill_(1.0)
        self.noise.zero_()
        if not self.offsets.is_meta:
            self.offsets.copy_(self.num_experts * torch.arange(self.groups)[:, None])

    def buffers_loaded(self) -> None:
        self.explores = bool(self.noise > 0)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, D] to the chosen experts int64 [N, G*K] (expert e of group g is g*E + e) and their
        weights [N, G*K].

        In training ``probabilities`` and ``logits`` [N, G*E] of this forward are kept.
        """
        # The meta device has no autocast: treat it as a CPU.
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            logits = F.linear(x.to(wide), self.weight.to(wide)) / self.temperature
            logits = logits.unflatten(-1, (self.groups, self.num_experts))
            softmax = self.scores == "softmax"
            scores = self._scores(logits)
            choice = scores.detach()
            if self.explores and self.training:
                # -log of an exponential variable is a Gumbel one.
                gumbel = torch.empty_like(logits).exponential_().log_().neg_()
                choice = self._scores(logits.detach() + self.noise * gumbel)
            choice = choice + self.bias.view(self.groups, self.num_experts)
            indices = choice.topk(self.top_k, dim=-1).indices
            # In logarithms, since a score may underflow to 0.
            chosen = logits.gather(-1, indices)
            if not softmax:
                chosen = F.logsigmoid(chosen)
            if self.top_k == 1:
                if softmax:
                    chosen = chosen - logits.logsumexp(-1, keepdim=True)
                weights = (chosen - chosen.detach()).exp()
            else:
                # The normaliser of the softmax cancels.
                weights = chosen.softmax(-1)
            if self.training:
                self.logits = logits.flatten(1)
                shares = scores if softmax else F.logsigmoid(logits).softmax(-1)
                self.probabilities = shares.flatten(1)
            return (indices + self.offsets).flatten(1), weights.flatten(1)

    def plain(self) -> PlainRouter:
        """The router in evaluation; the temperature is divided into its weight. Raises ValueError
        for other scores than softmax."""
        if self.scores != "softmax":
            raise ValueError(f"its router has {self.scores} scores, not softmax")
        return PlainRouter(self.weight / self.temperature, self.top_k, renormalised=True)

    def beyond_plain(self) -> Iterator[Beyond]:
        """The bias on the choice of experts, once balancing has moved it."""
        if self.bias.any():
            what = "a bias that balances the load moves the choice of experts"
            yield Beyond("balancing_bias", what, self.bias.zero_)

    def _scores(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1) if self.scores == "softmax" else logits.sigmoid()

    def __getstate__(self) -> dict[str, Any]:
        # A copy does not include the last forward, whose graph could not be copied.
        return {**self.__dict__, "logits": None, "probabilities": None}


class TopKProvider(RouterProvider):
    """``router:topk_moe``; of the settings ``model.moe`` it reads ``scores``."""

    name = "topk_moe"
    version = "1.0.0"

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.scores: Literal["softmax", "sigmoid"] = getattr(config, "scores", "softmax")

    def create_router(
        self, d_model: int, num_experts: int, top_k: int, *, groups: int = 1
    ) -> nn.Module:
        return TopKRouter(d_model, num_experts, top_k, groups=groups, scores=self.scores)
