"""``optimizer:muon``: orthogonalised momentum for hidden matrices, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from apt_core.optim.optimizers.adamw import ADAM_STATE
from apt_core.optim.optimizers.newton_schulz import orthogonalize
from apt_core.parallel.world import local_part, shard_like, whole_tensor
from apt_core.providers.base import read_settings
from apt_core.providers.optimizer import (
    ADAM_BETAS,
    ADAM_EPS,
    MuonSettings,
    OptimizerProvider,
)

MATRICES = "hidden_matrices"
"""The key of a group that says whether Muon or AdamW steps it."""

BATCH_ELEMENTS = 2**24
"""The most matrix entries orthogonalised at once: more take memory without a gain."""


class Muon(Optimizer):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) and AdamW in one.

    Groups whose ``hidden_matrices`` is true hold matrices [..., R, C], of more dimensions a batch
    of them each; ``stacked`` (1 without it) says how many matrices stand upon one another in each,
    so that R is a part of the rows. A step moves such a matrix by ``lr`` * sqrt(max(1, R/C)) along
    its momentum, orthogonalised: the scale of Jordan et al., ``adjust_lr_fn="original"`` in
    ``torch.optim.Muon``. The momentum is a mean of gradients, as there. Every other group is
    AdamW's, with its keys.

    Sharded parameters (DTensor) are gathered one batch at a time, and every process orthogonalises
    all of them.

    ``found_inf`` is used as by torch's fused optimizers: if it is a 0-d tensor that is not 0, the
    step changes nothing, without a wait of the host. (``grad_scale`` is not supported, so their
    marking attribute is not set.)
    """

    takes_found_inf = True
    found_inf: Tensor | None = None

    def __init__(
        self,
        param_groups: Sequence[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        momentum: float,
        nesterov: bool,
        ns_steps: int,
    ) -> None:
        inner = AdamW(
            [{"params": []}], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True
        )
        super().__init__(
            param_groups,
            {
                **inner.defaults,
                MATRICES: False,
                "stacked": 1,
                "momentum": momentum,
                "nesterov": nesterov,
                "ns_steps": ns_steps,
            },
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. Raises ValueError for a group of matrices that holds anything else."""
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        for parameter in added["params"]:
            if added[MATRICES] and (parameter.ndim < 2 or parameter.shape[-2] % added["stacked"]):
                raise ValueError(
                    f"optimizer muon: a parameter of shape {list(parameter.shape)} is no stack of "
                    f"{added['stacked']} hidden matrices"
                )
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        """Make an AdamW that shares this optimizer's groups and state, so that rates written into a
        group and loaded state apply to both."""
        self._adamw = AdamW([{"params": []}], fused=True)
        self._adamw.param_groups = [g for g in self.param_groups if not g[MATRICES]]
        self._adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all groups; ``closure`` as torch's optimizers take it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group[MATRICES]:
                for batch in _batches(group["params"]):
                    self._step_matrices(group, batch)
        self._adamw.grad_scale, self._adamw.found_inf = None, self.found_inf
        self._adamw.step()
        return loss

    def _step_matrices(self, group: Mapping[str, Any], weights: list[Tensor]) -> None:
        """Step matrices of one shape."""
        gradients = [weight.grad for weight in weights]
        momenta = [self._momentum(weight) for weight in weights]
        void = None if self.found_inf is None else self.found_inf != 0
        if (
            void is not None
        ):  # a void step replaces the gradient by the momentum, whose mean is then unchanged
            for gradient, momentum in zip(
                map(local_part, gradients), map(local_part, momenta), strict=True
            ):
                gradient.copy_(torch.where(void, momentum, gradient))
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = momenta
        if group["nesterov"]:
            updates = torch._foreach_lerp(gradients, momenta, group["momentum"])
        rows, columns = weights[0].shape[-2] // group["stacked"], weights[0].shape[-1]
        whole = [whole_tensor(update).reshape(-1, rows, columns) for update in updates]
        directions = orthogonalize(torch.cat(whole), group["ns_steps"]).to(weights[0].dtype)
        decayed: float | Tensor = 1 - group["lr"] * group["weight_decay"]
        if void is not None:
            directions = directions.masked_fill(void, 0.0)
            decayed = torch.where(void, 1.0, decayed).to(directions.dtype)
        pieces = [
            shard_like(piece.view(weight.shape), weight)
            for piece, weight in zip(
                directions.split([len(part) for part in whole]), weights, strict=True
            )
        ]
        if group["weight_decay"]:
            torch._foreach_mul_([local_part(weight) for weight in weights], decayed)
        scale = max(1.0, rows / columns) ** 0.5
        torch._foreach_add_(weights, pieces, alpha=-group["lr"] * scale)

    def _momentum(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        return state["momentum_buffer"]


def _batches(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters with a gradient, by shape, in batches that are orthogonalised at once."""
    by_shape: dict[tuple[Any, ...], list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            key = (parameter.shape, parameter.dtype, parameter.device)
            by_shape.setdefault(key, []).append(parameter)
    for alike in by_shape.values():
        count = max(1, BATCH_ELEMENTS // alike[0].numel())
        for start in range(0, len(alike), count):
            yield alike[start : start + count]


class MuonProvider(OptimizerProvider):
    """``optimizer:muon``; settings are ``muon`` (as the profile's ``training.muon``), and ``betas``
    and ``eps`` of its AdamW."""

    name = "muon"
    separates_matrices = True
    states = (ADAM_STATE, frozenset({"momentum_buffer"}))

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.settings = read_settings(MuonSettings, self.setting("muon", None), "training.muon")

    def create(
        self, param_groups: Sequence[dict[str, Any]], *, learning_rate: float, weight_decay: float
    ) -> Optimizer:
        """Raises ValueError if no parameter is a hidden matrix."""
        groups = [self._of_matrices(g) if g.get(MATRICES) else dict(g) for g in param_groups]
        if not any(group.get(MATRICES) for group in groups):
            raise ValueError(
                "training.optimizer_name: muon is for hidden matrices, and the model has none "
                "(its blocks are expected in an nn.ModuleList): choose adamw"
            )
        return Muon(
            groups,
            lr=learning_rate,
            betas=tuple(self.setting("betas", ADAM_BETAS)),
            eps=self.setting("eps", ADAM_EPS),
            weight_decay=weight_decay,
            momentum=self.settings.momentum,
            nesterov=self.settings.nesterov,
            ns_steps=self.settings.ns_steps,
        )

    def _of_matrices(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """The group ``asked`` with Muon's rate and decay as defaults."""
        group = dict(asked)
        rate = self.settings.learning_rate * group.pop("lr_scale", 1.0)
        return {"lr": rate, "weight_decay": self.settings.weight_decay, **group}
