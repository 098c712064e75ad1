"""Caches weights cast to the compute dtype until the weights change.

torch's own cache of casts lasts for one forward and does not cover layers that cast their weights
themselves. This one is shared by the micro-batches of a step, the batches of an evaluation and the
tokens of a generation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

NOTHING: AbstractContextManager[None] = nullcontext()


def cast_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` as ``dtype``: the cached cast inside :meth:`KeptCasts.used`, otherwise a new one.
    Gradients flow to ``weight`` either way."""
    kept: Tensor | None = getattr(weight, "kept_cast", None)
    return weight.to(dtype) if kept is None or kept.dtype != dtype else kept


class KeptCasts:
    """Casts of the parameters that the modules of ``model`` name in ``cast_once`` and read by
    :func:`cast_weight`.

    A cast is made once, and again after its parameter was written to, replaced, frozen or thawed. A
    write through ``.data`` is not noticed: call :meth:`forget` before it. Sharded parameters are
    not cached, since their casts would be unsharded.
    """

    def __init__(self, model: nn.Module) -> None:
        named = [(m, name) for m in model.modules() for name in getattr(m, "cast_once", ())]
        self._places = [(m, name) for m, name in named if not isinstance(getattr(m, name), DTensor)]
        self._kept: dict[int, tuple[Tensor, tuple[Any, ...], Tensor]] = {}

    def used(self, dtype: torch.dtype | None) -> AbstractContextManager[None]:
        """A context in which forwards that compute in ``dtype`` use the casts; None for no casts.

        The attribute is of the parameter itself: a forward with other tensors in its place
        (``torch.func.functional_call``) does not see it.
        """
        return NOTHING if dtype is None or not self._places else self._used(dtype)

    @contextmanager
    def _used(self, dtype: torch.dtype) -> Iterator[None]:
        weights: list[Any] = [getattr(module, name) for module, name in self._places]
        try:
            for index, weight in enumerate(weights):
                weight.kept_cast = self._cast(index, weight, dtype)
            yield
        finally:
            for weight in weights:
                weight.__dict__.pop("kept_cast", None)

    def _cast(self, index: int, weight: Tensor, dtype: torch.dtype) -> Tensor:
        if weight.is_inference():  # an inference tensor counts no writes
            return weight.to(dtype)
        state = weight._version, weight.data_ptr(), weight.requires_grad, dtype
        kept = self._kept.get(index)
        if kept is None or kept[0] is not weight or kept[1] != state:
            kept = self._kept[index] = weight, state, weight.to(dtype)
        return kept[2]

    def forget(self) -> None:
        """Free the casts."""
        self._kept.clear()
