"""Going on from a checkpoint: which one, whether it fits, and putting the trainer there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from apt_core.code_source import short_path
from apt_core.config.differences import differences
from apt_core.errors import CheckpointError, ConfigError, Problem
from apt_core.log import get_logger
from apt_core.modeling.carry import tell_buffers_loaded
from apt_core.planning.run_length import horizon, what_another_length_changes
from apt_core.runs import checkpoint
from apt_core.runs.checkpoint import Checkpoint
from apt_core.runs.resume_check import check_resume, saved_config, saved_profile
from apt_core.runs.state_tensors import (
    load_optimizer,
    load_optimizer_groups,
    model_tensors,
    restore_plugins,
)
from apt_core.secrets import with_secrets
from apt_core.training.diverging import listed, weights_not_finite

if TYPE_CHECKING:
    from apt_core.training.trainer import Trainer

log = get_logger("apt.checkpoint")

TEXTS = {"train": "training text", "val": "held-out text"}


def named_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at ``path``, or the newest intact one of the run there.

    Raises ConfigError if there is nothing, CheckpointError if nothing there is intact.
    """
    if not path.exists():
        raise ConfigError(
            Problem("there is no such checkpoint or run folder", "--resume-from", str(path))
        )
    if not path.is_dir():
        raise ConfigError(
            Problem("is a file: a checkpoint is a folder", "--resume-from", str(path))
        )
    if (path / "state.json").exists():
        return checkpoint.load(path)
    inside = path / "checkpoints"
    return checkpoint.newest_intact(inside if inside.is_dir() else path)


def restore(trainer: Trainer, found: Checkpoint) -> None:
    """Put the trainer where the checkpoint was taken. Raises CheckpointError, ConfigError."""
    kernel, state = trainer.kernel, found.state
    # First: without its plugin, every setting of an absent one differs too.
    trainer.switching.check_plugins(state["transforms"])
    _check_global_batch(trainer, state["windows_per_step"])
    _check_precision(trainer, state["precision"])
    changed = _check_profile(trainer, found)
    _check_providers(trainer, found.manifest)
    _check_tokens(trainer, found)
    trainer.switching.replay(state["transforms"])
    found.tensors("model").read_into(model_tensors(trainer.model), "model")
    tell_buffers_loaded(trainer.model)
    load_optimizer(
        trainer.model,
        trainer.optimizer,
        found.tensors("optimizer"),
        getattr(
            trainer.registry.get("optimizer", trainer.config.training.optimizer_name), "states", ()
        ),
    )
    _restore_groups(trainer, found)
    if trainer.ema is not None:
        found.tensors("ema").read_into(trainer.ema.values, "average of the weights")
    _restore_averages(trainer, found)
    _check_weights(trainer, found)
    trainer.step, trainer.epoch = state["step"], state["epoch"]
    trainer.resumed_step = trainer.step
    trainer.tokens, trainer.ended_epochs = state["tokens"], state["ended_epochs"]
    trainer.start_scores, trainer.scores = state["start_scores"], state["scores"]
    evaluated = checkpoint.read_evaluation(found.path)
    if evaluated is not None and evaluated.scores:
        trainer.scores = {"step": state["step"], **evaluated.scores}
    trainer.metrics, trainer.timeline = state["metrics"], state["timeline"]
    trainer.step_log.resume(state.get("spent", {}))
    trainer.guard.load(*state["nonfinite_steps"])
    trainer.modes.load_state_dict(state["modes"])
    if not trainer.stopping.load_state_dict(state["stopping"], trainer.evaluator.watched):
        kernel.notices.append(
            "evaluations watch other held-out windows than before: patience and the best loss "
            "begin anew"
        )
    trainer.stopping.check_limits(trainer.step)
    trainer.manager.step = trainer.step
    trainer.manager.failures.load_state_dict(state["plugin_records"])
    restore_plugins(trainer.manager, trainer, state["plugins"], found.plugins)
    kernel.notices.append(f"resumed from {short_path(str(found.path))} (step {trainer.step})")
    kernel.notices += _changed_plugins(trainer, found.manifest)
    if plugins := found.manifest.get("in_step"):
        kernel.notices.append(
            f"the checkpoint was written in the middle of a step, as the run died: {plugins} may "
            "have seen a part of that step, and go on from there"
        )
    kernel.notices += [f"{key} differs from the checkpoint's profile" for key in changed]
    _note_changes(trainer, found)
    kernel.notices += [
        f"plugin {r.name} stays quarantined, as in the checkpoint: {r.reason}"
        for r in kernel.manager.records.values()
        if r.state == "quarantined"
    ]


def _restore_groups(trainer: Trainer, found: Checkpoint) -> None:
    """Put back the optimizer's groups. Raises ConfigError where other ones are planned, naming the
    plugins that have a say in them."""
    kernel = trainer.kernel
    try:
        load_optimizer_groups(
            trainer.model,
            trainer.optimizer,
            found.state["optimizer_groups"],
            factors=_factors_of_rates(trainer, found),
        )
    except CheckpointError as error:
        used = kernel.registry.resolutions["optimizer", trainer.config.training.optimizer_name].used
        owner = kernel.registry.spec("optimizer", used).plugin
        plugins = [call.plugin for call in trainer.manager.order(GROUPS_HOOK, dormant=True)]
        plugins = [*dict.fromkeys([*plugins, *([owner] if owner != "core" else [])])]
        said = f"plugins that choose them: {', '.join(plugins)}" if plugins else "no plugin does so"
        raise ConfigError(
            Problem(
                f"{error} ({said})",
                key="plugins",
                hint="put the plugin back as it was, or start a new run: leave --resume out",
            )
        ) from None


def _factors_of_rates(trainer: Trainer, found: Checkpoint) -> tuple[float, float]:
    """By how much the run was told to change the rate, and that of hidden matrices."""
    before, now = saved_profile(found.profile), trainer.config.training
    rates = {
        "training.learning_rate": now.learning_rate,
        "training.muon.learning_rate": now.muon.learning_rate,
    }
    changed = {key: was for key, was, _ in differences(before, trainer.config.to_dict())}
    general, matrices = (
        rate / changed[key] if key in trainer.allow_change and changed.get(key) else 1.0
        for key, rate in rates.items()
    )
    return general, matrices


GROUPS_HOOK = "apt_param_groups"


def _restore_averages(trainer: Trainer, found: Checkpoint) -> None:
    """Put back the averages that plugins keep, of those that are active."""
    for index, saved in enumerate(found.state["averages"]):
        plugin, decay = saved["plugin"], saved["decay"]
        if trainer.manager.has_plugin(plugin):
            average = trainer.restore_average(plugin, decay, saved.get("asked"))
            found.tensors(f"average-{index}").read_into(average.values, f"average of {plugin}")
        else:
            log.warning("the checkpoint holds an average of plugin %s, which is not active", plugin)


def _check_global_batch(trainer: Trainer, before: int) -> None:
    """A step must take as many sequences as it did: only then is the position the same.

    Raises ConfigError.
    """
    now = trainer.parts.plan.windows_per_step
    if now == before:
        return
    batch_size, processes = trainer.config.training.batch_size, trainer.world_size
    steps, rest = divmod(before, batch_size * processes)
    raise ConfigError(
        Problem(
            f"a step takes {now} sequences ({batch_size} a micro-batch, {processes} processes), "
            f"and took {before} when the checkpoint was made",
            key="training.batch_size",
            hint=f"choose training.batch_size and training.grad_accum_steps for {before}"
            if rest
            else f"--training.grad_accum_steps {steps} makes it {before}",
        )
    )


def _check_precision(trainer: Trainer, before: str) -> None:
    """``auto`` may have chosen another type on another machine. Raises ConfigError."""
    now = str(trainer.parts.dtype or torch.float32)
    if now != before:
        value = "false" if before == "torch.float32" else "true"
        raise ConfigError(
            Problem(
                f"the forward computes in {now} here, and did in {before} when the checkpoint was "
                "made",
                key="training.mixed_precision",
                hint=f"--training.mixed_precision {value}",
            )
        )


def _check_tokens(trainer: Trainer, found: Checkpoint) -> None:
    """The ids must be those that the weights were trained and judged on. Raises CheckpointError."""
    data, state = trainer.parts.data, found.state
    now, before = data["tokens_sha256"], state.get("tokens_sha256")
    if before == now:
        return
    if state["data_sha256"] != data["sha256"]:
        raise CheckpointError(f"{found.path}: it was trained on another text than the profile's")
    name = trainer.config.data.tokenizer_name
    if not isinstance(before, Mapping):
        trainer.kernel.notices.append(
            f"the checkpoint does not say which token ids it was trained on: that tokenizer "
            f"{name!r} still makes the same ids is not checked"
        )
        return
    texts = [words for part, words in TEXTS.items() if before.get(part) != now[part]]
    raise CheckpointError(
        f"{found.path}: tokenizer {name!r} makes other token ids of the same text than this "
        f"checkpoint was trained on ({' and '.join(texts)}): its vocabulary, settings or code have "
        "changed; put them back, or start a new run"
    )


def _changed_plugins(trainer: Trainer, manifest: Mapping[str, Any]) -> Iterator[str]:
    """Plugins of the same name whose code is another one: that may be meant, and is told."""
    records = trainer.kernel.manager.records
    for row in manifest.get("plugins", []):
        before, record = row.get("source_sha256"), records.get(row.get("name"))
        if record is not None and before and record.source_sha256 not in ("", before):
            yield f"the code of plugin {record.name} differs from that of the checkpoint"


def _check_profile(trainer: Trainer, found: Checkpoint) -> list[str]:
    """Keys of the profile that differ from the checkpoint's and may. Raises ConfigError."""
    kernel, state, data = trainer.kernel, found.state, trainer.parts.data
    # What it says of secrets is not known, and need not be the same.
    profile = with_secrets(saved_profile(found.profile), trainer.config.to_dict(secrets=True))
    before = saved_config(profile, kernel.sections, kernel.idle)

    def another_past() -> str:
        if before is None:
            return "the learning rate and annealed parameters depend on the length of the run"
        return what_another_length_changes(
            kernel,
            horizon(before, trainer.parts.plan),
            trainer.schedule.horizon,
            trainer.parts.lr_schedule,
            state["step"],
        )

    same_text = state["data_sha256"] == data["sha256"]
    return check_resume(
        trainer.config,
        profile,
        before,
        unused=kernel.unused,
        same_text=same_text or state.get("tokens_sha256") == data["tokens_sha256"],
        another_past=another_past,
        allowed=trainer.allow_change,
        reporting=kernel.observed,
    )


def _check_weights(trainer: Trainer, found: Checkpoint) -> None:
    """Raises CheckpointError for weights that no step could change any more."""
    if bad := weights_not_finite(trainer, everywhere=True):
        raise CheckpointError(
            f"{found.path}: its weights are not finite ({listed(bad)}); name an earlier checkpoint "
            "with --resume-from, or start a new run"
        )


def _note_changes(trainer: Trainer, found: Checkpoint) -> None:
    """Record which rates the run has been told to change, and where: it is no longer a function of
    its profile alone."""
    trainer.changes = list(found.state.get("changes", []))
    saved, now = saved_profile(found.profile), trainer.config.to_dict()
    differing = {key: (old, new) for key, old, new in differences(saved, now)}
    for key in trainer.allow_change:
        if key in differing:
            before, after = differing[key]
            change = {"key": key, "step": trainer.step, "before": before, "after": after}
            trainer.changes.append(change)
            trainer.kernel.notices.append(
                f"{key}: {before} up to step {trainer.step}, {after} from there on"
            )
        else:
            trainer.kernel.notices.append(f"--allow-change {key}: it is what it was")


def _check_providers(trainer: Trainer, manifest: Mapping[str, Any]) -> None:
    """The same implementations must run: another one would be another model."""
    resolutions = trainer.kernel.registry.resolutions.values()
    here = {(row.kind, row.asked): row.used for row in resolutions}
    for row in manifest.get("providers", []):
        asked = row["kind"], row["asked"]
        used = here.get(asked)
        if used is not None and used != row["used"]:
            key = trainer.kernel.providers.get(asked)
            raise CheckpointError(
                f"{row['kind']}: the checkpoint was trained with {row['used']!r}, here "
                f"{used!r} would run" + (f"; ask for it: --{key} {row['used']}" if key else "")
            )
