"""Computes the forward and the loss of a micro-batch, compiled or not.

Forward and loss are compiled as one function, so that the fp32 logits and their gradients are never
in memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from apt_core.config import Config
from apt_core.data.batches import Batch
from apt_core.device import is_out_of_memory
from apt_core.error_text import cause_of, one_line
from apt_core.evaluation.quick_eval import sums_of
from apt_core.log import get_logger
from apt_core.modeling.calling import forward_batch, forward_with
from apt_core.modeling.compilation import Compilation
from apt_core.modeling.cross_entropy import cross_entropy_sum
from apt_core.types import ModelOutput

log = get_logger("apt.training")

MOST_GRAPHS = 16
"""The number of graphs that may be compiled of one function. A run has few batch shapes, each with
and without what plugins read, freeze or limit; a number that changes in every step would need a
graph for each value."""

RECURSION_LIMIT = 2000
"""The limit that Inductor sets."""

COMPILERS = ("torch._dynamo", "torch._inductor", "torch._functorch", "triton")
"""Packages whose errors are errors of the compiler, not of the model."""


@contextmanager
def compiler_settings(config: Config, chosen: Compilation) -> Iterator[None]:
    """Set torch's compiler while the context lasts, if ``chosen`` compiles.

    A backward is compiled together with its forward, so that a failure leaves no gradients. Too
    many recompilations are an error under ``training.compile: auto``, so that the run notices them.
    ``training.deterministic`` forbids choosing kernels by timing. Inductor's recursion limit is set
    here, before plugins are watched, so that the change is not attributed to one of them."""
    if chosen.mode is None:
        yield
        return
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor

    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, RECURSION_LIMIT))
    try:
        with (
            functorch.patch(force_non_lazy_backward_lowering=True),
            dynamo.patch(fail_on_recompile_limit_hit=config.training.compile == "auto"),
            inductor.patch(deterministic=config.training.deterministic or inductor.deterministic),
        ):
            yield
    finally:
        sys.setrecursionlimit(before)


class Forward:
    """Computes micro-batches with ``model``, as ``compilation`` says. If the compiler fails under
    ``auto``, ``compilation`` changes and the forward goes on uncompiled, unless ``strict``.

    A run has few batch shapes; each is compiled separately.
    """

    def __init__(self, model: nn.Module, compilation: Compilation, *, strict: bool = False) -> None:
        self.compilation = compilation
        self._model, self._strict = model, strict
        self._step: Callable[..., Any] | None = None
        self._sums: Callable[..., Tensor] | None = None
        self._with_weights: Callable[..., ModelOutput] | None = None
        if compilation.mode is not None:
            options: dict[str, Any] = {
                "dynamic": False,
                "isolate_recompiles": True,
                "recompile_limit": MOST_GRAPHS,
            }

            def step(ids: Tensor, targets: Tensor, outputs: bool, **rows: Tensor) -> Any:
                output = model(ids, **rows)
                summed = cross_entropy_sum(output, targets)
                return summed, output if outputs else None

            def sums(ids: Tensor, targets: Tensor, accuracy: bool, **rows: Tensor) -> Tensor:
                return sums_of(model(ids, **rows), targets, accuracy=accuracy)

            def with_weights(
                ids: Tensor, weights: Mapping[str, Tensor], **rows: Tensor
            ) -> ModelOutput:
                return functional_call(model, weights, (ids,), rows)

            mode = None if compilation.mode == "default" else compilation.mode
            self._step = torch.compile(step, mode=mode, **options)
            # Without CUDA graphs: they would overwrite sums that an evaluation keeps.
            self._sums = torch.compile(sums, **options)
            self._with_weights = torch.compile(with_weights, **options)

    def __call__(
        self, batch: Batch, *, outputs: bool = True, again: Callable[[], object] = lambda: None
    ) -> tuple[Tensor, ModelOutput | None]:
        """The summed cross-entropy of ``batch`` in training, in nats and fp32, and the model's
        output, which is None in a compiled model unless ``outputs``. ``again`` is called before the
        forward is retried without the compiler."""
        step = self._step
        if step is not None:
            try:
                return forward_batch(
                    partial(step, targets=batch.targets, outputs=outputs), self._model, batch
                )
            except Exception as error:
                self._give_up(error)
                again()
        output = forward_batch(self._model, self._model, batch)
        return cross_entropy_sum(output, batch.targets), output

    def output(self, batch: Batch) -> ModelOutput:
        """The model's output for ``batch`` in training."""
        if self._step is not None:
            output = self(batch)[1]
            assert output is not None
            return output
        return forward_batch(self._model, self._model, batch)

    def sums(self, batch: Batch, *, accuracy: bool) -> Tensor:
        """The result of :func:`~apt_core.evaluation.quick_eval.sums_of` for ``batch``."""
        if self._sums is not None:
            try:
                call = partial(self._sums, targets=batch.targets, accuracy=accuracy)
                return forward_batch(call, self._model, batch)
            except Exception as error:
                self._give_up(error)
        output = forward_batch(self._model, self._model, batch)
        return sums_of(output, batch.targets, accuracy=accuracy)

    def with_weights(self, weights: Mapping[str, Tensor], batch: Batch) -> ModelOutput:
        """The model's output for ``batch`` with ``weights`` in place of its own."""
        if self._with_weights is not None:
            try:
                call = partial(self._with_weights, weights=weights)
                return forward_batch(call, self._model, batch)
            except Exception as error:
                self._give_up(error)
        return forward_with(weights, self._model, batch)

    def _give_up(self, error: Exception) -> None:
        """Go on without the compiler. Raises ``error`` if the compiler did not cause it, or if the
        profile asks for compiling."""
        if self.compilation.asked or self._strict or not is_compiler_error(error):
            raise error
        reason = f"torch.compile failed: {one_line(getattr(error, 'inner_exception', error))}"
        if type(error).__name__ == "FailOnRecompileLimitHit":
            reason = f"the calls differ so often that {MOST_GRAPHS} graphs did not suffice"
        log.warning("training.compile: %s; the run goes on without it", reason)
        self.compilation = replace(self.compilation, mode=None, reason=reason)
        self._step = self._sums = self._with_weights = None


def is_compiler_error(error: BaseException) -> bool:
    """Whether the compiler raised ``error``, for another reason than lack of memory."""
    if is_out_of_memory(error):
        return False
    cause: BaseException | None = error
    while cause is not None:
        if any(base.__module__.startswith(COMPILERS) for base in type(cause).__mro__):
            return True
        cause = cause_of(cause)
    return False
