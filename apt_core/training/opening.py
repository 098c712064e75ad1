"""Makes the folder of a run, or opens that of an earlier run to continue it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apt_core.code_source import short_path
from apt_core.config import Config
from apt_core.device import gpu_name
from apt_core.errors import AptError, ConfigError
from apt_core.event_log import EventLog
from apt_core.files import read_file
from apt_core.json_files import MAX_BYTES
from apt_core.log import get_logger
from apt_core.modeling.compilation import computes, computes_in_words
from apt_core.parallel.world import World
from apt_core.profile_paths import user_path
from apt_core.runs import checkpoint
from apt_core.runs.checkpoint import Checkpoint
from apt_core.runs.events import Event, read_events
from apt_core.runs.finding import find_checkpoint, run_of
from apt_core.runs.folder import RunFolder, newest_folder, now
from apt_core.runs.layout import TOKENIZER
from apt_core.runs.resume_check import saved_profile
from apt_core.training.context import RunContext

log = get_logger("apt.checkpoint")


class Opening:
    """Opens the run's folder by ``output``, ``resume`` and ``resume_from``.

    The first process opens the folder and sends its path to the others.
    """

    def __init__(
        self, output: str | Path | None, resume: bool, resume_from: str | Path | None
    ) -> None:
        self._output = user_path(output) if output is not None else None
        self._resume = resume
        self._resume_from = user_path(resume_from) if resume_from is not None else None
        self._folder: RunFolder | None = None
        self._found: Checkpoint | None = None
        self.taken_back: int | None = None
        """The last step that an earlier part of the run in this folder has reported; None where the
        folder is new."""

    def kept_tokenizer(self, config: Config) -> Path | None:
        """The folder in which the run that this one continues has kept its tokenizer; None where
        the profile now names other files for it."""
        place = self._resume_from
        if place is None and self._resume:
            place = self._output or newest_folder(config.name)
        if place is None:
            return None
        named = config.data.tokenizer.path
        for run in (place, run_of(place)):
            if (run / TOKENIZER).is_dir():
                other = named and Path(named).exists() and named != _recorded_tokenizer(run)
                return None if other else run / TOKENIZER
        return None

    def checkpoint(self, world: World, config: Config) -> Checkpoint | None:
        """Open the folder of an earlier run, if this one continues in it. Returns the checkpoint to
        continue from. Raises ConfigError, CheckpointError."""
        path = world.from_first(
            lambda: self._find_checkpoint(config.name, config.training.checkpoint_dir)
        )
        if path is None or self._found is not None:
            return self._found
        return checkpoint.load(path, verify=False)  # the first process has verified it

    def recorded(self) -> list[Event]:
        """All that happened in an earlier part of the run, in this folder, also in steps that are
        taken again."""
        if self._folder is None:
            return []
        history = read_events(self._folder.path)
        return [*history.lost, *history.events]

    def resumes(self, world: World) -> bool:
        """Whether the run continues in the folder of an earlier one."""
        return world.from_first(lambda: self._folder is not None)

    def folder(
        self, world: World, config: Config, step: int, events: EventLog, *, evaluation: bool
    ) -> RunFolder:
        """Make the run's folder, or remove what an earlier part of the run wrote after ``step``:
        metrics are dropped, with ``evaluation`` also the scores at ``step``, which is evaluated
        again; checkpoints are set aside. Raises ConfigError."""

        def make() -> tuple[Path, Path, int | None]:
            last = None
            if self._folder is None:
                self._folder = RunFolder.create(
                    self._output, config.name, config.training.checkpoint_dir
                )
            else:
                last = self._folder.drop_metrics_after(
                    step if self._found else -1, evaluation=evaluation
                )
                last = max([last, *_set_aside_later_checkpoints(self._folder, step, events)])
                if last > step:
                    events.record(
                        "rewound",
                        f"steps {step + 1} to {last} are taken again",
                        step=step,
                        log=log,
                        from_step=last,
                    )
            return self._folder.path, self._folder.checkpoints, last

        path, checkpoints, self.taken_back = world.from_first(make)
        return self._folder or RunFolder(path, checkpoints, writes=False)

    def close(self) -> None:
        """Release the lock of the folder."""
        if self._folder is not None:
            self._folder.close()

    def _find_checkpoint(self, profile_name: str, checkpoint_dir: str | None) -> Path | None:
        """Open the folder of an earlier run, if this one continues in it, and find the checkpoint
        to continue from."""
        if self._resume and self._output is None:
            self._output = newest_folder(profile_name)
            if self._output is None:
                raise ConfigError(
                    f"there is no run of profile {profile_name!r} below runs/",
                    key="--resume",
                    hint="name its folder with --output, or leave --resume out",
                )
            log.info("resuming %s", self._output)
        output = self._output
        if output is not None and (
            self._resume or (self._resume_from and (output / "manifest.json").exists())
        ):
            self._folder = RunFolder.existing(output, checkpoint_dir)
        if self._resume_from is not None:
            self._found = find_checkpoint(self._resume_from, "--resume-from")
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


def _recorded_tokenizer(run: Path) -> Any:
    """The path of the tokenizer's files in the profile of a run; None where that does not say."""
    try:
        profile = saved_profile(read_file(run / "profile.yaml", MAX_BYTES).decode("utf-8"))
        return profile["data"]["tokenizer"]["path"]
    except (OSError, ValueError, AptError, KeyError, TypeError):
        return None


def _set_aside_later_checkpoints(folder: RunFolder, step: int, events: EventLog) -> list[int]:
    """Rename checkpoints after ``step``: the run will write its own there, and the next resume must
    not find the old ones. Returns their steps."""
    later = []
    for path in checkpoint.list_checkpoints(folder.checkpoints):
        if path.name > checkpoint.folder_name(step):
            aside = path.with_name(f"superseded-{now().replace(':', '')}-{path.name}")
            path.rename(aside)
            later.append(checkpoint.step_of(path))
            events.record(
                "set_aside",
                f"{path.name} is set aside as {aside.name}",
                step=step,
                log=log,
                checkpoint=path.name,
                name=aside.name,
            )
    return later


def log_start(run: RunContext, folder: RunFolder, found: Checkpoint | None) -> None:
    """Log the folder, notices, providers, model and plugins that the run starts with; ``found`` is
    the checkpoint that it continues from."""
    kernel, parts, world, trained = run.kernel, run.parts, run.world, run.trained
    active = [r.name for r in kernel.manager.records.values() if r.state == "active"]
    log.info("run folder: %s", folder)
    start: dict[str, Any] = {
        "parameters": trained.num_parameters,
        "device": str(parts.device),
        "processes": world.size,
        "plugins": active,
    }
    if found is not None:
        path, step = short_path(str(found.path)), found.state.step
        run.events.record(
            "resumed",
            f"resumed from {path} (step {step})",
            step=step,
            log=log,
            checkpoint=path,
            **start,
        )
    for notice in kernel.notices:
        log.info("%s", notice)
    for key in kernel.inactive:
        log.info("inactive: %s (%s)", key.key, key.reason)
    for row in kernel.registry.resolutions.values():
        log.info("%s: %s", row.kind, row.used)
    gpu = gpu_name(parts.device)
    on = f"{parts.device} ({gpu})" if gpu else str(parts.device)
    if world.size > 1:
        on += f" in {world.size} processes ({world.sharding})"
    plugins = f"plugins: {', '.join(active)}" if active else "no plugins"
    built = f"model built: {trained.num_parameters:,} parameters on {on}, {plugins}"
    if found is None:
        run.events.record("started", built, step=0, log=log, **start)
    else:
        log.info("%s", built)
    compilation = trained.forward.compilation
    if compilation.mode is not None or parts.device.type != "cpu":
        how = computes(kernel.config, parts.device, parts.dtype, compilation)
        log.info("%s", computes_in_words(how))
    if compilation.mode is not None:
        log.info("compiling: the first evaluation and the first steps wait for it")
    if kernel.config.debug.verbose:
        for name, parameter in trained.model.named_parameters():
            log.debug("%s %s", name, list(parameter.shape))
