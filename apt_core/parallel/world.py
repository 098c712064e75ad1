"""One run in several processes: data parallel, or sharded by FSDP2, started by --nproc or torchrun.

Every process runs the same code on its own micro-batches. The processes agree through
:class:`World` (on the run's folder, or on quarantined plugins) and sum their gradients once a step
through :class:`~apt_core.parallel.gradient_sum.GradientSum`. In a run of one process nothing here
communicates.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, TypeVar, cast
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from apt_core.config import Config, InactiveKey
from apt_core.config.differences import differences
from apt_core.error_text import text_of
from apt_core.errors import AptError, ConfigError, Problem, TrainingError
from apt_core.parallel.liveness import Liveness, lost_error

Value = TypeVar("Value")

Sharding = Literal["none", "ddp", "fsdp"]

PATIENCE = timedelta(minutes=30)
"""How long a process waits for others that are alive: they may be tokenizing or writing a large
file. :class:`~apt_core.parallel.liveness.Liveness` notices dead ones earlier."""

ERROR_HANDLING, CLEAN_UP_ONLY = "TORCH_NCCL_ASYNC_ERROR_HANDLING", "2"
"""By default torch kills a process on an NCCL error, before it can write a checkpoint. With this
setting torch only aborts the communication of the process."""

WAIT = timedelta(seconds=1)
"""How long a process waits between checks whether the others are alive."""

MOMENT = 5.0
"""Seconds within which processes that fail for the same reason reach the same place."""

POLL_SECONDS = 0.05

NCCL_SIGNS = ("remote process exited", "communicator was aborted")
"""Texts in the errors of NCCL and torch after a process has ended or communication was aborted."""

STORE_VARIABLE = "APT_STORE"
"""Environment variable with the path of the file store of processes that --nproc has started.
Processes of torchrun use the store at MASTER_ADDR instead."""


@dataclass(frozen=True)
class World:
    """The processes of a run. ``local_rank`` is the rank among the ``on_this_machine`` processes of
    this machine, whose ranks are consecutive."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    on_this_machine: int = 1
    sharding: Sharding = "none"
    liveness: Liveness = field(default_factory=Liveness, repr=False, compare=False)

    @classmethod
    def from_environment(cls, config: Config, environment: Mapping[str, str]) -> World:
        """Read the ranks that --nproc or torchrun set in ``environment``. Raises ConfigError for
        values that are no numbers."""
        try:
            rank, size, local_rank, here = (
                int(environment.get(name, default))
                for name, default in (
                    ("RANK", "0"),
                    ("WORLD_SIZE", "1"),
                    ("LOCAL_RANK", "0"),
                    ("LOCAL_WORLD_SIZE", "1"),
                )
            )
        except ValueError as error:
            raise ConfigError(
                f"RANK, WORLD_SIZE and LOCAL_RANK are not torchrun's: {error}"
            ) from None
        if size == 1:
            return cls()
        return cls(rank, size, local_rank, here, sharding_of(config, size))

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and logs for all."""
        return self.rank == 0

    @contextmanager
    def joined(self, device: torch.device, backend: str | None = None) -> Iterator[None]:
        """Connect the processes while the context lasts."""
        if self.size == 1 or dist.is_initialized():
            yield
            return
        chosen = backend or ("nccl" if device.type == "cuda" else "gloo")
        # Checkpoints are gathered on the CPU, so Gloo is needed beside NCCL.
        both = chosen if chosen != "nccl" else "cpu:gloo,cuda:nccl"
        os.environ.setdefault(ERROR_HANDLING, CLEAN_UP_ONLY)
        if STORE_VARIABLE in os.environ:
            store = shared_store()
            store.set_timeout(PATIENCE)
            dist.init_process_group(
                both, timeout=PATIENCE, store=store, rank=self.rank, world_size=self.size
            )
        else:
            dist.init_process_group(both, timeout=PATIENCE)
        try:
            # Names the run, since the store may have served an earlier one.
            everyone = self.gather((uuid4().hex, os.getpid()))
            first = self.rank - self.local_rank
            here = range(first, first + self.on_this_machine)
            pids = [pid if rank in here else None for rank, (_, pid) in enumerate(everyone)]
            with self.liveness.watching(shared_store, everyone[0][0], self.rank, pids):
                yield
        except RuntimeError as error:
            known = explained(error)
            if known is error:
                raise
            raise known from error
        finally:
            dist.destroy_process_group()

    # The model -------------------------------------------------------------------------------

    def shard(
        self,
        model: nn.Module,
        layers: Iterable[nn.Module],
        device: torch.device,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Shard the parameters of ``model`` in place if the run uses FSDP2.

        Each of its ``layers`` is one FSDP group, the rest of the model another. Layers are gathered
        in ``dtype``, the dtype of autocast, or with None in that of the parameters; with ``dtype``
        the model always computes under autocast. Shards, the reduction of gradients, the residual
        stream between layers and everything outside the layers stay in fp32.
        """
        if self.sharding != "fsdp":
            return
        mesh = init_device_mesh(device.type, (self.size,))
        # Casting inputs would turn the whole residual stream into ``dtype``.
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        for layer in layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy if dtype else MixedPrecisionPolicy())
        fully_shard(model, mesh=mesh)
        if dtype is not None:
            model.forward = torch.autocast(device.type, dtype)(model.forward)
        model.gathered_dtype = dtype
        # A parameter may have a gradient in some processes only.
        cast(FSDPModule, model).set_reduce_scatter_unused_params(True)

    @torch.no_grad()
    def replicate(self, model: nn.Module) -> None:
        """Copy the first process's parameters and buffers to the others, if each holds the whole
        model."""
        if self.sharding == "ddp":
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, src=0)

    def reshard(self, model: nn.Module) -> None:
        """Free the parameters that a forward without a backward has gathered: until then the
        parameters of a sharded model are not the optimizer's."""
        if isinstance(model, FSDPModule):
            model.reshard()

    # Agreement -------------------------------------------------------------------------------

    def gather(self, value: Value) -> list[Value]:
        """The ``value`` of every process, ordered by rank."""
        if self.size == 1:
            return [value]
        self.liveness.require_others()
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def wait(self, work: dist.Work) -> None:
        """Wait for a collective on the CPU. Raises ProcessLostError once another process is lost,
        which Gloo may not notice."""
        while True:
            self.liveness.require_others()
            try:
                work.wait(WAIT)
                return
            except RuntimeError:
                if work.is_completed():
                    work.wait()  # returns if it has completed meanwhile, or raises its error
                    return

    def any(self, flag: bool) -> bool:
        """Whether any process passed true."""
        return any(self.gather(flag))

    def all_at(self, place: str) -> bool:
        """Whether all processes call this with the same ``place`` within some seconds. Unlike a
        barrier it returns when a process is gone, with the same result for late callers."""
        store, key = shared_store(), f"apt/at/{place}"
        until = time.monotonic() + MOMENT
        count = store.add(key, 1)
        while 0 < count < self.size and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
            count = store.add(key, 0)
        if count != self.size:
            store.add(key, -2 * self.size)
        return bool(count == self.size)

    def require_alike(self, facts: Mapping[str, Any]) -> None:
        """Raise ConfigError in every process if ``facts`` (a nested mapping) differ between them:
        their gradients would belong to different models or texts."""
        everyone = self.gather(dict(facts))
        problems = [
            Problem(
                f"{there!r} in process {rank}, {here!r} in process 0",
                key=key,
                hint="all the processes of a run need the same",
            )
            for rank, others in enumerate(everyone)
            for key, here, there in differences(everyone[0], others)
        ]
        if problems:
            raise ConfigError(problems)

    def from_first(
        self, function: Callable[[], Value], group: dist.ProcessGroup | None = None
    ) -> Value:
        """Call ``function`` in the first process and return its result in all.

        Its error is raised in every process: an AptError or OSError unchanged, another one as a
        TrainingError.
        """
        if self.size == 1:
            return function()
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = function()
            except (AptError, OSError) as problem:
                outcome[1] = problem
            except Exception as problem:
                text = "".join(traceback.format_exception_only(problem)).strip()
                outcome[1] = TrainingError(text)
        dist.broadcast_object_list(outcome, src=0, group=group)
        value, error = outcome
        if error is not None:
            raise error
        return value


ALONE = World()


def sharding_of(config: Config, world_size: int) -> Sharding:
    """How a run of ``world_size`` processes divides the model."""
    if world_size == 1:
        return "none"
    return "fsdp" if config.hardware.distributed == "fsdp" else "ddp"


def inactive_alone(config: Config) -> Iterator[InactiveKey]:
    """The keys that do nothing in a run of one process."""
    reason = "the run has one process: start it with --nproc N, or with torchrun"
    if config.hardware.distributed:
        yield InactiveKey("hardware.distributed", reason)
    if config.hardware.backend is not None:
        yield InactiveKey("hardware.backend", reason)


def shared_store() -> dist.Store:
    """The key-value store through which the processes have found each other.

    It outlives them if :func:`has_lasting_store`. Raises RuntimeError once it is gone.
    """
    file = os.environ.get(STORE_VARIABLE)
    if file:
        return dist.FileStore(
            file, -1
        )  # with an unknown number of users, so that none deletes the file
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(*place, is_master=False, timeout=timedelta(seconds=10))


def has_lasting_store() -> bool:
    """Whether the launcher, such as --nproc or torchrun, keeps the store after a process ends."""
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return agent or STORE_VARIABLE in os.environ


def explained(error: BaseException) -> BaseException:
    """``error``, or a ProcessLostError in place of a collective's error about a lost process."""
    text = text_of(error)
    if "/gloo/" in text:
        # torch's form: "[source file] what happened. Some advice."
        text = text.partition("] ")[2].partition(". ")[0]
    elif not any(sign in text for sign in NCCL_SIGNS):
        return error
    return lost_error(text)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of ``tensor``."""
    return isinstance(tensor, DTensor)


def whole_tensor(tensor: Tensor) -> Tensor:
    """``tensor``, gathered if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_part(tensor: Tensor) -> Tensor:
    """This process's part of ``tensor``, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(whole: Tensor, like: Tensor) -> Tensor:
    """``whole``, which all processes have, sharded as ``like`` is."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(
        whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


@torch.no_grad()
def fill(target: Tensor, whole: Tensor) -> None:
    """Copy ``whole`` into ``target``, of which each process may hold a part."""
    target.copy_(shard_like(whole, target))
