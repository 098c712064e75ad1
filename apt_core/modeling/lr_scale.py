"""How much faster than the rest some parameters learn.

A module gives factors to parameters of its own in ``lr_scales``, by name. Matrices that read the
residual stream have one by width besides: Adam moves every weight by about the learning rate,
whatever its gradient. The sum over d_model inputs that such a matrix forms therefore moves by about
d_model times the rate, so one rate does not suit every width. As in muP (Yang et al.,
arXiv:2203.03466) the rate of these matrices is proportional to 1/d_model:
``training.learning_rate`` is meant for a model of BASE_WIDTH, and the same value suits narrower and
wider ones.
"""

from __future__ import annotations

from torch import nn

BASE_WIDTH = 1536


def learning_rate_scales(model: nn.Module, d_model: int | None) -> dict[str, float]:
    """The factor on the learning rate by parameter name; what is not named has 1.

    Without ``d_model`` nothing is scaled by width. A layer names the matrices of its own that read
    the residual stream in ``reads_stream``, and speaks so for everything inside it. Elsewhere it is
    the weight of an ``nn.Linear`` from d_model to another width: a square one may read or write.
    """
    scales = {} if d_model is None else _scales_by_width(model, d_model)
    for module_name, module in model.named_modules():
        for name, factor in getattr(module, "lr_scales", {}).items():
            full_name = f"{module_name}.{name}".lstrip(".")
            scales[full_name] = scales.get(full_name, 1.0) * factor
    return scales


def _scales_by_width(model: nn.Module, d_model: int) -> dict[str, float]:
    scale = BASE_WIDTH / d_model
    scales: dict[str, float] = {}
    spoken_for: list[str] = []
    for module_name, module in model.named_modules():
        if module_name.startswith(tuple(spoken_for)):
            continue
        names = getattr(module, "reads_stream", None)
        if names is not None:
            spoken_for.append(f"{module_name}.")
        elif isinstance(module, nn.Linear) and module.in_features == d_model:
            names = ("weight",) if module.out_features != d_model else ()
        scales.update((f"{module_name}.{name}".lstrip("."), scale) for name in names or ())
    return scales
