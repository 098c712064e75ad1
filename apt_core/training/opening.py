"""The folder of a run, made or taken up again, from the start of the run to its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from apt_core.device import gpu_name
from apt_core.errors import ConfigError, Problem
from apt_core.kernel import before_the_run
from apt_core.log import Backlog, get_logger, logging_to
from apt_core.modeling.blame import naming_authors
from apt_core.modeling.compilation import computes, computes_in_words
from apt_core.paths import user_path
from apt_core.runs import checkpoint
from apt_core.runs.checkpoint import Checkpoint
from apt_core.runs.folder import RunFolder, newest_folder, now
from apt_core.runs.manifest import write_manifest
from apt_core.training.restoring import named_checkpoint, restore
from apt_core.training.saving import Saving

if TYPE_CHECKING:
    from apt_core.training.trainer import Trainer

log = get_logger("apt.checkpoint")


class Opening:
    """What was said of the run's folder: ``output``, ``resume`` and ``resume_from``.

    Of several processes the first one opens the folder, and the others are told where it is.
    """

    def __init__(
        self, output: str | Path | None, resume: bool, resume_from: str | Path | None
    ) -> None:
        self._output = user_path(output) if output is not None else None
        self._resume = resume
        self._resume_from = user_path(resume_from) if resume_from is not None else None
        self._folder: RunFolder | None = None
        self._found: Checkpoint | None = None

    @contextmanager
    def opened(self, trainer: Trainer, backlog: Backlog) -> Iterator[None]:
        """Give ``trainer`` its folder and what saves there; after a resume, its state too.

        ``backlog`` is what was logged before there was a folder. Raises ConfigError,
        CheckpointError.
        """
        world, config = trainer.world, trainer.config
        try:
            path = world.from_first(lambda: self._look(config.name, config.training.checkpoint_dir))
            if path is not None:
                with before_the_run(), naming_authors(trainer.kernel):
                    restore(trainer, self._found or checkpoint.load(path, verify=False))
            goes_on = world.from_first(lambda: self._folder is not None)
            places = world.from_first(lambda: self._make(trainer))
            trainer.folder = self._folder or RunFolder(*places, writes=False)
            resumed = path is not None and goes_on
            trainer.saving = Saving(trainer, trainer.folder, resumed=resumed)
            if not world.is_first:
                backlog.drop()
            file = trainer.folder.log_file if world.is_first else None
            with logging_to(file=file, level=config.debug.log_level, backlog=backlog):
                try:
                    trainer.folder.write_profile(config.to_yaml())
                    trainer.folder.begin_manifest()
                    write_manifest(trainer, "running")
                    if world.is_first:
                        _log_start(trainer)
                    yield
                finally:
                    trainer.saving.close()
        finally:
            if self._folder is not None:
                self._folder.close()

    def _look(self, profile_name: str, checkpoint_dir: str | None) -> Path | None:
        """Open the folder of an earlier run, if this one goes on in it, and find the checkpoint
        that it goes on from."""
        if self._resume and self._output is None:
            self._output = newest_folder(profile_name)
            if self._output is None:
                raise ConfigError(
                    Problem(
                        f"there is no run of profile {profile_name!r} below runs/",
                        key="--resume",
                        hint="name its folder with --output, or leave --resume out",
                    )
                )
            log.info("resuming %s", self._output)
        output = self._output
        if output is not None and (
            self._resume or (self._resume_from and (output / "manifest.json").exists())
        ):
            self._folder = RunFolder.existing(output, checkpoint_dir)
        if self._resume_from is not None:
            self._found = named_checkpoint(self._resume_from)
        elif self._folder is not None:
            checkpoint.sweep(self._folder.checkpoints)
            if checkpoint.list_checkpoints(self._folder.checkpoints):
                self._found = checkpoint.newest_intact(self._folder.checkpoints)
            else:
                log.info(
                    "the run in %s was stopped before its first checkpoint: starting anew",
                    self._folder,
                )
        return None if self._found is None else self._found.path

    def _make(self, trainer: Trainer) -> tuple[Path, Path]:
        """The run's folder and that of its checkpoints; what comes after the trainer's position is
        taken out of the way."""
        config = trainer.config
        if self._folder is None:
            self._folder = RunFolder.create(
                self._output, config.name, config.training.checkpoint_dir
            )
        else:
            self._folder.drop_metrics_after(
                trainer.step if self._found else -1, evaluation=trainer.evaluates_again()
            )
            _set_aside_later_checkpoints(self._folder, trainer.step)
        return self._folder.path, self._folder.checkpoints


def _set_aside_later_checkpoints(folder: RunFolder, step: int) -> None:
    """Checkpoints after the one that the run goes on from are of another future: keep them, but
    out of the way of the next resume."""
    for path in checkpoint.list_checkpoints(folder.checkpoints):
        if path.name > checkpoint.folder_name(step):
            aside = path.with_name(f"superseded-{now().replace(':', '')}-{path.name}")
            path.rename(aside)
            log.info("%s is set aside as %s", path.name, aside.name)


def _log_start(trainer: Trainer) -> None:
    kernel, world = trainer.kernel, trainer.world
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    active = [r.name for r in kernel.manager.records.values() if r.state == "active"]
    log.info("run folder: %s", trainer.folder)
    for notice in kernel.notices:
        log.info("%s", notice)
    for key in kernel.inactive:
        log.info("inactive: %s (%s)", key.key, key.reason)
    for row in kernel.registry.resolutions.values():
        log.info("%s: %s", row.kind, row.used)
    gpu = gpu_name(trainer.device)
    log.info(
        "model built: %s parameters on %s%s%s, %s",
        f"{parameters:,}",
        trainer.device,
        f" ({gpu})" if gpu else "",
        f" in {world.size} processes ({world.sharding})" if world.size > 1 else "",
        f"plugins: {', '.join(active)}" if active else "no plugins",
    )
    compilation = trainer.parts.forward.compilation
    if compilation.mode is not None or trainer.device.type != "cpu":
        how = computes(trainer.config, trainer.device, trainer.parts.dtype, compilation)
        log.info("%s", computes_in_words(how))
    if compilation.mode is not None:
        log.info("compiling: the first evaluation and the first steps wait for it")
    if trainer.config.debug.verbose:
        for name, parameter in trainer.model.named_parameters():
            log.debug("%s %s", name, list(parameter.shape))
