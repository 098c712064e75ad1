"""Sums the gradients of a run's processes once a step.

A parameter may get a gradient in some processes only, if a loss term or a layer does not use it for
every micro-batch. A missing gradient counts as zero; a parameter without a gradient in any process
keeps none, as in a run of one process.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from apt_core.errors import TrainingError
from apt_core.parallel.liveness import lost_error
from apt_core.parallel.world import World, is_sharded

BUCKET_BYTES = 2**26
"""The number of bytes of gradients in one message. A larger bucket takes more memory, a smaller one
more messages."""


class GradientSum:
    """Averages the gradients of ``model`` over the processes. Call :meth:`begin` before the first
    forward of a step, :meth:`expect` before the forward of each micro-batch, and :meth:`finish`
    after the last backward.

    The gradients of a sharded model are averaged by FSDP2 in the backward; this class then sets
    those to None that no process has computed.
    """

    def __init__(self, model: nn.Module, world: World) -> None:
        self._model, self._world = model, world
        self._names, self._parameters = zip(*model.named_parameters(), strict=True)
        self._sharded = isinstance(model, FSDPModule)
        self._learning: list[bool] = []
        self._chosen: list[int] = []
        self._buckets: list[list[int]] = []
        self._seen: dict[int, bool] = {}
        self._flags: tuple[list[bool], Tensor] | None = None
        self._taken_part: list[tuple[int, Tensor]] = []

    def begin(self) -> None:
        """Compare which parameters are frozen. Raises TrainingError for one that is frozen in some
        processes only, and ProcessLostError if another process is lost."""
        learning = [parameter.requires_grad for parameter in self._parameters]
        own = torch.tensor([hash(tuple(learning))])
        everyone = torch.empty(self._world.size, dtype=own.dtype)
        # A process waits here for slower ones, and notices a machine that is gone.
        self._world.wait(dist.all_gather_single(everyone, own, async_op=True))
        if (everyone != own).any():
            self._require_same_frozen(learning)
        if learning != self._learning:
            self._learning = learning
            self._chosen = [index for index, learns in enumerate(learning) if learns]
            self._flags = None
            if self._sharded:
                self._watch()
            else:
                self._buckets = list(self._divided())

    def expect(self, *, last: bool) -> None:
        """Announce a forward; gradients are communicated in the ``last`` backward of a step
        only."""
        if isinstance(self._model, FSDPModule):
            self._model.set_requires_gradient_sync(last)
            if last and self._model.gathered_dtype is not None:
                self._fill_missing_gradients()

    def finish(self, step: int, loss: Tensor, stop: bool) -> tuple[Tensor, Tensor]:
        """Average the gradients of ``step``. Returns the mean of ``loss`` and the number of
        processes that want to ``stop``, both 0-d on the device.

        NCCL collectives that are aborted because a process is gone return as if complete. So the
        last message counts the participating processes, and if one is missing, the loss of the step
        is made non-finite, so that the step changes nothing.

        Waits for the device only if this process lacks the gradient of a parameter that learns.
        Raises TrainingError for a gradient that cannot be summed.
        """
        if self._sharded:
            present = [self._seen.get(index, True) for index in self._chosen]
            self._seen = dict.fromkeys(self._seen, False)
        else:
            present = [self._parameters[index].grad is not None for index in self._chosen]
            self._require_dense_gradients()
        if self._flags is None or self._flags[0] != present:
            flags = torch.tensor(present, dtype=loss.dtype)
            self._flags = present, flags.to(loss.device, non_blocking=True)
        for bucket in self._buckets:
            self._sum(bucket)
        wanted, one = torch.full_like(loss, float(stop)), torch.ones_like(loss)
        message = torch.cat([torch.stack([loss / self._world.size, wanted, one]), self._flags[1]])
        dist.all_reduce(message)
        if not all(present):
            for index, count in zip(self._chosen, message[3:].tolist(), strict=True):
                if not count:
                    self._parameters[index].grad = None
        there = message[2]
        self._taken_part.append((step, there))
        return message[0] / (there == self._world.size), message[1]

    def first_lost(self) -> int | None:
        """The first step since the last :meth:`require_all` in which a process was missing, or
        None. No step from there on has changed anything. Waits for the device."""
        if not self._taken_part:
            return None
        steps, there = zip(*self._taken_part, strict=True)
        counts = zip(steps, torch.stack(there).tolist(), strict=True)
        return next((step for step, count in counts if count != self._world.size), None)

    def require_all(self) -> None:
        """Raise ProcessLostError if a process was missing in a step; waits for the device.
        Otherwise all steps taken so far are complete."""
        step = self.first_lost()
        if step is not None:
            self._world.liveness.require_others()
            raise lost_error(f"not all of them took part in step {step}")
        self._taken_part.clear()

    def _sum(self, bucket: list[int]) -> None:
        """Average the gradients of these parameters in one message, of which they become views."""
        parameters = [self._parameters[index] for index in bucket]
        flat = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
        )
        dist.all_reduce(flat, op=dist.ReduceOp.AVG)
        pieces = flat.split([p.numel() for p in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.grad = piece.view(parameter.shape)

    def _divided(self) -> Iterator[list[int]]:
        """Parameters that learn, in lists of one dtype of about BUCKET_BYTES each."""
        kinds = dict.fromkeys(self._parameters[index].dtype for index in self._chosen)
        for kind in kinds:
            bucket, size = [], 0
            for index in self._chosen:
                parameter = self._parameters[index]
                if parameter.dtype != kind:
                    continue
                bucket.append(index)
                size += parameter.numel() * parameter.element_size()
                if size >= BUCKET_BYTES:
                    yield bucket
                    bucket, size = [], 0
            if bucket:
                yield bucket

    def _watch(self) -> None:
        """Register hooks that record which parameters get a gradient: a sharded model has zeros for
        missing ones. All processes call this together."""
        numbers = {name: index for index, name in enumerate(self._names)}
        for prefix, module in self._model.named_modules():
            if not isinstance(module, FSDPModule):
                continue
            module.unshard()
            for name, parameter in module.named_parameters(prefix):
                index = numbers.get(name)
                # Parameters of a layer that is sharded separately belong to its own group.
                if index in self._seen or index is None or is_sharded(parameter):
                    continue
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(
                        partial(self._record_gradient, index)
                    )
                    self._seen[index] = False
            module.reshard()

    def _fill_missing_gradients(self) -> None:
        """Give a parameter without an accumulated gradient an fp32 gradient of zeros, if another
        parameter of its group has one. Otherwise its gradient in the last backward would have
        another dtype than the group's, and FSDP2 sends one dtype."""
        for module in self._model.modules():
            groups = (
                module._get_fsdp_state()._fsdp_param_groups
                if isinstance(module, FSDPModule)
                else ()
            )
            for group in groups:
                parts = [part for part in group.fsdp_params if part.sharded_param.requires_grad]
                lacking = [part for part in parts if part.unsharded_accumulated_grad is None]
                for part in lacking if len(lacking) < len(parts) else ():
                    part.unsharded_accumulated_grad = torch.zeros_like(
                        part._unsharded_param, dtype=part.reduce_dtype
                    )

    def _record_gradient(self, index: int, _: Tensor) -> None:
        self._seen[index] = True

    def _require_same_frozen(self, learning: list[bool]) -> None:
        everyone = self._world.gather(learning)
        for name, *states in zip(self._names, *everyone, strict=True):
            if len(set(states)) > 1:
                frozen = [str(rank) for rank, learns in enumerate(states) if not learns]
                raise TrainingError(
                    f"parameter {name} is frozen in process {', '.join(frozen)} and learns in the "
                    "others: all the processes of a run have to freeze the same"
                )

    def _require_dense_gradients(self) -> None:
        for index in self._chosen:
            gradient = self._parameters[index].grad
            if gradient is not None and gradient.layout != torch.strided:
                raise TrainingError(
                    f"the gradient of {self._names[index]} is {gradient.layout}: only dense ones "
                    "can be summed over the processes of a run"
                )
