"""The plan of a run, without training: providers, costs, memory and the timeline of stages."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from apt_core.config import Config
from apt_core.data.batches import num_windows
from apt_core.data.tokens import tokenize
from apt_core.errors import AptError
from apt_core.failures import one_line
from apt_core.kernel import Kernel
from apt_core.providers.tokenizer import TokenizerProvider
from apt_core.training.blame import attributed
from apt_core.training.costs import ModelCost, model_cost, support_notices
from apt_core.training.distributed import sharding_of
from apt_core.training.footprint import Footprint
from apt_core.training.manifest import plugin_rows
from apt_core.training.memory import MemoryEstimate, estimate
from apt_core.training.plan_text import print_plan
from apt_core.training.prepare import build_tokenizer, settle_device

__all__ = ["make_plan", "print_plan", "processes"]

READ_UP_TO = 64 * 2**20
"""Bytes of a text that a plan reads, to tell the steps of an epoch."""


def make_plan(kernel: Kernel, world_size: int | None = None) -> dict[str, Any]:
    """The plan as JSON values, with the keys profile, device, providers, plugins, inactive_keys,
    notices, model, batch and stages.

    ``model`` has the parts of the model with their costs, as :mod:`apt_core.training.costs` counts
    them; what a provider cannot tell is null there, with a notice. ``batch`` says what a step takes
    and how many make an epoch, null where the text is not at hand or is large. A stage has the
    ``memory`` of one process, in bytes, as :mod:`apt_core.training.memory` counts it, for
    ``world_size`` processes (by default those that ``hardware`` asks for) on the device that the
    profile names. No value of the model is computed, so that a large profile is planned in seconds;
    providers are probed as at the start of a run. Raises ConfigError as a run would.
    """
    if world_size is None:
        world_size = processes(kernel.config)
    device = settle_device(kernel)
    try:
        for kind, name in kernel.named_providers():
            kernel.registry.get(kind, name)
        tokenizer = build_tokenizer(kernel)
        cost = model_cost(kernel)
        footprint = Footprint(kernel)
        memory = estimate(footprint, world_size, sharding_of(kernel.config, world_size))
        batch = _batch(kernel, tokenizer, world_size)
    except Exception as error:
        known = attributed(kernel, error)
        if known is error:
            raise
        raise known from error
    return {
        "profile": kernel.config.name,
        "device": str(device),
        "providers": [row.row() for row in kernel.registry.resolutions.values()],
        "plugins": [_at_the_start(kernel, row) for row in plugin_rows(kernel)],
        "inactive_keys": [{"key": k.key, "reason": k.reason} for k in kernel.inactive],
        "notices": [
            *kernel.notices,
            *support_notices(kernel, device),
            *cost.notes,
            *footprint.notes,
        ],
        "model": cost.row(),
        "batch": batch,
        "stages": [_stage(cost, memory, **at) for at in _positions(kernel)],
    }


def _at_the_start(kernel: Kernel, row: dict[str, Any]) -> dict[str, Any]:
    """A plugin's row with the state in which the run begins."""
    enabled = kernel.schedule.should_enable_plugin(row["name"], epoch=1, step=1, tokens=0)
    if row["state"] == "active" and not enabled:
        return {**row, "state": "dormant", "reason": "waits for its schedule"}
    return row


def _positions(kernel: Kernel) -> Iterable[dict[str, Any]]:
    """The start, and each moment at which a plugin becomes enabled or disabled."""
    yield {"name": "start", "unit": "epoch", "at": 1}
    for boundary in kernel.schedule.boundaries():
        if kernel.manager.has_plugin(boundary.plugin):
            verb = "enable" if boundary.enables else "disable"
            name = f"{verb} {boundary.plugin}"
            yield {"name": name, "unit": boundary.unit, "at": boundary.at}


def processes(config: Config) -> int:
    """How many processes the profile asks for."""
    return max(1, config.hardware.num_gpus) if config.hardware.distributed else 1


def _batch(kernel: Kernel, tokenizer: TokenizerProvider, world_size: int) -> dict[str, Any]:
    """What one optimizer step takes, and how many make an epoch."""
    config, training = kernel.config, kernel.config.training
    length = config.seq_len
    sequences = training.batch_size * training.grad_accum_steps * world_size
    windows = _windows(kernel, tokenizer, length)
    return {
        "sequences_per_step": sequences,
        "tokens_per_step": sequences * length,
        "steps_per_epoch": windows and -(-windows // sequences),
    }


def _windows(kernel: Kernel, tokenizer: TokenizerProvider, length: int) -> int | None:
    """The sequences of the training text; None where it would take long to tell, or fails."""
    data = kernel.config.data
    if data.text_source is None:
        paths = [Path(path) for path in (data.train_path, data.val_path) if path]
        if not all(path.is_file() and path.stat().st_size <= READ_UP_TO for path in paths):
            return None
    try:
        text = kernel.registry.get("dataset", data.text_source or data.loader, data).load()
    except (AptError, OSError, ValueError) as error:
        kernel.notices.append(f"data: {one_line(error)}")
        return None
    return num_windows(len(tokenize(tokenizer, text.train)), length)


def _stage(
    cost: ModelCost, memory: MemoryEstimate, name: str, unit: str, at: int
) -> dict[str, Any]:
    return {
        "name": name,
        "epoch": at if unit == "epoch" else None,
        "step": at if unit == "step" else None,
        "token": at if unit == "token" else None,
        "params_total": cost.params,
        "params_active": cost.params,
        "memory": memory.row(),
        "memory_mb": round(memory.total / 2**20, 1),
        "flops_per_token": cost.flops_per_token,
        "kv_cache_bytes_per_token": cost.kv_cache_bytes_per_token,
        "kv_cache_bytes_per_sequence": cost.kv_cache_bytes_per_sequence,
    }
