"""Keeps the manifest of a run up to date."""

from __future__ import annotations

from typing import Any

from apt_core.modeling.compilation import computes
from apt_core.runs.folder import RunFolder
from apt_core.runs.manifest import run_manifest
from apt_core.training.context import RunContext
from apt_core.training.saving import Saving


class ManifestWriter:
    """Writes the present state of the run into its manifest."""

    def __init__(self, run: RunContext, folder: RunFolder, saving: Saving) -> None:
        self._run, self._folder, self._saving = run, folder, saving

    def write(self, status: str, **entries: Any) -> None:
        """Rewrite the manifest with ``status`` and further ``entries``."""
        device, dtype = self._run.parts.device, self._run.parts.dtype
        compilation = self._run.trained.forward.compilation
        manifest = run_manifest(
            status,
            self._run.kernel,
            self._run.progress,
            data=self._run.parts.data.row(),
            device=device,
            computes=computes(self._run.kernel.config, device, dtype, compilation),
            world_size=self._run.world.size,
            parameters=self._run.trained.num_parameters,
            failed_checkpoints=self._saving.failures,
        )
        self._folder.write_manifest(**manifest, **entries)
