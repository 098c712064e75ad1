"""Computes factors on the learning rate of parameters.

A module gives factors for its own parameters in ``lr_scales``, by name. Matrices that read the
residual stream also have a factor by width: Adam moves every weight by about the learning rate,
whatever its gradient, so that the output of such a matrix, a sum over d_model inputs, moves by
about d_model times the rate, and one rate does not suit every width. As in muP (Yang et al.,
arXiv:2203.03466) the rate of these matrices is proportional to 1/d_model:
``training.learning_rate`` is meant for a model of BASE_WIDTH, and the same value suits narrower and
wider ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from apt_core.providers.optimizer import BASE_WIDTH


def learning_rate_scales(model: nn.Module, d_model: int | None) -> dict[str, float]:
    """The factor on the learning rate by parameter name; parameters that are missing have 1.

    Without ``d_model`` nothing is scaled by width. A layer names its matrices that read the
    residual stream in ``reads_stream``, which also covers modules inside it that have no such list.
    In modules without a list, the weight of an ``nn.Linear`` from d_model to another width counts
    as reading; a square one may read or write (:func:`undeclared_squares`).

    Raises ValueError for a module that names something that is not its parameter.
    """
    scales: dict[str, float] = {}
    if d_model is not None:
        scale = BASE_WIDTH / d_model
        for path, module in model.named_modules():
            scales |= dict.fromkeys(declared(path, module, "reads_stream").values(), scale)
        for name, linear in _undeclared(model):
            if linear.in_features == d_model != linear.out_features:
                scales[name] = scale
    for path, module in model.named_modules():
        for own, name in declared(path, module, "lr_scales").items():
            scales[name] = scales.get(name, 1.0) * module.lr_scales[own]
    return scales


def undeclared_squares(model: nn.Module, d_model: int) -> list[str]:
    """Matrices from d_model to d_model whose layer does not say whether they read the residual
    stream. Their rate is not scaled, which is right if they write to it."""
    return [
        name
        for name, linear in _undeclared(model)
        if linear.in_features == linear.out_features == d_model
    ]


def declared(path: str, module: nn.Module, attribute: str) -> dict[str, str]:
    """Maps the parameters that ``module`` names in ``attribute`` to their names in the model, which
    has the module at ``path``. Raises ValueError for a name that is not a parameter of it."""
    names: Iterable[str] = getattr(module, attribute, ())
    if not names:
        return {}
    own = dict(module.named_parameters(remove_duplicate=False))
    unknown = [name for name in names if name not in own]
    if unknown:
        raise ValueError(
            f"{type(module).__name__}.{attribute} names {unknown[0]!r}, which is no parameter of "
            f"it; it has {', '.join(own) or 'none'}"
        )
    return {name: f"{path}.{name}".lstrip(".") for name in names}


def _undeclared(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Linear modules that no surrounding module declares, by the names of their weights."""
    spoken_for: list[str] = []
    for path, module in model.named_modules():
        if path.startswith(tuple(spoken_for)):
            continue
        if hasattr(module, "reads_stream"):
            spoken_for.append(f"{path}." if path else "")
        elif isinstance(module, nn.Linear):
            yield f"{path}.weight".lstrip("."), module
