"""Makes the entries of the manifests of runs and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from apt_core.device import gpu_name
from apt_core.kernel import Kernel
from apt_core.runs.folder import now, versions
from apt_core.runs.run_state import Progress


def run_manifest(
    status: str,
    kernel: Kernel,
    progress: Progress,
    *,
    data: Mapping[str, Any],
    device: torch.device,
    computes: Mapping[str, Any],
    world_size: int,
    parameters: int,
    failed_checkpoints: Sequence[str],
) -> dict[str, Any]:
    """The entries of a run's manifest.

    ``computes`` is what :func:`~apt_core.modeling.compilation.computes` says, ``parameters`` the
    number of the model's.
    """
    entries = {
        "status": status,
        "profile": kernel.config.name,
        "versions": versions(),
        "data": data,
        "device": str(device),
        "gpu": gpu_name(device),
        "computes": computes,
        "world_size": world_size,
        "parameters": parameters,
        "providers": [row.row() for row in kernel.registry.resolutions.values()],
        "plugins": plugin_rows(kernel),
        "timeline": [event.model_dump() for event in progress.timeline],
        "switches": [switch.model_dump() for switch in progress.transforms],
        "trainable": [stage.model_dump() for stage in progress.trainable],
        "changes": [change.model_dump() for change in progress.changes],
        "inactive_keys": [{"key": k.key, "reason": k.reason} for k in kernel.inactive],
        "step": progress.step,
        "failed_checkpoints": failed_checkpoints,
    }
    return entries if status == "running" else entries | {"ended": now()}


def plugin_rows(kernel: Kernel) -> list[dict[str, Any]]:
    """The plugins that were asked for, as manifests show them."""
    names = ("name", "dist", "version", "source_sha256", "state", "reason", "failures", "dropped")
    return [record.row(*names) for record in kernel.manager.records.values()]
