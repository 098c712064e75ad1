"""Scores the tasks of level to level (HLBD) of a run, trained and held-out ones apart."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

from apt_core import PluginInfo, ProviderSpec, SectionSpec, hookimpl
from apt_plugins.hlbd.settings import HLBDSettings, contradictions, settings_of, source_names

if TYPE_CHECKING:
    from apt_plugins.hlbd.scores import Scores

PLUGIN = PluginInfo(
    summary="exact match and character F1 of the tasks of the dataset hlbd, by their levels",
    version="1.0.0",
)

FILE = "hlbd.json"
"""The scores of the end, in the run's folder."""

SIDES = {"trained": "train", "held_out": "val"}
"""The sides of the split, each with the part of the store that has it."""

log = logging.getLogger("apt.hlbd")


class Plugin:
    """The scores of one run; ``_new`` are the figures that no row of metrics has yet."""

    def __init__(self) -> None:
        self._new: dict[str, float] = {}

    @hookimpl
    def apt_register_config(self) -> list[SectionSpec]:
        return [SectionSpec("hlbd", HLBDSettings, check=contradictions)]

    @hookimpl
    def apt_register_providers(self) -> list[ProviderSpec]:
        return [
            ProviderSpec(
                kind="task",
                name="hlbd",
                factory="apt_plugins.hlbd.task:HLBDTask",
                version=PLUGIN.version,
                summary="the run's held-out HLBD tasks",
            )
        ]

    @hookimpl
    def on_epoch_end(self, epoch: int, trainer: Any) -> None:
        every = settings_of(trainer.config).every_epochs
        if every and epoch % every == 0:
            for side, scores in self._scores(trainer).items():
                if scores.together.tasks:
                    row = scores.together.row()
                    self._new[f"{side}_exact_match"] = row["exact_match"]
                    self._new[f"{side}_character_f1"] = row["character_f1"]
                log.info("epoch %d, %s: %s", epoch, side.replace("_", " "), scores)

    @hookimpl
    def apt_metrics(self) -> dict[str, float]:
        found, self._new = self._new, {}
        return found

    @hookimpl
    def on_training_end(self, trainer: Any) -> None:
        from apt_core.files import write_atomically

        scores = self._scores(trainer)
        for side, each in scores.items():
            log.info("%s: %s", side.replace("_", " "), each)
            if each.by_task:
                log.info("%s, exact answers in percent:\n%s", side.replace("_", " "), each.table())
        if trainer.rank == 0:
            rows = {side: each.row() for side, each in scores.items()}
            text = json.dumps({"step": trainer.step, **rows}, indent=1)
            write_atomically(trainer.output_dir / FILE, text + "\n")

    def _scores(self, trainer: Any) -> dict[str, Scores]:
        """The scores of each side. Every process computes all of them: a sharded model takes part
        in all or in none."""
        from apt_core.evaluation.responses import answers
        from apt_plugins.hlbd.scores import scores_of, tasks_of

        settings, data = settings_of(trainer.config), trainer.data
        names = source_names(trainer.config)
        stores = [source.store for source in data.sources if source.name in names]
        found = {}
        for side, part in SIDES.items():
            tasks = tasks_of(
                [store.part(part) for store in stores], data.tokenizer, settings.max_tasks
            )
            log.info("%s: %s prompts are answered", side.replace("_", " "), f"{len(tasks):,}")
            given = answers(
                trainer.model,
                [pair for _, pair in tasks],
                device=trainer.device,
                vocab_size=data.tokenizer.vocab_size,
                max_seq_len=trainer.config.model.max_seq_len,
                batch_size=settings.batch_size,
                precision=trainer.autocast,
            )
            found[side] = scores_of(tasks, given, data.tokenizer)
        return found
