"""How much memory each process of a run needs, and which batch fits into what there is."""

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

    ``ema`` are the averages of the weights that the run and its plugins keep.
    ``activations`` are the most that the forward and backward of one micro-batch, or else the
    optimizer's step, hold beside the rest; None where that could not be measured, and then not in
    the total. ``buffers`` are what distribution holds twice or whole, ``snapshot`` the copy from
    which a checkpoint is written in the background, where the run itself is on a CPU (that of a run
    on a GPU is in the host's memory, :mod:`apt_core.training.host_copies`).
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
        """As the plan shows it."""
        return {**asdict(self), "total": self.total}


def memory_per_rank(
    kernel: Kernel, world_size: int = 1, sharding: Sharding = "none"
) -> MemoryEstimate:
    """What each of ``world_size`` processes of the profile's run needs."""
    return estimate(Footprint(kernel), world_size, sharding)


def estimate(
    footprint: Footprint,
    world_size: int = 1,
    sharding: Sharding = "none",
    *,
    batch_size: int | None = None,
    grad_accum_steps: int | None = None,
) -> MemoryEstimate:
    """The memory of one process, by default with the profile's batch.

    An upper bound, by up to the gradients: with one micro-batch a step they grow while activations
    go.
    """
    training, weights = footprint.config.training, footprint.weights
    size = training.batch_size if batch_size is None else batch_size
    micro_batches = training.grad_accum_steps if grad_accum_steps is None else grad_accum_steps
    state, workspace = footprint.optimizer
    parts = world_size if sharding == "fsdp" else 1
    activations = footprint.activations(size, gathered=parts > 1)

    def share(count: int) -> int:
        return -(-count // parts)

    # Between the micro-batches of a step nothing is communicated: each process then has its own
    # gradients whole.
    whole = micro_batches > 1 and world_size > 1
    parameters, gradients = share(weights.parameters), share(weights.trainable)
    buffers = together = 0
    if sharding == "fsdp":
        gradients = weights.trainable if whole else gradients
        buffers = _gathered(weights, footprint.dtype) if parts > 1 else 0
    elif sharding == "ddp":
        # A message, once the activations are gone.
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

    What lasts of the old one, without gradients, is there throughout. Both are tried, each with the
    activations of a loss; then the new optimizer's state is made, and the averages, but for state
    that stays as it is. What a rule makes of a parameter is there twice for a moment.
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
    """The bytes of ``now``, which is of ``footprint``, or, with ``after``, of it and of the switch
    to that structure and the training of it, whichever are more."""
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
    """What FSDP2 holds whole at most: the parameters outside the layers, from the forward to the
    backward, and of two layers, the one at work and the one that is fetched meanwhile, both in the
    type of autocast."""
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
    """The largest micro-batch that fits into ``available`` bytes, with so many more of them that
    the batch of a step stays what it is; one of less than ``below`` sequences, where that is given.
    With ``after`` the switch to that structure fits too, and what is trained then.

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

    ``device`` is the run's, where that is not the one which the profile names; ``switched_by`` are
    the plugins that have changed the model so far, and ``switching`` is the one that was changing
    it.
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
    """What helps where a smaller micro-batch does not."""

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
    """Bytes of the parameters and buffers that this process holds of ``model``."""
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
    """What to raise for ``error``, after letting go of what it kept: that memory ran out, and what
    would fit beside the ``held`` bytes of others. The plugins ``switched_by`` have changed the
    model, ``switching`` was about to."""
    traceback.clear_frames(error.__traceback__)  # the activations are there
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
