"""Where a run is kept: its folder, its checkpoints, and going on from one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apt_core.errors import CheckpointError, ConfigError, PluginError, Problem, TrainingError
from apt_core.failures import short_path
from apt_core.log import Backlog, logging_to
from apt_core.training import checkpoint
from apt_core.training.checkpoint import Snapshot
from apt_core.training.resume import check_resume, saved_profile
from apt_core.training.run_folder import RunFolder, newest_folder, now, versions
from apt_core.training.state import (
    copy_to_cpu,
    load_model,
    load_optimizer,
    load_optimizer_groups,
    model_tensors,
    optimizer_groups,
    optimizer_tensors,
    plugin_states,
    restore_plugins,
)

if TYPE_CHECKING:
    from apt_core.training.trainer import Trainer

log = logging.getLogger("apt.checkpoint")


class Saving:
    """Opens the run's folder, restores a checkpoint into the trainer, and writes new ones."""

    def __init__(
        self,
        trainer: Trainer,
        output: str | Path | None,
        resume: bool,
        resume_from: str | Path | None,
    ) -> None:
        self.trainer = trainer
        self.output = Path(output) if output is not None else None
        self.resume = resume
        self.resume_from = Path(resume_from) if resume_from is not None else None
        self.best_loss: float | None = None
        self.best_step: int | None = None
        self.saved: tuple[int, int] | None = None
        self.failures: list[str] = []

    # The folder ------------------------------------------------------------------------------

    @contextmanager
    def opened(self, backlog: Backlog) -> Iterator[RunFolder]:
        """The run's folder, with its log, after a resume with the trainer's state restored.

        ``backlog`` is what was logged before there was a folder.
        """
        trainer, config = self.trainer, self.trainer.config
        folder = self._existing_folder()
        try:
            found = self._find_checkpoint(folder)
            if found is not None:
                self._restore(*found)
        except BaseException:
            if folder is not None:
                folder.close()
            raise
        self.folder = folder or RunFolder.create(
            self.output, config.name, config.training.checkpoint_dir
        )
        level = config.debug.log_level
        with logging_to(file=self.folder.log_file, level=level, backlog=backlog):
            try:
                if folder is not None:
                    folder.drop_metrics_after(trainer.step if found else -1)
                    self._set_aside_later_checkpoints()
                self.folder.write_profile(config.to_yaml())
                self.folder.begin_manifest()
                self.write_manifest("running")
                self._log_start()
                yield self.folder
            finally:
                self.folder.close()

    def _existing_folder(self) -> RunFolder | None:
        """The folder of an earlier run that this one goes on in, if it does."""
        if self.resume and self.output is None:
            self.output = newest_folder(self.trainer.config.name)
            if self.output is None:
                raise ConfigError(
                    Problem(
                        f"there is no run of profile {self.trainer.config.name!r} below runs/",
                        key="--resume",
                        hint="name its folder with --output, or leave --resume out",
                    )
                )
            log.info("resuming %s", self.output)
        if self.output is None:
            return None
        if self.resume or (self.resume_from and (self.output / "manifest.json").exists()):
            return RunFolder.existing(self.output)
        return None

    def _find_checkpoint(self, folder: RunFolder | None) -> tuple[Path, Snapshot] | None:
        path = self.resume_from
        if path is not None:
            if not path.exists():
                raise ConfigError(
                    Problem("there is no such checkpoint or run folder", "--resume-from", str(path))
                )
            if (path / "state.json").exists() or not path.is_dir():
                return path, checkpoint.load(path)
            inside = path / "checkpoints"
            return checkpoint.newest_intact(inside if inside.is_dir() else path)
        if folder is None:
            return None
        checkpoint.sweep(folder.checkpoints)
        if not checkpoint.list_checkpoints(folder.checkpoints):
            log.info("the run in %s was stopped before its first checkpoint: starting anew", folder)
            return None
        return checkpoint.newest_intact(folder.checkpoints)

    def _set_aside_later_checkpoints(self) -> None:
        """Checkpoints after the one that the run goes on from are of another future: keep them,
        but out of the way of the next resume."""
        for path in checkpoint.list_checkpoints(self.folder.checkpoints):
            if path.name > checkpoint.folder_name(self.trainer.step):
                aside = path.with_name(f"superseded-{now().replace(':', '')}-{path.name}")
                path.rename(aside)
                log.info("%s is set aside as %s", path.name, aside.name)

    def _log_start(self) -> None:
        trainer, kernel = self.trainer, self.trainer.kernel
        parameters = sum(p.numel() for p in trainer.model.parameters())
        active = [r.name for r in kernel.manager.records.values() if r.state == "active"]
        log.info("run folder: %s", self.folder)
        for notice in kernel.notices:
            log.info("%s", notice)
        for key in kernel.inactive:
            log.info("inactive: %s (%s)", key.key, key.reason)
        for row in kernel.registry.resolutions.values():
            log.info("%s: %s", row.kind, row.used)
        log.info(
            "model built: %s parameters on %s, %s",
            f"{parameters:,}",
            trainer.device,
            f"plugins: {', '.join(active)}" if active else "no plugins",
        )
        if trainer.config.debug.verbose:
            for name, parameter in trainer.model.named_parameters():
                log.debug("%s %s", name, list(parameter.shape))

    def write_manifest(self, status: str, **entries: Any) -> None:
        """Bring the run's manifest up to date."""
        kernel = self.trainer.kernel
        self.folder.write_manifest(
            status=status,
            profile=self.trainer.config.name,
            versions=versions(),
            data=self.trainer.parts.data,
            device=str(self.trainer.device),
            providers=[row.row() for row in kernel.registry.resolutions.values()],
            plugins=plugin_rows(kernel),
            inactive_keys=[{"key": k.key, "reason": k.reason} for k in kernel.inactive],
            step=self.trainer.step,
            failed_checkpoints=self.failures,
            **({} if status == "running" else {"ended": now()}),
            **entries,
        )

    # Writing ---------------------------------------------------------------------------------

    def save(self, *, final: bool = False, emergency: bool = False) -> None:
        """Write a checkpoint of the current position, unless it is there already.

        A full disk costs this checkpoint and nothing else: the run goes on, but it does not end
        well. Raises TrainingError when the ``final`` one cannot be written.
        """
        trainer, manager = self.trainer, self.trainer.manager
        position = (trainer.step, trainer.ended_epochs)
        if self.saved == position:
            return
        try:
            snapshot = self._snapshot(emergency)
            path = checkpoint.save(self.folder.checkpoints, snapshot)
        except OSError as error:
            message = f"the checkpoint of step {trainer.step} was not written: {error}"
            self.failures.append(message)
            if final:
                raise TrainingError(message) from error
            log.error("%s; earlier checkpoints are intact and the run goes on", message)
            return
        self.saved = position
        self.best_step, self.best_loss = self._best()
        log.info("checkpoint: %s", short_path(str(path)))
        self._prune()
        if not emergency:
            manager.hook.on_checkpoint_saved(path=path, trainer=trainer)

    def _snapshot(self, emergency: bool) -> Snapshot:
        trainer = self.trainer
        try:
            states, tensors = plugin_states(trainer.manager, trainer)
        except PluginError as error:
            if not emergency:
                raise
            log.error("the checkpoint is without the state of plugins: %s", error)
            states, tensors = {}, {}
        skipped, in_a_row = trainer.guard.read()
        kernel = trainer.kernel
        return Snapshot(
            step=trainer.step,
            model=copy_to_cpu(model_tensors(trainer.model)),
            optimizer=copy_to_cpu(optimizer_tensors(trainer.model, trainer.optimizer)),
            plugins=tensors,
            state={
                "step": trainer.step,
                "epoch": trainer.epoch,
                "ended_epochs": trainer.ended_epochs,
                "tokens": trainer.tokens,
                "nonfinite_steps": [skipped, in_a_row],
                "start_scores": trainer.start_scores,
                "scores": trainer.scores,
                "best": list(self._best()),
                "data_sha256": trainer.parts.data["sha256"],
                "plugins": states,
                "plugin_records": trainer.manager.state_dict(),
                "optimizer_groups": optimizer_groups(trainer.optimizer),
                "transforms": [],
            },
            profile=trainer.config.to_yaml(),
            manifest={
                "written": now(),
                "versions": versions(),
                "providers": [row.row() for row in kernel.registry.resolutions.values()],
                "plugins": plugin_rows(kernel),
            },
        )

    def _best(self) -> tuple[int | None, float | None]:
        """Step and loss of the best checkpoint, once the current position has one."""
        trainer = self.trainer
        if trainer.config.evaluation.save_best and trainer.scores.get("step") == trainer.step:
            loss = trainer.scores["val_loss"]
            if self.best_loss is None or loss < self.best_loss:
                return trainer.step, loss
        return self.best_step, self.best_loss

    def _prune(self) -> None:
        best = None
        if self.best_step is not None:
            best = self.folder.checkpoints / checkpoint.folder_name(self.best_step)
        checkpoint.prune(self.folder.checkpoints, self.trainer.config.training.keep_last, keep=best)

    # Going on --------------------------------------------------------------------------------

    def _restore(self, path: Path, snapshot: Snapshot) -> None:
        """Put the trainer where the checkpoint was taken. Raises CheckpointError, ConfigError."""
        trainer, kernel = self.trainer, self.trainer.kernel
        changed = check_resume(
            trainer.config,
            saved_profile(snapshot.profile, trainer.kernel.sections),
            constant_horizon=self._constant_horizon(),
        )
        self._check_providers(snapshot)
        state = snapshot.state
        if state["data_sha256"] != trainer.parts.data["sha256"]:
            raise CheckpointError(f"{path}: it was trained on another text than the profile's")
        load_model(trainer.model, snapshot.model)
        load_optimizer(trainer.model, trainer.optimizer, snapshot.optimizer)
        load_optimizer_groups(trainer.optimizer, state["optimizer_groups"])
        trainer.step, trainer.epoch = state["step"], state["epoch"]
        trainer.tokens, trainer.ended_epochs = state["tokens"], state["ended_epochs"]
        trainer.start_scores, trainer.scores = state["start_scores"], state["scores"]
        trainer.guard.load(*state["nonfinite_steps"])
        self.best_step, self.best_loss = state["best"]
        self.saved = (trainer.step, trainer.ended_epochs)
        trainer.manager.step = trainer.step
        trainer.manager.load_state_dict(state["plugin_records"])
        restore_plugins(trainer.manager, trainer, state["plugins"], snapshot.plugins)
        kernel.notices.append(f"resumed from {short_path(str(path))} (step {trainer.step})")
        kernel.notices += [f"{key} differs from the checkpoint's profile" for key in changed]
        kernel.notices += [
            f"plugin {r.name} stays quarantined, as in the checkpoint: {r.reason}"
            for r in kernel.manager.records.values()
            if r.state == "quarantined"
        ]

    def _constant_horizon(self) -> bool:
        """Does the length of the run decide about nothing but its end?"""
        trainer = self.trainer
        training = trainer.config.training
        total, factor = trainer.total_steps, trainer.parts.lr_schedule.factor
        same_rate = all(
            factor(step, total, training.warmup_steps, training.min_lr_ratio)
            == factor(step, 2 * total, training.warmup_steps, training.min_lr_ratio)
            for step in {1, max(1, total // 2), total}
        )
        return same_rate and not trainer.schedule.is_annealed

    def _check_providers(self, snapshot: Snapshot) -> None:
        """The same implementations must run: another one would be another model."""
        resolutions = self.trainer.kernel.registry.resolutions.values()
        here = {(row.kind, row.asked): row.used for row in resolutions}
        for row in snapshot.manifest.get("providers", []):
            used = here.get((row["slot"], row["asked"]))
            if used is not None and used != row["used"]:
                raise CheckpointError(
                    f"{row['slot']}: the checkpoint was trained with {row['used']!r}, here "
                    f"{used!r} would run; ask for it: "
                    f"--model.{row['slot']}_name {row['used']}"
                )


def plugin_rows(kernel: Any) -> list[dict[str, Any]]:
    """The plugins that were asked for, as manifests show them."""
    return [
        {
            "name": record.name,
            "dist": record.dist,
            "version": record.version,
            "state": record.state,
            "reason": record.reason,
            "failures": record.failure_rows(),
        }
        for record in kernel.manager.records.values()
    ]
