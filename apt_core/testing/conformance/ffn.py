"""What every feed-forward must do."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from apt_core.testing.conformance import layers
from apt_core.testing.conformance.checks import Check
from apt_core.testing.conformance.layers import built, sample

D_MODEL, D_FF = 64, 128


def ffn_checks(provider: Any) -> list[Check]:
    """The checks of a feed-forward provider."""

    def create(dropout: float = 0.0) -> nn.Module:
        return provider.create_layer(D_MODEL, D_FF, dropout)

    x = sample(2, 8, D_MODEL)
    return [
        Check("builds", lambda: _builds(create)),
        Check("shape", lambda: layers.keeps_shape(built(create), x, x[:1, :1])),
        Check("gradients", lambda: layers.has_gradients(built(create), x)),
        Check("deterministic", lambda: layers.deterministic(create, x)),
        Check(
            "dropout",
            lambda: layers.drops_nothing_in_evaluation(create, partial(create, 0.5), x),
        ),
        Check("state dict", lambda: layers.loads_state(create, x)),
        Check("meta device", lambda: layers.builds_on_meta(create, x)),
        Check("token-wise", lambda: layers.token_wise(built(create), x)),
        Check("autocast", lambda: layers.autocasts(built(create), x)),
        Check("compile", lambda: layers.compiles(built(create), x)),
        Check("no host sync", lambda: layers.never_waits(built(create), x)),
        Check("flops", lambda: layers.costs(provider, lambda n: provider.flops(D_MODEL, D_FF, n))),
    ]


def _builds(create: layers.Create) -> None:
    built(create)
