"""What the manifests of runs and checkpoints say of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from apt_core.device import gpu_name
from apt_core.kernel import Kernel
from apt_core.modeling.compilation import computes
from apt_core.runs.folder import now, versions

if TYPE_CHECKING:
    from apt_core.training.trainer import Trainer


def write_manifest(trainer: Trainer, status: str, **entries: Any) -> None:
    """Bring the run's manifest up to date."""
    kernel = trainer.kernel
    trainer.folder.write_manifest(
        status=status,
        profile=trainer.config.name,
        versions=versions(),
        data=trainer.parts.data,
        device=str(trainer.device),
        gpu=gpu_name(trainer.device),
        computes=computes(
            trainer.config, trainer.device, trainer.parts.dtype, trainer.parts.forward.compilation
        ),
        world_size=trainer.world_size,
        parameters=sum(parameter.numel() for parameter in trainer.model.parameters()),
        providers=[row.row() for row in kernel.registry.resolutions.values()],
        plugins=plugin_rows(kernel),
        timeline=trainer.timeline,
        switches=trainer.switching.switches,
        changes=trainer.changes,
        inactive_keys=[{"key": k.key, "reason": k.reason} for k in kernel.inactive],
        step=trainer.step,
        failed_checkpoints=trainer.saving.failures,
        **({} if status == "running" else {"ended": now()}),
        **entries,
    )


def plugin_rows(kernel: Kernel) -> list[dict[str, Any]]:
    """The plugins that were asked for, as manifests show them."""
    return [
        {
            "name": record.name,
            "dist": record.dist,
            "version": record.version,
            "source_sha256": record.source_sha256,
            "state": record.state,
            "reason": record.reason,
            "failures": record.failure_rows(),
        }
        for record in kernel.manager.records.values()
    ]
