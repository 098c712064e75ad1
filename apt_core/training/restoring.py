"""Finds a named checkpoint, checks that it fits the run, and restores the run from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from apt_core.config.differences import differences
from apt_core.errors import CheckpointError, ConfigError
from apt_core.kernel import Kernel
from apt_core.log import get_logger
from apt_core.modeling.carry import call_buffers_loaded
from apt_core.modeling.structure import require_plugins
from apt_core.planning.run_length import changes_of_length
from apt_core.runs.checkpoint import Checkpoint
from apt_core.runs.checkpoint_parts import (
    joined_states,
    listed,
    load_optimizer,
    load_optimizer_groups,
    model_tensors,
)
from apt_core.runs.resume_check import check_providers, check_resume, saved_config, saved_profile
from apt_core.runs.run_state import Change
from apt_core.runs.scores import read_evaluation
from apt_core.schedules import Horizon, Schedule
from apt_core.secrets import with_secrets
from apt_core.training.context import RunContext
from apt_core.training.curriculum.switching import Switching
from apt_core.training.step.usage import Usage

log = get_logger("apt.checkpoint")

TEXTS = {"train": "training text", "val": "held-out text"}


GROUPS_HOOK = "apt_param_groups"


class Restoring:
    """Restores a run from a checkpoint. ``allowed`` names settings that may differ from the
    checkpoint's."""

    def __init__(
        self,
        run: RunContext,
        schedule: Schedule,
        switching: Switching,
        usage: Usage,
        watched: str,
        allowed: Sequence[str],
    ) -> None:
        self._run, self._schedule, self._switching = run, schedule, switching
        self._usage, self._watched, self._allowed = usage, watched, allowed

    def restore(self, found: Checkpoint) -> None:
        """Restore the run. Raises CheckpointError or ConfigError if the checkpoint does not fit
        it."""
        kernel, state, trained = self._run.kernel, found.state, self._run.trained
        # Checked first: the settings of an absent plugin would all be reported as differences.
        require_plugins(kernel, (switch.plugin for switch in state.transforms))
        self._check_order(found)
        self._check_global_batch(state.windows_per_step)
        self._check_precision(state.precision)
        changed = self._check_profile(found)
        check_providers(kernel, found.manifest)
        self._check_tokens(found)
        self._check_windows(found)
        self._switching.replay(state.transforms)
        found.tensors("model").read_into(model_tensors(trained.model), "model")
        call_buffers_loaded(trained.model)
        provider = kernel.registry.get("optimizer", self._run.config.training.optimizer_name)
        load_optimizer(
            trained.model,
            trained.optimizer,
            found.tensors("optimizer"),
            getattr(provider, "states", ()),
        )
        self._restore_groups(found)
        if trained.averages.ema is not None:
            found.tensors("ema").read_into(trained.averages.ema.values, "average of the weights")
        self._restore_averages(found)
        self._check_weights(found)
        self._restore_progress(found)
        trained.guard.load(*state.nonfinite_steps)
        trained.modes.load(state.modes)
        if not self._run.stopping.load(state.stopping, self._watched):
            kernel.notices.append(
                "evaluations watch other held-out windows than before: patience and the best loss "
                "begin anew"
            )
        self._run.stopping.check_limits(state.step)
        self._run.manager.step = state.step
        records = {name: record.model_dump() for name, record in state.plugin_records.items()}
        self._run.manager.failures.load_state_dict(records)
        for plugin, own in joined_states(self._run.manager, state.plugins, found.plugins):
            self._run.manager.call_plugin(
                plugin, "apt_load_state_dict", trainer=self._run.trainer, state=own
            )
        kernel.notices += _changed_plugins(kernel, found.manifest)
        if plugins := found.manifest.get("in_step"):
            kernel.notices.append(
                f"the checkpoint was written in the middle of a step, as the run died: {plugins} "
                "may have seen a part of that step, and go on from there"
            )
        kernel.notices += [f"{key} differs from the checkpoint's profile" for key in changed]
        self._note_changes(found)
        kernel.notices += [
            f"plugin {r.name} stays quarantined, as in the checkpoint: {r.reason}"
            for r in self._run.manager.records.values()
            if r.state == "quarantined"
        ]

    def _restore_progress(self, found: Checkpoint) -> None:
        """Restore the progress, with the scores of an evaluation made after the checkpoint."""
        made = self._run.progress.transforms
        for name, value in found.state.progress:
            setattr(self._run.progress, name, value)
        self._run.progress.transforms = made  # recorded by the replay
        evaluated = read_evaluation(found.path)
        if evaluated is not None and evaluated.scores:
            self._run.progress.scores = {"step": found.state.step, **evaluated.scores}
        self._usage.resume(found.state.spent)

    def _restore_groups(self, found: Checkpoint) -> None:
        """Restore the optimizer's parameter groups. Raises ConfigError if this run's groups differ,
        and names the plugins that choose them."""
        kernel = self._run.kernel
        try:
            load_optimizer_groups(
                self._run.trained.model,
                self._run.trained.optimizer,
                found.state.optimizer_groups,
                factors=self._factors_of_rates(found),
            )
        except CheckpointError as error:
            asked = self._run.config.training.optimizer_name
            used = kernel.registry.resolutions["optimizer", asked].used
            owner = kernel.registry.spec("optimizer", used).plugin
            plugins = [call.plugin for call in self._run.manager.order(GROUPS_HOOK, dormant=True)]
            plugins = [*dict.fromkeys([*plugins, *([owner] if owner != "core" else [])])]
            chosen = ", ".join(plugins)
            said = f"plugins that choose them: {chosen}" if plugins else "no plugin does so"
            raise ConfigError(
                f"{error} ({said})",
                key="plugins",
                hint="put the plugin back as it was, or start a new run: leave --resume out",
            ) from None

    def _factors_of_rates(self, found: Checkpoint) -> tuple[float, float]:
        """Factors by which allowed changes multiply the learning rate, and that of hidden
        matrices."""
        before, now = saved_profile(found.profile), self._run.config.training
        rates = {
            "training.learning_rate": now.learning_rate,
            "training.muon.learning_rate": now.muon.learning_rate,
        }
        changed = {key: was for key, was, _ in differences(before, self._run.config.to_dict())}
        general, matrices = (
            rate / changed[key] if key in self._allowed and changed.get(key) else 1.0
            for key, rate in rates.items()
        )
        return general, matrices

    def _restore_averages(self, found: Checkpoint) -> None:
        """Restore the averages of the plugins that are active."""
        averages, model = self._run.trained.averages, self._run.trained.model
        for index, saved in enumerate(found.state.averages):
            plugin = saved.plugin
            if self._run.manager.has_plugin(plugin):
                average = averages.restore(plugin, saved.decay, saved.asked, model)
                found.tensors(f"average-{index}").read_into(average.values, f"average of {plugin}")
            else:
                log.warning(
                    "the checkpoint holds an average of plugin %s, which is not active", plugin
                )

    def _check_order(self, found: Checkpoint) -> None:
        """Raise CheckpointError for a run of a version that drew windows in another order: its
        position would stand for others."""
        if found.state.windows is None:
            raise CheckpointError(
                f"{found.path}: it was made when windows came in another order than now, so that "
                "what the run has seen would be seen again, and other windows never; start a new "
                "run: leave --resume out, or go on with the version of apt that made it"
            )

    def _check_windows(self, found: Checkpoint) -> None:
        """Raise CheckpointError if the same tokens are cut into other numbers of windows."""
        before, now = found.state.windows, list(self._run.parts.plan.order.sizes)
        if before != now:
            raise CheckpointError(
                f"{found.path}: an epoch had {before} windows of its sources, and has {now} here: "
                "the packing of documents has changed; start a new run"
            )

    def _check_global_batch(self, before: int) -> None:
        """Raise ConfigError if a step takes another number of sequences than ``before``: the
        position in the text would differ.
        """
        now = self._run.parts.plan.windows_per_step
        if now == before:
            return
        batch_size, processes = self._run.config.training.batch_size, self._run.world.size
        steps, rest = divmod(before, batch_size * processes)
        raise ConfigError(
            f"a step takes {now} sequences ({batch_size} a micro-batch, {processes} "
            f"processes), and took {before} when the checkpoint was made",
            key="training.batch_size",
            hint=f"choose training.batch_size and training.grad_accum_steps for {before}"
            if rest
            else f"--training.grad_accum_steps {steps} makes it {before}",
        )

    def _check_precision(self, before: str) -> None:
        """Raise ConfigError if the precision differs; ``auto`` depends on the machine."""
        now = str(self._run.parts.dtype or torch.float32)
        if now != before:
            value = "false" if before == "torch.float32" else "true"
            raise ConfigError(
                f"the forward computes in {now} here, and did in {before} when the checkpoint "
                "was made",
                key="training.mixed_precision",
                hint=f"--training.mixed_precision {value}",
            )

    def _check_tokens(self, found: Checkpoint) -> None:
        """Raise CheckpointError if the token ids differ from those that the weights were trained
        and evaluated on."""
        data, state = self._run.parts.data, found.state
        now, before = data.tokens_sha256, state.tokens_sha256
        if before == now:
            return
        if state.data_sha256 != data.sha256:
            raise CheckpointError(
                f"{found.path}: it was trained on another text than the profile's"
            )
        name = self._run.config.data.tokenizer_name
        if not isinstance(before, Mapping):
            self._run.kernel.notices.append(
                f"the checkpoint does not say which token ids it was trained on: that tokenizer "
                f"{name!r} still makes the same ids is not checked"
            )
            return
        texts = [words for part, words in TEXTS.items() if before.get(part) != now[part]]
        raise CheckpointError(
            f"{found.path}: tokenizer {name!r} makes other token ids of the same text than this "
            f"checkpoint was trained on ({' and '.join(texts)}): its vocabulary, settings or code "
            "have changed; put them back, or start a new run"
        )

    def _check_profile(self, found: Checkpoint) -> list[str]:
        """Keys that differ from the checkpoint's profile and may. Raises ConfigError for others."""
        kernel, state, data = self._run.kernel, found.state, self._run.parts.data
        # Saved profiles hide secrets, so this run's are filled in: they may differ.
        profile = with_secrets(saved_profile(found.profile), self._run.config.to_dict(secrets=True))
        before = saved_config(profile, kernel.sections, kernel.available)

        def another_past() -> str:
            if before is None:
                return "the learning rate and annealed parameters depend on the length of the run"
            return changes_of_length(
                kernel,
                Horizon.of(before, self._run.parts.plan.steps),
                self._schedule.horizon,
                self._run.parts.lr_schedule,
                state.step,
            )

        same_text = state.data_sha256 == data.sha256
        return check_resume(
            self._run.config,
            profile,
            before,
            inactive_settings=kernel.inactive_settings,
            same_text=same_text or state.tokens_sha256 == data.tokens_sha256,
            another_past=another_past,
            allowed=self._allowed,
            reporting=kernel.observed,
        )

    def _check_weights(self, found: Checkpoint) -> None:
        """Raise CheckpointError for weights that are not finite."""
        if bad := self._run.trained.not_finite(everywhere=True):
            raise CheckpointError(
                f"{found.path}: its weights are not finite ({listed(bad)}); name an earlier "
                "checkpoint with --resume-from, or start a new run"
            )

    def _note_changes(self, found: Checkpoint) -> None:
        """Record the allowed changes of rates and their step: the run is no longer a function of
        its profile alone."""
        saved, now = saved_profile(found.profile), self._run.config.to_dict()
        differing = {key: (old, new) for key, old, new in differences(saved, now)}
        for key in self._allowed:
            if key in differing:
                before, after = differing[key]
                step = self._run.progress.step
                change = Change(key=key, step=step, before=before, after=after)
                self._run.progress.changes.append(change)
                self._run.events.record(
                    "changed",
                    f"{key}: {before} up to step {step}, {after} from there on",
                    step=step,
                    log=log,
                    key=key,
                    before=before,
                    after=after,
                )
            else:
                self._run.kernel.notices.append(f"--allow-change {key}: it is what it was")


def _changed_plugins(kernel: Kernel, manifest: Mapping[str, Any]) -> Iterator[str]:
    """Notices about plugins whose code differs from that of the checkpoint, which is allowed."""
    records = kernel.manager.records
    for row in manifest.get("plugins", []):
        before, record = row.get("source_sha256"), records.get(row.get("name"))
        if record is not None and before and record.source_sha256 not in ("", before):
            yield f"the code of plugin {record.name} differs from that of the checkpoint"
