"""Estimates the memory of each process of a run, and the largest batch that fits."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from apt_core.device import available_memory
from apt_core.error_text import one_line
from apt_core.errors import TrainingError
from apt_core.kernel import Kernel
from apt_core.modeling.structure import structure_after
from apt_core.parallel.gradient_sum import BUCKET_BYTES
from apt_core.parallel.world import Sharding, World, local_part
from apt_core.planning.footprint import Footprint, Weights, count_bytes
from apt_core.planning.stages import plugin_costs

MOST_PROCESSES = 1024


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that each of ``world_size`` processes needs, by what they are for.

    ``ema`` are averages of the weights that the run and its plugins keep. ``activations`` are the
    peak of a micro-batch's forward and backward, or of the optimizer's step if that is higher; if
    None, they could not be measured and are not in the total. ``buffers`` are tensors that
    distribution duplicates or gathers. ``snapshot`` is the copy from which a checkpoint is written,
    for a run on a CPU; a run on a GPU keeps it in the host's memory
    (:mod:`apt_core.training.host_copies`).
    """

    world_size: int
    sharding: Sharding
    batch_size: int
    grad_accum_steps: int
    parameters: int
    gradients: int
    optimizer: int
    ema: int
    activations: int | None
    buffers: int
    snapshot: int

    @property
    def total(self) -> int:
        kept = self.parameters + self.gradients + self.optimizer + self.ema
        return kept + (self.activations or 0) + self.buffers + self.snapshot

    def row(self) -> dict[str, Any]:
        """The row of the plan."""
        return {**asdict(self), "total": self.total}


def estimate(
    footprint: Footprint,
    world_size: int = 1,
    sharding: Sharding = "none",
    *,
    batch_size: int | None = None,
    grad_accum_steps: int | None = None,
) -> MemoryEstimate:
    """The memory of one process, by default with the profile's batch.

    An upper bound, too high by at most the gradients: with one micro-batch per step gradients grow
    while activations are freed.
    """
    training, weights = footprint.config.training, footprint.weights
    size = training.batch_size if batch_size is None else batch_size
    micro_batches = training.grad_accum_steps if grad_accum_steps is None else grad_accum_steps
    state, workspace = footprint.optimizer
    parts = world_size if sharding == "fsdp" else 1
    activations = footprint.activations(size, gathered=parts > 1)

    def share(count: int) -> int:
        return -(-count // parts)

    # Gradients are not communicated between the micro-batches of a step, so every process holds
    # its own gradients unsharded.
    whole = micro_batches > 1 and world_size > 1
    parameters, gradients = share(weights.parameters), share(weights.trainable)
    buffers = together = 0
    if sharding == "fsdp":
        gradients = weights.trainable if whole else gradients
        buffers = _gathered(weights, footprint.dtype) if parts > 1 else 0
    elif sharding == "ddp":
        # One bucket of gradients, after the activations are freed.
        together = min(
            weights.trainable, BUCKET_BYTES + max(weights.outside, weights.largest_layer)
        )
    ema = parameters * ((training.ema_decay is not None) + footprint.costs.averages)
    return MemoryEstimate(
        world_size=world_size,
        sharding=sharding,
        batch_size=size,
        grad_accum_steps=micro_batches,
        parameters=parameters + weights.tables,
        gradients=gradients,
        optimizer=share(state),
        ema=ema,
        activations=None if activations is None else max(activations, share(workspace), together),
        buffers=buffers,
        snapshot=parameters + share(state) + ema if footprint.device.type == "cpu" else 0,
    )


def switch_memory(
    old: Footprint, new: Footprint, before: MemoryEstimate, after: MemoryEstimate
) -> int:
    """Bytes that each process needs at most while the structure of ``new`` takes the place of that
    of ``old``; ``before`` and ``after`` are their estimates.

    The old weights and optimizer state, without gradients, stay throughout. Both models compute a
    loss with its activations; then the new optimizer state and averages are made, except for state
    that is carried unchanged. A parameter made by a rule exists twice for a moment.
    """
    lasting = before.parameters + before.optimizer + before.ema + before.snapshot
    lasting += max(before.buffers, after.buffers)
    shapes = {name: p.shape for name, p in old.structure.named_parameters()}
    parameters = dict(new.structure.named_parameters())
    changed = {name: p for name, p in parameters.items() if shapes.get(name) != p.shape}
    largest = max((p.nbytes for p in changed.values()), default=0)
    state = after.optimizer
    if after.sharding != "fsdp":
        kept = count_bytes(p for name, p in parameters.items() if name not in changed)
        state -= before.optimizer * kept // max(1, old.weights.parameters)
    made = max(new.trial(after.batch_size), largest, state + after.ema + largest)
    return lasting + max(old.trial(before.batch_size), after.parameters + made)


def needed(footprint: Footprint, now: MemoryEstimate, after: Footprint | None) -> int:
    """The bytes of ``now``, the estimate of ``footprint``; with ``after`` the largest of these, the
    bytes of the switch to that structure, and those of training it."""
    if after is None:
        return now.total
    then = estimate(
        after,
        now.world_size,
        now.sharding,
        batch_size=now.batch_size,
        grad_accum_steps=now.grad_accum_steps,
    )
    return max(now.total, then.total, switch_memory(footprint, after, now, then))


def _gathered(weights: Weights, dtype: torch.dtype | None) -> int:
    """The most bytes of parameters that FSDP2 holds gathered: those outside the layers, from the
    forward to the backward, and those of two layers, the present and the prefetched one, in the
    dtype of autocast."""
    layer = weights.largest_layer
    if dtype is not None:
        layer = layer * dtype.itemsize // torch.float32.itemsize
    return weights.outside + 2 * layer


def fitting_batch(
    footprint: Footprint,
    available: int,
    world_size: int = 1,
    sharding: Sharding = "none",
    *,
    below: int | None = None,
    after: Footprint | None = None,
) -> MemoryEstimate | None:
    """The largest micro-batch that fits into ``available`` bytes, and the number of them with the
    same global batch; of fewer than ``below`` sequences, if given.
    With ``after`` the switch to that structure and its training fit too.

    None if not even a single sequence fits.
    """
    training = footprint.config.training
    most = training.batch_size if below is None else below - 1
    sizes = [size for size in range(1, most + 1) if training.batch_size % size == 0]
    best, low, high = None, 0, len(sizes)
    while low < high:
        middle = (low + high) // 2
        size = sizes[middle]
        tried = estimate(
            footprint,
            world_size,
            sharding,
            batch_size=size,
            grad_accum_steps=training.grad_accum_steps * (training.batch_size // size),
        )
        if needed(footprint, tried, after) <= available:
            best, low = tried, middle + 1
        else:
            high = middle
    return best


def out_of_memory_advice(
    kernel: Kernel,
    world_size: int,
    sharding: Sharding,
    available: int,
    *,
    device: torch.device | None = None,
    switched_by: Sequence[str] = (),
    switching: str = "",
) -> str:
    """What to change so that the run fits into ``available`` bytes a process, in one line.

    ``device`` is the run's device if it differs from the profile's; ``switched_by`` are the plugins
    that have changed the model so far, and ``switching`` is the one that was changing it.
    """
    active = [r.name for r in kernel.manager.records.values() if r.state == "active"]

    def footprint_after(*more: str) -> Footprint:
        structure = structure_after(kernel, [*switched_by, *more])
        return Footprint(kernel, device, structure, plugin_costs(kernel, [*active, *more]))

    footprint = footprint_after()
    after = footprint_after(switching) if switching else None
    training = kernel.config.training
    now = estimate(footprint, world_size, sharding)
    if now.activations is None:
        return f"{gib(available)} are there: try a training.batch_size below {training.batch_size}"
    total = needed(footprint, now, after)
    have = f"about {gib(total)} are needed and {gib(available)} are there"
    if total <= available:
        have += ", part of which other programs, plugins or libraries take"
    fitting = fitting_batch(
        footprint, available, world_size, sharding, below=training.batch_size, after=after
    )
    if fitting is None:
        return f"{have}; {_beyond_the_batch(footprint, world_size, sharding, available, after)}"
    size, steps = fitting.batch_size, fitting.grad_accum_steps
    return (
        f"{have}; training.batch_size {size} with training.grad_accum_steps {steps} (the same "
        f"global batch) needs {gib(needed(footprint, fitting, after))}: "
        f"--training.batch_size {size} --training.grad_accum_steps {steps}"
    )


def _beyond_the_batch(
    footprint: Footprint,
    world_size: int,
    sharding: Sharding,
    available: int,
    after: Footprint | None,
) -> str:
    """Advice for a run that does not fit with any micro-batch."""

    def total(count: int, sharding: Sharding) -> int:
        return needed(footprint, estimate(footprint, count, sharding, batch_size=1), after)

    options = ["a smaller model", f"a data.max_length below {footprint.config.seq_len}"]
    count = 2
    while count <= MOST_PROCESSES:
        if count > world_size and total(count, "fsdp") <= available:
            options.append(
                f"hardware.distributed fsdp over {count} processes, each with as much memory "
                f"(training.batch_size 1 then needs {gib(total(count, 'fsdp'))})"
            )
            break
        count *= 2
    alone = gib(total(world_size, sharding))
    return (
        f"training.batch_size 1 needs {alone}, so that a smaller one alone does not "
        f"help; what does is {', or '.join(options)}"
    )


def own_memory(model: nn.Module) -> int:
    """Bytes of the parameters and buffers of ``model`` in this process."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(local_part(tensor.detach()).nbytes for tensor in tensors)


def gib(count: int) -> str:
    """
    >>> gib(9_771_050_598), gib(52_428_800)
    ('9.1 GiB', '50 MiB')
    """
    return f"{count / 2**30:.1f} GiB" if count >= 2**29 else f"{count / 2**20:.0f} MiB"


def out_of_memory(
    error: BaseException,
    when: str,
    kernel: Kernel,
    world: World,
    device: torch.device,
    held: int,
    *,
    switched_by: Sequence[str] = (),
    switching: str = "",
) -> TrainingError:
    """The TrainingError for ``error``, an out-of-memory error, with advice on what would fit beside
    the ``held`` bytes of others. Frees what the traceback refers to. The plugins ``switched_by``
    have changed the model, ``switching`` was about to."""
    traceback.clear_frames(error.__traceback__)  # its frames hold the activations
    here = 1 if device.type == "cuda" else world.on_this_machine
    available = max(0, available_memory(device) - held) // here
    try:
        advice = out_of_memory_advice(
            kernel,
            world.size,
            world.sharding,
            available,
            device=device,
            switched_by=switched_by,
            switching=switching,
        )
    except Exception as failure:
        advice = f"what would fit cannot be told ({one_line(failure)})"
    return TrainingError(f"out of memory {when}: {advice}")
