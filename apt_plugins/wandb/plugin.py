"""Reports a run to Weights & Biases, in the background: online, or into the run's folder."""

from __future__ import annotations

import logging
import netrc
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from apt_core import ConfigError, PluginInfo, RunFacts, hookimpl
from apt_core.error_text import one_line
from apt_core.runs.events import EventTail
from apt_plugins.tracking.figures import ended, figures_of, flat, line_of, report_of
from apt_plugins.tracking.kept import Kept
from apt_plugins.tracking.tracker import Tracker
from apt_plugins.wandb.settings import SECTION, WandbSettings

if TYPE_CHECKING:
    from apt_core.config import Config

PLUGIN = PluginInfo(
    observer=True,
    summary="runs on Weights & Biases, online or offline; a resume goes on in the same run",
    version="1.0.0",
    requires=("wandb>=0.20",),
)

STEP = "step"
"""The axis of all figures. wandb's own steps only ever grow, and those of a run that is resumed go
back."""

log = logging.getLogger("apt.wandb")


class Plugin(Tracker):
    """One run's part in a run of Weights & Biases."""

    section, settings_model = SECTION, WandbSettings
    _settings: WandbSettings

    def __init__(self) -> None:
        super().__init__()
        self._patience = 0.0
        self._run: Any = None
        self._resumed: tuple[int, int] | None = None

    @hookimpl
    def apt_configure(self, config: Config) -> None:
        super().apt_configure(config)
        self._patience = config.training.background_timeout
        if self._settings.mode == "online" and not has_key():
            raise ConfigError(
                "online needs a key, and there is none", key=f"{SECTION}.mode", hint="wandb login"
            )

    @hookimpl(background=True)
    def on_resume(self, step: int, from_step: int) -> None:
        self._resumed = step, from_step

    @hookimpl(background=True)
    def on_training_start(self, run: RunFacts) -> None:
        if run.rank:
            return
        kept = Kept(run.folder, "wandb")
        known = kept.get("id")
        name = known or secrets.token_hex(4)
        kept.put(id=name)
        self._events = EventTail(run.folder)
        self._run = self._begun(run, name, resumes=bool(known))
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)
        if known and self._resumed is not None:
            self._tell_resume(kept, *self._resumed)
        self._tell_events()

    @hookimpl(background=True)
    def on_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        if self._run is None:
            return
        self._run.log({STEP: step, **figures_of(metrics)})
        for at, histograms in self._histograms.take():
            import numpy as np
            from wandb import Histogram

            pairs = {
                each.name: (np.array(each.counts), np.array(each.edges)) for each in histograms
            }
            shown = {key: Histogram(np_histogram=pair) for key, pair in pairs.items()}
            self._run.log({STEP: at, **shown})
        self._tell_events()

    @hookimpl(background=True)
    def on_training_end(self, run: RunFacts) -> None:
        self._end(run, failed=False)

    @hookimpl(background=True)
    def on_exception(self, run: RunFacts) -> None:
        self._end(run, failed=True)

    # The run of wandb ------------------------------------------------------------------------

    def _begun(self, run: RunFacts, name: str, *, resumes: bool) -> Any:
        import wandb

        own, mode = self._settings, self._mode()
        options: dict[str, Any] = {
            "project": own.project or run.name,
            "entity": own.entity,
            "id": name,
            "name": run.folder.name,
            "dir": str(run.folder),
            "tags": list(own.tags),
            "config": dict(flat(run.settings)),
            # Two runs of one process share nothing.
            "reinit": "create_new",
            "settings": wandb.Settings(
                console="off", silent=True, save_code=False, finish_timeout=self._patience
            ),
        }
        if mode == "offline":  # wandb itself goes on in a run by its id alone
            return wandb.init(mode=mode, **options)
        try:
            return wandb.init(mode=mode, resume="allow" if resumes else None, **options)
        except (wandb.errors.Error, OSError) as error:
            if own.mode == "online":
                raise
            log.warning(
                "wandb cannot be reached (%s): this part of the run is kept in %s (wandb sync)",
                one_line(error),
                run.folder / "wandb",
            )
            return wandb.init(mode="offline", **options)

    def _mode(self) -> Any:
        if self._settings.mode != "auto":
            return self._settings.mode
        asked = os.environ.get("WANDB_MODE")
        if asked not in (None, "", "online", "shared") or has_key():
            return asked or None
        # Without a key, wandb would ask for one on the terminal.
        log.info("wandb has no key: what this run reports is kept in its folder (wandb sync)")
        return "offline"

    def _tell_resume(self, kept: Kept, step: int, from_step: int) -> None:
        """Say from where on figures were logged before. wandb takes nothing back: both are shown,
        and ``part`` tells them apart."""
        part = str(int(kept.get("part") or "1") + 1)
        kept.put(part=part)
        text = f"steps {step + 1} to {from_step} are taken again in part {part}"
        if from_step <= step:
            text = f"part {part} goes on after step {step}"
        known = {"part": int(part), f"resumes/part_{part}": text}
        self._run.config.update(known, allow_val_change=True)
        self._run.log({STEP: step, "part": int(part), "event": f"resumed: {text}"})

    def _tell_events(self) -> None:
        for event in self._new_events():
            self._run.log({STEP: event.step, "event": line_of(event)})

    def _end(self, run: RunFacts, *, failed: bool) -> None:
        if self._run is None:
            return
        own, facts = self._run, ended(run.folder)
        self._tell_events()
        self._run = None
        try:
            own.summary.update(facts)
            page = report_of(run.folder)
            if page is not None:
                from wandb import Artifact

                artifact = Artifact(f"report-{own.id}", type="report")
                artifact.add_file(str(page))
                own.log_artifact(artifact)
        finally:
            own.finish(exit_code=int(failed))


def has_key() -> bool:
    """Whether a key for the service is in the environment or in ~/.netrc; it is not looked at."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    file = os.environ.get("NETRC") or os.path.expanduser("~/.netrc")
    with suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(file).authenticators(host or "") is not None
    return False
