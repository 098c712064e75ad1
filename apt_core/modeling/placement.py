"""Chooses the device and CPU threads of a run, and probes which layers work there."""

from __future__ import annotations

from typing import Any

import torch

from apt_core.config import Config
from apt_core.device import reason_gpu_unused, resolve_device
from apt_core.errors import ConfigError
from apt_core.kernel import Kernel
from apt_core.kinds import KINDS
from apt_core.modeling.probe import probe_layer
from apt_core.parallel.world import ALONE, World

ONE_THREAD_BELOW = 2**23
"""Multiply-adds of one feed-forward matrix in a micro-batch, below which one thread is used: a
second one would gain a quarter on an idle machine and cost a multiple on a busy one."""


def num_threads(config: Config) -> int | None:
    """The number of CPU threads, or None for torch's choice. It depends on the profile only, since
    the last bits of results depend on it."""
    if config.hardware.num_threads is not None:
        return config.hardware.num_threads
    model, length = config.model, config.seq_len
    work = config.training.batch_size * length * model.d_model * model.d_ff
    return 1 if work < ONE_THREAD_BELOW else None


def settle_device(kernel: Kernel, world: World = ALONE) -> torch.device:
    """Choose the run's device, and let the registry probe layers on it.

    Each process on a machine with GPUs has its own GPU; too few of them are a ConfigError. A
    missing device is replaced by the CPU with a notice, or is a ConfigError under ``strict``.
    """
    asked = kernel.config.hardware.device
    device, reason = resolve_device(asked)
    if reason:
        message = f"hardware.device: {asked} not usable ({reason})"
        if kernel.manager.strict:
            raise ConfigError(message, hint="--strict allows no fallback")
        kernel.notices.append(f"{message}: using {device.type}")
    elif asked == "auto" and device.type == "cpu" and (why := reason_gpu_unused()):
        kernel.notices.append(f"using the CPU, though this machine has a GPU: {why}")
    if device.type == "cuda" and world.size > 1:
        device = _own_gpu(asked, world)
    kernel.registry.probe = layer_probe(kernel, device)
    return device


def _own_gpu(asked: str, world: World) -> torch.device:
    """The GPU of this process. With torchrun or --nproc all processes on the machine raise the same
    ConfigError, or none."""
    # Other launchers may set LOCAL_RANK only.
    processes = max(world.on_this_machine, world.local_rank + 1)
    there = torch.cuda.device_count()
    if ":" in asked and processes > 1:
        message = f"{asked} is one GPU, and {processes} processes on this machine need one each"
        raise ConfigError(
            message, key="hardware.device", hint="hardware.device: cuda gives each its own"
        )
    if ":" in asked:
        return torch.device(asked)
    if processes > there:
        message = f"{processes} processes on this machine need a GPU each; it has {there}"
        hint = f"--nproc {there} takes what there is, hardware.device: cpu none"
        if there == 1:
            hint += "; processes that each see a GPU of their own need LOCAL_RANK=0"
            hint += " and LOCAL_WORLD_SIZE=1"
        raise ConfigError(message, key="hardware.device", hint=hint)
    return torch.device("cuda", world.local_rank)


def layer_probe(kernel: Kernel, device: torch.device) -> Any:
    """The registry's probe: one tiny forward and backward of a layer on the run's device."""
    model = kernel.config.model

    def probe(spec: Any, provider: Any, config: Any) -> str | None:
        if not KINDS[spec.kind].probed:
            return None
        position = None
        if spec.kind == "attention" and model.position_name != "none":
            position = kernel.registry.get("position", model.position_name)
        # A plan is made under the meta device; the probe needs values.
        with torch.device("cpu"):
            return probe_layer(
                provider,
                spec.kind,
                device=device,
                head_dim=max(1, model.d_model // model.num_heads),
                position=position,
            )

    return probe
