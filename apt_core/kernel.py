"""Makes a kernel from a profile and a choice of plugins, without torch.

:func:`boot` reads the profile (:mod:`apt_core.config`), activates the plugins that it and the
command line name (:mod:`apt_core.activation`) and checks the whole against what they declare
(:mod:`apt_core.profile_check`). Every problem is reported at once, before anything is built;
nothing here imports torch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apt_core.activation import activate
from apt_core.config import Config, InactiveKey, Override, Source, core_text, read_profile, refusal
from apt_core.config.schema import DEFAULT_HOOK_TIMEOUT
from apt_core.declarations import AvailablePlugins
from apt_core.discovery import installed_plugins
from apt_core.error_text import shown
from apt_core.errors import ConfigError, Problem, StopTraining
from apt_core.kinds import Named
from apt_core.log import of_one_run
from apt_core.plugin_manager import PluginManager
from apt_core.profile_check import check_profile
from apt_core.providers.dataset import mixture_param
from apt_core.registry import Probe, Registry
from apt_core.schedules import Schedule
from apt_core.secrets import SecretValues
from apt_core.types import Inactive, SectionSpec

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""Environment variables that tell a process its rank in a run."""


@dataclass
class Kernel:
    """A checked profile with its plugins, providers and schedule.

    ``providers`` are those that the profile uses, ``sections`` those of the plugins, ``available``
    those of installed plugins that are not active, where these had to be asked, and ``observed``
    the sections of plugins that change no weight. ``notices`` are facts that the person should see
    at the start of a run; ``inactive`` the keys of the profile that do nothing, with the reason;
    ``inactive_settings`` all settings that have no effect beside others, written or not; ``place``
    the variables of the launcher (PLACE) from before any plugin was loaded; ``secrets`` are kept
    out of what is printed.
    """

    config: Config
    manager: PluginManager
    registry: Registry
    schedule: Schedule
    schedule_params: Mapping[str, str]
    providers: Named = field(default_factory=dict)
    sections: Sequence[SectionSpec] = ()
    available: Sequence[SectionSpec] = ()
    observed: Sequence[str] = ()
    inactive: list[InactiveKey] = field(default_factory=list)
    inactive_settings: Sequence[Inactive] = ()
    notices: list[str] = field(default_factory=list)
    place: Mapping[str, str] = field(default_factory=dict)
    secrets: SecretValues = field(default_factory=SecretValues, repr=False)
    builder: Sequence[str] = ()
    """The command of a process that builds the data of this profile, where there is one."""

    def largest(self, key: str) -> int:
        """The largest value that ``key``, a size of the profile, has in the run: its own, or one
        that a plugin's section has for later (:attr:`SectionSpec.grows`)."""
        section, _, own = key.rpartition(".")
        sizes: list[int] = [getattr(self.config.section(section), own)]
        for spec in self.sections:
            settings = self.config.section(spec.path)
            later = [getattr(settings, name) for name, grown in spec.grows.items() if grown == key]
            sizes += [size for size in later if size is not None]
        return max(sizes)

    def add_inactive(self, found: Iterable[InactiveKey]) -> None:
        """Add inactive keys that only the run could find. Raises ConfigError under ``--strict``."""
        known = {item.key for item in self.inactive}
        new = [item for item in found if item.key not in known]
        if new and self.manager.strict:
            raise ConfigError(map(refusal, new))
        self.inactive += new


def boot(
    profile: str | Path | Mapping[str, Any] | Config | Source,
    *,
    plugins: Sequence[str] = (),
    overrides: Sequence[Override] = (),
    strict: bool = False,
    manager: PluginManager | None = None,
    probe: Probe | None = None,
    files: bool = True,
) -> Kernel:
    """Read, load, declare, check.

    ``plugins`` are references as ``--plugin`` takes them: names, dotted modules, ``.py`` paths,
    comma lists, and ``no:NAME``. ``manager`` may hold plugins that are registered already.
    ``files=False`` leaves the data files unchecked (a dry run needs none).

    Raises ConfigError with every problem that was found.
    """
    source = _read(profile, overrides)
    place = {name: os.environ[name] for name in PLACE if name in os.environ}
    manager = manager or PluginManager()
    manager.strict = strict or manager.strict
    asked = bool(plugins or source.data.get("plugins") or manager.list_name_plugin())
    damaged: list[Problem] = []
    with (
        of_one_run(),
        before_the_run(),
        manager.hook_deadline(_hook_timeout(source) if asked else 0.0),
    ):
        available = AvailablePlugins(manager, installed_plugins(problems=damaged))
        active = activate(source, plugins, manager, available)
        checked = check_profile(source, active, manager, available, files=files)
        if active.problems or checked.problems or checked.config is None:
            raise ConfigError([*active.problems, *checked.problems])
    return Kernel(
        config=checked.config,
        manager=manager,
        registry=Registry(
            manager,
            known=active.providers,
            profile=checked.config,
            probe=probe,
            strict=manager.strict,
        ),
        schedule=_schedule(checked.config, active.params),
        schedule_params=active.params,
        providers=checked.providers,
        sections=active.sections,
        available=checked.available,
        observed=active.observed,
        inactive=checked.inactive,
        inactive_settings=checked.inactive_settings,
        notices=[*map(str, damaged), *active.notices, *checked.notices],
        place=place,
        secrets=checked.secrets,
    )


def _schedule(config: Config, params: Mapping[str, str]) -> Schedule:
    """The schedule of the profile, which also moves the weights of a mixture's sources."""
    sources = [item.name for item in config.data.mixture or ()]
    weights = {mixture_param(name): name for name in sources}
    return Schedule(config, params={**params, **weights}, sources=sources)


def _read(
    profile: str | Path | Mapping[str, Any] | Config | Source, overrides: Sequence[Override]
) -> Source:
    if isinstance(profile, str | Path):
        return read_profile(profile, overrides)
    if isinstance(profile, Source):
        return core_text(profile.with_overrides(overrides))
    data = profile.to_dict(secrets=True) if isinstance(profile, Config) else profile
    return core_text(Source.from_dict(data).with_overrides(overrides))


def _hook_timeout(source: Source) -> float:
    """The value as the profile has it, before the profile is validated."""
    training = source.data.get("training")
    asked = training.get("hook_timeout") if isinstance(training, Mapping) else None
    if isinstance(asked, int | float) and 0 <= asked < math.inf:
        return float(asked)
    return DEFAULT_HOOK_TIMEOUT


@contextmanager
def before_the_run() -> Iterator[None]:
    """Raise ConfigError if a plugin stops the run in the context, before the run has begun."""
    try:
        yield
    except StopTraining as stop:
        reason = shown(stop.reason)
        raise ConfigError(f"a plugin stopped the run before it began: {reason}") from stop
