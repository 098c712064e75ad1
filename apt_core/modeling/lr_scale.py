"""How much faster than the rest the matrices that read the residual stream learn.

Adam moves every weight by about the learning rate, whatever its gradient. The sum over d_model
inputs that such a matrix forms therefore moves by about d_model times the rate, so one rate does
not suit every width. As in muP (Yang et al., arXiv:2203.03466) the rate of these matrices is
proportional to 1/d_model: ``training.learning_rate`` is meant for a model of BASE_WIDTH, and the
same value suits narrower and wider ones.
"""

from __future__ import annotations

from torch import nn

BASE_WIDTH = 1536


def learning_rate_scales(model: nn.Module, d_model: int) -> dict[str, float]:
    """The factor on the learning rate by parameter name; what is not named has 1.

    A matrix reads the residual stream if its module names it in ``reads_stream``, or if it is the
    weight of an ``nn.Linear`` with d_model inputs.
    """
    scale = BASE_WIDTH / d_model
    scales: dict[str, float] = {}
    for module_name, module in model.named_modules():
        names = getattr(module, "reads_stream", ())
        if isinstance(module, nn.Linear) and module.in_features == d_model:
            names = ("weight",)
        scales.update((f"{module_name}.{name}".lstrip("."), scale) for name in names)
    return scales
