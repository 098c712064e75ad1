"""Keeps the manifest of a run up to date."""

from __future__ import annotations

from typing import Any

from apt_core.kernel import Kernel
from apt_core.modeling.compilation import computes
from apt_core.parallel.world import World
from apt_core.runs.folder import RunFolder
from apt_core.runs.manifest import run_manifest
from apt_core.runs.run_state import Progress
from apt_core.training.prepare import Parts
from apt_core.training.saving import Saving
from apt_core.training.trained_model import TrainedModel


class ManifestWriter:
    """Writes the present state of the run into its manifest."""

    def __init__(
        self,
        kernel: Kernel,
        parts: Parts,
        world: World,
        progress: Progress,
        trained: TrainedModel,
        folder: RunFolder,
        saving: Saving,
    ) -> None:
        self._kernel, self._parts, self._world = kernel, parts, world
        self._progress, self._trained = progress, trained
        self._folder, self._saving = folder, saving

    def write(self, status: str, **entries: Any) -> None:
        """Rewrite the manifest with ``status`` and further ``entries``."""
        device, dtype = self._parts.device, self._parts.dtype
        compilation = self._trained.forward.compilation
        manifest = run_manifest(
            status,
            self._kernel,
            self._progress,
            data=self._parts.data.row(),
            device=device,
            computes=computes(self._kernel.config, device, dtype, compilation),
            world_size=self._world.size,
            parameters=self._trained.num_parameters,
            failed_checkpoints=self._saving.failures,
        )
        self._folder.write_manifest(**manifest, **entries)
