"""What every feed-forward must do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from apt_core.providers.plain import PlainExperts, PlainFFN
from apt_core.testing.conformance import layers
from apt_core.testing.conformance.checks import Check
from apt_core.testing.conformance.layers import built, sample
from apt_core.testing.conformance.lengths import integers, longer
from apt_core.testing.conformance.plain_forms import computes_its_form, fed_forward

D_MODEL, D_FF = 64, 128


def ffn_checks(provider: Any) -> list[Check]:
    """The checks of a feed-forward provider."""

    def create(dropout: float = 0.0) -> nn.Module:
        return provider.create_layer(D_MODEL, D_FF, dropout)

    x = partial(sample, 2, 8, D_MODEL)

    def long() -> Tensor:
        found = integers(provider, create, lambda: provider.create_layer(48, 80, 0.0))
        return sample(2, longer(found), D_MODEL)

    return [
        Check("builds", lambda: _builds(create)),
        Check("shape", lambda: layers.keeps_shape(built(create), x(), x()[:1, :1], long())),
        Check("gradients", lambda: layers.has_gradients(built(create), x())),
        Check("deterministic", lambda: layers.deterministic(create, x())),
        Check(
            "dropout",
            lambda: _dropout(create, x()),
        ),
        Check("state dict", lambda: layers.loads_state(create, x())),
        Check("meta device", lambda: layers.builds_on_meta(create, x())),
        Check("token-wise", lambda: layers.token_wise(built(create), x(), long())),
        Check("autocast", lambda: layers.autocasts(built(create), x())),
        Check("compile", lambda: layers.compiles(built(create), x())),
        Check("no host sync", lambda: layers.never_waits(built(create), x())),
        Check("flops", lambda: layers.costs(provider, lambda n: provider.flops(D_MODEL, D_FF, n))),
        Check(
            "plain form",
            lambda: computes_its_form(built(create), x(), (PlainFFN, PlainExperts), fed_forward),
        ),
    ]


def _builds(create: layers.Create) -> None:
    built(create)
    layers.share_nothing(create)


def _dropout(create: Callable[..., nn.Module], x: Tensor) -> None:
    dropping = partial(create, 0.5)
    layers.drops_nothing_in_evaluation(create, dropping, x)
    layers.draws_by_the_seed(dropping, x)
