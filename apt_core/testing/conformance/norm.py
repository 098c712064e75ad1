"""What every norm must do."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from apt_core.providers.plain import PlainNorm
from apt_core.testing.conformance import layers
from apt_core.testing.conformance.checks import Check
from apt_core.testing.conformance.layers import built, sample
from apt_core.testing.conformance.lengths import integers, longer
from apt_core.testing.conformance.plain_forms import computes_its_form, normed

D_MODEL = 64


def norm_checks(provider: Any) -> list[Check]:
    """The checks of a norm provider."""

    def create() -> nn.Module:
        return provider.create_layer(D_MODEL)

    def builds() -> None:
        built(create)
        layers.share_nothing(create)

    x = partial(sample, 2, 8, D_MODEL)

    def long() -> Tensor:
        found = integers(provider, create, lambda: provider.create_layer(48))
        return sample(2, longer(found), D_MODEL)

    return [
        Check("builds", builds),
        Check(
            "shape",
            lambda: layers.keeps_shape(built(create), x(), x()[0], x()[0, 0], x()[:, :, None]),
        ),
        Check("gradients", lambda: layers.has_gradients(built(create), x())),
        Check("deterministic", lambda: layers.deterministic(create, x())),
        Check("state dict", lambda: layers.loads_state(create, x())),
        Check("meta device", lambda: layers.builds_on_meta(create, x())),
        Check("token-wise", lambda: layers.token_wise(built(create), x(), long())),
        Check("autocast", lambda: layers.autocasts(built(create), x())),
        Check("compile", lambda: layers.compiles(built(create), x())),
        Check("no host sync", lambda: layers.never_waits(built(create), x())),
        Check("plain form", lambda: computes_its_form(built(create), x(), PlainNorm, normed)),
    ]
