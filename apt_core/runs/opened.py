"""Opens a run's model from its folder, without data and optimizer."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from apt_core.code_source import short_path
from apt_core.config import Override, Source
from apt_core.config.secret_fields import masks_in
from apt_core.config.yaml_text import KeyPath, dotted
from apt_core.data.loading import load_tokenizer
from apt_core.data.order import StepPlan
from apt_core.device import as_current_device, resolve_device
from apt_core.errors import CheckpointError, ConfigError, Problem
from apt_core.kernel import Kernel, before_the_run, boot
from apt_core.log import get_logger, of_one_run
from apt_core.modeling.blame import naming_authors
from apt_core.modeling.carry import call_buffers_loaded, materialize
from apt_core.modeling.compose import ModelBuilder
from apt_core.modeling.placement import settle_device
from apt_core.modeling.structure import replayed, require_plugins
from apt_core.plugin_manager import PluginManager
from apt_core.profile_paths import user_path
from apt_core.runs.checkpoint import Checkpoint
from apt_core.runs.checkpoint_parts import joined_states, listed, model_tensors, names_not_finite
from apt_core.runs.finding import find_checkpoint, run_of
from apt_core.runs.layout import TOKENIZER
from apt_core.runs.resume_check import check_providers, saved_profile
from apt_core.runs.session import Position, Session
from apt_core.runs.trained_on import data_row
from apt_core.schedules import Horizon, Schedule

log = get_logger("apt.runs")

Weights = Literal["last", "best", "average"]
WEIGHTS = ("last", "best", "average")

TRIES = 3
"""The number of times that a running run may delete the checkpoint being opened."""

NOT_KEPT = "(a secret that the run's folder does not hold)"
"""Stands for a secret that a plugin's section cannot do without."""


def open_run(
    path: str | Path,
    step: int | None = None,
    weights: Weights = "last",
    device: str | torch.device = "auto",
    plugins: str | Sequence[Any] = (),
    overrides: Mapping[str, Any] | Sequence[Override] = (),
) -> Session:
    """The model of a run with its plugins, tokenizer and settings, to generate with, to evaluate,
    to look into: as a resume would have it, in eval mode, without optimizer or data.

    ``path`` is a run's folder, its folder of checkpoints, or one checkpoint. ``step`` is that of
    the checkpoint, by default the newest intact one's. ``weights`` are those that were trained
    (``last``), the moving average of them that the run keeps (``average``), or those of the
    checkpoint with the lowest loss on the held-out text (``best``: the average where the run keeps
    one, for that is what its evaluations look at). ``device`` is one as ``hardware.device`` takes
    it. ``plugins`` are added to the run's as ``--plugin`` adds them, and ``no:NAME`` leaves one
    out; a plugin may be an object. ``overrides`` set keys of plugins' sections, or schedules of
    theirs, in place of what the run has: ``{"model.voting.k": 5}``.

    Plugins have the states that they had: enabled, waiting, quarantined. What they kept is given
    back to them, unless their ``apt_load_state_dict`` takes the trainer, which there is none of.

    Raises ConfigError for what is not there or does not fit together, CheckpointError for a
    checkpoint that is damaged or not to be used.
    """
    place = user_path(path)
    if isinstance(overrides, Mapping):
        given = overrides.items()
        overrides = [Override(tuple(key.split(".")), value, key) for key, value in given]
    if weights not in WEIGHTS:
        raise ConfigError(
            Problem(f"is {weights!r}", "weights", hint=f"one of {', '.join(WEIGHTS)}")
        )
    if weights == "best" and step is not None:
        message = "the best weights are of a step of their own"
        raise ConfigError(Problem(message, "step", hint="give one of step and weights='best'"))
    for _ in range(TRIES):
        found = find_checkpoint(place, "path", step=step, best=weights == "best")
        try:
            return _opened(found, weights, str(device), plugins, overrides)
        except CheckpointError:
            if found.path.exists():
                raise
        if step is not None or place.name == found.path.name:
            break  # no other is meant
    raise CheckpointError(
        f"{found.path}: it was deleted while it was opened; a run that goes on keeps its newest "
        "checkpoints alone (training.keep_last)"
    )


def _opened(
    found: Checkpoint,
    weights: Weights,
    device_name: str,
    plugins: str | Sequence[Any],
    overrides: Sequence[Override],
) -> Session:
    state = found.state
    name = _tensors_of(found, weights)
    references = [plugins] if isinstance(plugins, str) else plugins
    kernel = _booted(found, device_name, references, overrides)
    _require_of_plugins(kernel, overrides)
    manager, config = kernel.manager, kernel.config
    _, reason = resolve_device(device_name)
    if reason:
        message = f"{device_name} is not usable ({reason})"
        raise ConfigError(Problem(message, "device", hint="auto takes what there is"))
    with of_one_run(manager.failures.keep_log_error), before_the_run(), naming_authors(kernel):
        require_plugins(kernel, (switch.plugin for switch in state.transforms))
        device = settle_device(kernel)
        tokenizer = load_tokenizer(kernel, run_of(found.path) / TOKENIZER)
        with as_current_device(device):
            model = _built(kernel, found, device)
            check_providers(kernel, found.manifest)
            _load(model, found, name)
        schedule = _with_horizon(kernel.schedule, kernel, found)
        _restore_plugins(kernel, schedule, found)
        for notice in kernel.notices:
            log.info("%s", notice)
    return Session(
        config=config,
        manager=manager,
        registry=kernel.registry,
        schedule=schedule,
        position=Position(state.step, state.epoch, state.tokens),
        model=model.eval(),
        tokenizer=tokenizer,
        device=device,
        dtype=_dtype(found),
        checkpoint=found.path,
    )


def _tensors_of(found: Checkpoint, weights: Weights) -> str:
    """The name of the tensors that stand for the parameters. Raises ConfigError where the
    checkpoint has no average, or more than one."""
    if weights == "last":
        return "model"
    if "ema" in found.names:
        return "ema"
    if weights == "best":
        return "model"
    kept = [average.plugin for average in found.state.averages]
    if len(kept) == 1:
        return "average-0"
    message = f"it has averages of plugins {', '.join(kept)}" if kept else "it has no average"
    hint = "training.ema_decay lets a run keep one of its own"
    raise ConfigError(Problem(message, "weights", str(found.path), hint))


# The kernel --------------------------------------------------------------------------------------


def _booted(
    found: Checkpoint, device: str, plugins: Sequence[Any], overrides: Sequence[Override]
) -> Kernel:
    """The run's profile with its plugins. Secrets are left out; one that a section requires is
    replaced by a text that says so."""
    profile = saved_profile(found.profile)
    masks = [*masks_in(profile)]
    without = copy.deepcopy(profile)
    for path in reversed(masks):  # items of a list from its end
        _delete(without, path)
    hardware = without.get("hardware")
    without["hardware"] = {**(hardware if isinstance(hardware, dict) else {}), "device": device}
    try:
        return _boot(found, without, plugins, overrides)
    except ConfigError as error:
        keys = {problem.key for problem in error.problems}
        required = [path for path in masks if dotted(path) in keys]
        if not required:
            raise
        for path in required:
            _set(without, path, NOT_KEPT)
        return _boot(found, without, plugins, overrides)


def _boot(
    found: Checkpoint,
    profile: Mapping[str, Any],
    plugins: Sequence[Any],
    overrides: Sequence[Override],
) -> Kernel:
    manager = PluginManager()
    references = [str(each) for each in plugins if isinstance(each, str | Path)]
    for each in plugins:
        if not isinstance(each, str | Path):
            manager.register(each)
    listed = profile.get("plugins")
    if isinstance(listed, list):  # the run had objects of these names, too
        given = {name for name, _ in manager.list_name_plugin()}
        kept = [each for each in listed if _name_in(each) not in given]
        profile = {**profile, "plugins": kept}
    label = short_path(str(found.path / "profile.yaml"))
    source = Source.from_dict(profile, label, recorded=True)
    return boot(source, plugins=references, overrides=overrides, manager=manager, files=False)


def _require_of_plugins(kernel: Kernel, overrides: Sequence[Override]) -> None:
    """Raise ConfigError for overrides of what the run itself is."""
    sections = sorted({section.path for section in kernel.sections if section.path})
    mine = {name for section in kernel.sections for name in section.schedule_params}
    problems = []
    for override in overrides:
        key = override.key
        if any(key == path or key.startswith(f"{path}.") for path in sections):
            continue
        if override.path[0] == "schedules" and override.path[1:2] and override.path[1] in mine:
            continue
        those = f" ({', '.join(sections)})" if sections else ""
        message = "is the run's own: only what belongs to an active plugin can be set"
        hint = f"sections of plugins{those}; --plugin activates another"
        problems.append(Problem(message, key, override.where, hint))
    if problems:
        raise ConfigError(problems)


def _name_in(item: Any) -> Any:
    """The name in an item of the profile's list of plugins."""
    return item.get("name") if isinstance(item, dict) else item


def _delete(data: Any, path: KeyPath) -> None:
    for key in path[:-1]:
        data = data[key]
    del data[path[-1]]


def _set(data: Any, path: KeyPath, value: Any) -> None:
    for key in path[:-1]:
        data = data[key]
    if isinstance(data, list):
        data.insert(int(path[-1]), value)
    else:
        data[path[-1]] = value


def _with_horizon(schedule: Schedule, kernel: Kernel, found: Checkpoint) -> Schedule:
    """The schedule with the length of the run, where the checkpoint, or the manifest of the run,
    says how many windows its data has."""
    windows = data_row(found.path, found.manifest).get("windows")
    if isinstance(windows, bool) or not isinstance(windows, int) or not 1 <= windows < 2**50:
        return schedule
    config = kernel.config
    steps = StepPlan(
        windows,
        seq_len=config.seq_len,
        windows_per_step=found.state.windows_per_step,
    )
    return schedule.with_horizon(Horizon.of(config, steps))


def _restore_plugins(kernel: Kernel, schedule: Schedule, found: Checkpoint) -> None:
    """Restore the states of plugins and the data that they have saved."""
    manager, state = kernel.manager, found.state
    manager.step = state.step
    records = {name: record.model_dump() for name, record in state.plugin_records.items()}
    manager.failures.load_state_dict(records)
    for name in dict.fromkeys(boundary.plugin for boundary in schedule.boundaries()):
        record = manager.records.get(name)
        if record is not None and record.state == "active" and (why := state.why_dormant(name)):
            manager.set_state(name, "dormant", why)
    for plugin, own in joined_states(manager, state.plugins, found.plugins):
        calls = manager.order("apt_load_state_dict", dormant=True)
        if any("trainer" in call.argnames for call in calls if call.plugin == plugin):
            log.info("the state of plugin %s is for training, and is not restored", plugin)
        else:
            manager.call_plugin(plugin, "apt_load_state_dict", state=own)


# The model ---------------------------------------------------------------------------------------


def _built(kernel: Kernel, found: Checkpoint, device: torch.device) -> nn.Module:
    """The model with the structure of the checkpoint's, before its weights are loaded."""
    config = kernel.config
    model = ModelBuilder(config, kernel.registry).build_model(initialize=False)
    for _, transform in replayed(kernel, found.state.transforms, trains=False):
        model = materialize(
            transform,
            model,
            carry=False,
            seed=config.training.seed,
            num_layers=config.model.num_layers,
        )
    return model.to(device)


def _load(model: nn.Module, found: Checkpoint, name: str) -> None:
    """Give ``model`` its weights, those of ``name`` in place of its own parameters. Raises
    CheckpointError for weights that do not fit or are not finite."""
    found.tensors("model").read_into(model_tensors(model), "model")
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    if name != "model":
        found.tensors(name).read_into(parameters, "average of the weights")
    call_buffers_loaded(model)
    if bad := names_not_finite(parameters):
        raise CheckpointError(
            f"{found.path}: its weights are not finite ({listed(bad)}); open an earlier checkpoint"
        )


def _dtype(found: Checkpoint) -> torch.dtype | None:
    """The dtype in which the run computes. Raises CheckpointError for an unknown name."""
    dtype = getattr(torch, found.state.precision.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise CheckpointError(f"{found.path}: precision {found.state.precision!r} is no type")
    return None if dtype == torch.float32 else dtype
