"""Turns dense feed-forwards into experts that compute the same function, with optimizer state.

Every expert starts as a copy of the dense layer, or, with granularity G, of a G-th of its hidden
units. The weights of the chosen experts sum to one in each group, so that the output is that of the
dense layer whatever the router chooses (Komatsuzaki et al., arXiv:2212.05055, without their change
of the output). Equal copies would stay equal if they were sent the same tokens. So each hidden unit
of a copy has a gauge c of 1/2, 1 or 2, which scales its input, and its output back. This is exact,
since c is a power of two; but relative to the scaled weights the steps of Adam differ.

D d_model, F d_ff, E experts, K of them per token, G granularity; expert (g, e) has the index
g*E + e.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from apt_core import ConfigError
from apt_core.config import Config
from apt_core.modeling import Carried, ModelTransform, generator_for
from apt_core.modeling.blocks import block_stack
from apt_core.modeling.layers import GELU, FeedForward, SquaredReLU, SwiGLU
from apt_plugins.moe.experts import Activation, Experts
from apt_plugins.moe.layer import MoELayer
from apt_plugins.moe.settings import MoeSettings

if TYPE_CHECKING:
    from apt_core.types import ProviderSource


@dataclass(frozen=True)
class _Kind:
    """``degree``: scaling the inputs of a hidden unit by c > 0 scales the unit by c to this power;
    0 if it is not homogeneous."""

    activation: Activation
    degree: int


KINDS: dict[type[nn.Module], _Kind] = {
    SwiGLU: _Kind("swiglu", 1),
    SquaredReLU: _Kind("relu2", 2),
    GELU: _Kind("gelu", 0),
}
"""The feed-forwards that can be cloned. Subclasses are excluded: they may compute something
else."""


def upcycled(
    model: nn.Module, config: Config, settings: MoeSettings, registry: ProviderSource
) -> ModelTransform:
    """``model``, on the meta device and changed in place, with experts in every block.

    Raises ConfigError if a block has no feed-forward that can be cloned.
    """
    own = registry.spec("router", settings.router).config is MoeSettings
    router = registry.get("router", settings.router, settings if own else None)
    origins: dict[str, Carried] = {}
    active_share: dict[str, float] = {}
    added_flops = 0
    for place, parent, leaf in _dense_layers(model, config.model.ffn_name):
        dense = parent.get_submodule(leaf)
        layer = _layer_for(dense, settings, router)
        setattr(parent, leaf, layer)
        copies = _Copies(place, dense, settings, config.training.seed)
        origins.update(copies.origins())
        share = settings.top_k / settings.experts
        active_share.update({f"{place}.experts.{name}": share for name in copies.names})
        size = sum(parameter.numel() for parameter in dense.parameters())
        times = settings.top_k - 1 + (layer.shared is not None)
        router_size = sum(parameter.numel() for parameter in layer.router.parameters())
        added_flops += 2 * (times * size + router_size)
    return ModelTransform(
        model, origins=origins, active_share=active_share, added_flops=added_flops
    )


def _dense_layers(model: nn.Module, ffn_name: str) -> Iterator[tuple[str, nn.Module, str]]:
    """(name, parent, its attribute) of the feed-forward of each block."""
    stack, blocks = block_stack(model)
    if not blocks:
        raise _not_clonable(ffn_name, f"{type(model).__name__} keeps no list of blocks")
    for index, block in enumerate(blocks):
        place = f"{stack}.{index}"
        leaves = [name for name, child in block.named_children() if type(child) in KINDS]
        if not leaves:
            own = getattr(block, "ffn", block)
            raise _not_clonable(ffn_name, f"{place} has a {type(own).__name__}")
        for leaf in leaves:
            dense = block.get_submodule(leaf)
            if not all(isinstance(part.weight, nn.Parameter) for part in dense.children()):
                raise ConfigError(
                    f"the weights of {place}.{leaf} are computed (by model.quant?): copies of them "
                    "would not be",
                    key="schedules",
                    hint="enable what computes them after moe",
                )
            yield f"{place}.{leaf}", block, leaf


def _not_clonable(ffn_name: str, what: str) -> ConfigError:
    return ConfigError(
        f"{ffn_name!r} cannot become experts: {what}",
        key="model.ffn_name",
        hint="choose default, gelu or relu2, or leave out moe with --plugin no:moe",
    )


def _layer_for(dense: FeedForward, settings: MoeSettings, router: Any) -> MoELayer:
    """The layer that replaces ``dense``, on the meta device."""
    groups, sizes = settings.granularity, (dense.d_model, dense.d_ff // settings.granularity)
    split = settings.shared_expert == "split"
    return MoELayer(
        router.create_router(dense.d_model, settings.experts, settings.top_k, groups=groups),
        Experts(settings.experts * groups, *sizes, KINDS[type(dense)].activation),
        top_k=settings.top_k,
        granularity=groups,
        capacity=None if settings.dropless else settings.capacity,
        dropout=dense.dropout,
        shared=None if settings.shared_expert == "none" else dense,
        shared_weight=settings.shared_weight if split else None,
    )


class _Copies:
    """The rules that make the parameters of the layer at ``place`` from the ``dense`` layer that it
    replaces."""

    def __init__(self, place: str, dense: FeedForward, settings: MoeSettings, seed: int) -> None:
        self.place, self.seed, self.settings = place, seed, settings
        self.names = ["gate", "up", "down"] if dense.gated else ["up", "down"]
        self.degree = KINDS[type(dense)].degree
        self.hidden = dense.d_ff // settings.granularity

    def origins(self) -> dict[str, Carried]:
        carried = {f"{self.place}.experts.{name}": self._expert(name) for name in self.names}
        if self.settings.shared_expert != "none":
            for name in self.names:
                carried[f"{self.place}.shared.{name}.weight"] = self._shared(name)
        return carried

    def _expert(self, name: str) -> Carried:
        """A copy for each of E experts.

        The gradient g of the dense layer is a mean over tokens. An expert gets a token with
        probability K/E and weight 1/K: the mean of its gradient is g/E, and that of its square,
        which is mostly noise, g²/(E*K). With a shared expert with the share λ of the output, g is
        replaced by (1-λ)*g; the gauge scales gradients inversely.
        """
        settings = self.settings
        gauge = {"gate": 0, "up": 1, "down": -self.degree}[name] if self.degree else 0
        mean = 1 / settings.experts
        square = mean / settings.top_k
        if settings.shared_expert == "split":
            mean *= 1 - settings.shared_weight
            square *= (1 - settings.shared_weight) ** 2
        cut = partial(self._cut, name)
        return Carried(
            self._source(name),
            value=partial(cut, power=gauge),
            first_moment=partial(cut, power=-gauge, factor=mean),
            second_moment=partial(cut, power=-2 * gauge, factor=square),
        )

    def _shared(self, name: str) -> Carried:
        """The dense layer itself, as the shared expert.

        With a split output its gradient is λ times that of the dense layer. In the zero form the
        down projection is 0; its gradient is unchanged, and the other parameters have none at
        first: their first moment starts at 0, and their second moment is kept, so that the first
        steps are not large.
        """
        if self.settings.shared_expert == "split":
            weight = self.settings.shared_weight
            return Carried(
                self._source(name),
                first_moment=partial(torch.mul, other=weight),
                second_moment=partial(torch.mul, other=weight**2),
            )
        if name == "down":
            return Carried(self._source(name), value=torch.zeros_like)
        return Carried(self._source(name), first_moment=torch.zeros_like)

    def _source(self, name: str) -> str:
        return f"{self.place}.{name}.weight"

    def _cut(self, name: str, whole: Tensor, *, power: int, factor: float = 1.0) -> Tensor:
        """``whole``, [F, D] or for down [D, F], as [G*E, F/G, D] or [G*E, D, F/G]: cut by hidden
        units, copied, and times ``factor`` * gauge^``power``."""
        groups, experts = self.settings.granularity, self.settings.experts
        down = name == "down"
        parts = whole.unflatten(1 if down else 0, (groups, self.hidden))
        parts = parts.movedim(1, 0) if down else parts
        # In one tensor, since this is the peak of memory for large experts.
        copies = parts[:, None].repeat(1, experts, 1, 1).flatten(0, 1)
        if power and self.settings.symmetry_breaking:
            scale = whole.new_tensor([0.5**power, 1.0, 2.0**power])[self._gauge().to(whole.device)]
            copies *= scale[:, None, :] if down else scale[:, :, None]
        copies *= factor
        return copies

    def _gauge(self) -> Tensor:
        """1 + log2 of c by expert and hidden unit, int64 [G*E, F/G]; c is 1 in the first expert of
        a group. The rules for up and down, and for their moments, draw the same ones.
        """
        groups, experts = self.settings.granularity, self.settings.experts
        generator = generator_for(self.seed, f"{self.place}.gauge")
        # The default device may differ from the generator's.
        sizes = (groups, experts, self.hidden)
        drawn = torch.randint(3, sizes, generator=generator, device="cpu")
        drawn[:, 0] = 1
        return drawn.flatten(0, 1)
