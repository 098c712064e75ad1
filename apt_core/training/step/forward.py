"""The forward and the loss of a micro-batch as the loop computes them, compiled or not.

Both are compiled as one: the logits and their gradients in fp32 are then never in memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
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
from apt_core.modeling.calling import forward_batch
from apt_core.modeling.compilation import Compilation
from apt_core.modeling.cross_entropy import cross_entropy_sum
from apt_core.types import ModelOutput

log = get_logger("apt.training")

MOST_GRAPHS = 16
"""How many graphs are made of the same function: what trains comes in a few shapes, with and
without what plugins read, freeze or limit. A number that changes in every step would need one for
each value."""

RECURSION_LIMIT = 2000
"""Inductor's."""

COMPILERS = ("torch._dynamo", "torch._inductor", "torch._functorch", "triton")
"""Whose errors are of compiling, and not of what is compiled."""


@contextmanager
def compiler_settings(config: Config, chosen: Compilation) -> Iterator[None]:
    """How torch compiles inside, if it does: a backward together with its forward, so that a
    failure leaves no gradients; an error, and not silence, where it gives up for too many different
    calls; with ``training.deterministic`` without choosing kernels by their time. The recursion
    limit is the one that Inductor sets, before plugins are watched: to them it is nobody's
    change."""
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
    """Computes micro-batches with ``model``; ``compilation`` is how, and changes where ``auto``
    finds that the compiler fails: the forward goes on without, unless ``strict``.

    Batches of a run come in few shapes, each of which is compiled for itself.
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

            def step(ids: Tensor, targets: Tensor, outputs: bool) -> Any:
                output = model(ids)
                summed = cross_entropy_sum(output, targets)
                return summed, output if outputs else None

            def sums(ids: Tensor, targets: Tensor, accuracy: bool) -> Tensor:
                return sums_of(model(ids), targets, accuracy=accuracy)

            def with_weights(weights: Mapping[str, Tensor], ids: Tensor) -> ModelOutput:
                return functional_call(model, weights, (ids,))

            mode = None if compilation.mode == "default" else compilation.mode
            self._step = torch.compile(step, mode=mode, **options)
            # Without graphs: an evaluation keeps the sums of all its batches.
            self._sums = torch.compile(sums, **options)
            self._with_weights = torch.compile(with_weights, **options)

    def __call__(
        self, batch: Batch, *, outputs: bool = True, again: Callable[[], object] = lambda: None
    ) -> tuple[Tensor, ModelOutput | None]:
        """The summed cross-entropy of ``batch`` in training, in nats and fp32, and what the model
        gives: None where that is compiled and nobody wants the ``outputs``. ``again`` is called
        before a second try."""
        step = self._step
        if step is not None:
            try:
                return forward_batch(
                    lambda ids: step(ids, batch.targets, outputs), self._model, batch
                )
            except Exception as error:
                self._give_up(error)
                again()
        output = forward_batch(self._model, self._model, batch)
        return cross_entropy_sum(output, batch.targets), output

    def output(self, batch: Batch) -> ModelOutput:
        """What the model gives for ``batch`` in training."""
        if self._step is not None:
            output = self(batch)[1]
            assert output is not None
            return output
        return forward_batch(self._model, self._model, batch)

    def sums(self, batch: Batch, *, accuracy: bool) -> Tensor:
        """What :func:`~apt_core.evaluation.quick_eval.sums_of` says of ``batch``."""
        if self._sums is not None:
            try:
                return self._sums(batch.input_ids, batch.targets, accuracy)
            except Exception as error:
                self._give_up(error)
        return sums_of(self._model(batch.input_ids), batch.targets, accuracy=accuracy)

    def with_weights(self, weights: Mapping[str, Tensor], input_ids: Tensor) -> ModelOutput:
        """What the model gives for ``input_ids`` [B, T] with these ``weights`` in the place of its
        own."""
        if self._with_weights is not None:
            try:
                return self._with_weights(weights, input_ids)
            except Exception as error:
                self._give_up(error)
        output: ModelOutput = functional_call(self._model, dict(weights), (input_ids,))
        return output

    def _give_up(self, error: Exception) -> None:
        """Go on without the compiler; raise ``error`` where it is not the compiler's, or the
        profile wants it."""
        if self.compilation.asked or self._strict or not of_compiling(error):
            raise error
        reason = f"torch.compile failed: {one_line(getattr(error, 'inner_exception', error))}"
        if type(error).__name__ == "FailOnRecompileLimitHit":
            reason = f"the calls differ so often that {MOST_GRAPHS} graphs did not suffice"
        log.warning("training.compile: %s; the run goes on without it", reason)
        self.compilation = replace(self.compilation, mode=None, reason=reason)
        self._step = self._sums = self._with_weights = None


def of_compiling(error: BaseException) -> bool:
    """Did the compiler raise ``error``, and not for want of memory?"""
    if is_out_of_memory(error):
        return False
    cause: BaseException | None = error
    while cause is not None:
        if any(base.__module__.startswith(COMPILERS) for base in type(cause).__mro__):
            return True
        cause = cause_of(cause)
    return False
