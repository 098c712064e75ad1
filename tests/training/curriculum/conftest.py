"""A curriculum of all four plugins at the size of a test: experts from epoch 2, alignment from step
9, voting from epoch 3."""

from __future__ import annotations

import configparser
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from apt_core.evaluation.tasks.held_out import ReasoningQuality
from apt_core.runs.checkpoint import list_checkpoints
from apt_core.testing import TINY_PROFILE, TinyRun, tiny_run
from apt_core.testing.tiny import TEXT

ROOT = Path(__file__).parents[3]
NAMES = ("moe", "align", "routing", "voter")

SETTINGS: dict[str, Any] = {
    "model.dropout": 0.1,
    "model.num_layers": 2,
    "model.tva.s": 1,
    "model.moe.experts": 4,
    "model.moe.top_k": 2,
    "model.moe.capacity": 1.25,
    "model.moe.dropless_steps": 1,
    "model.moe.shared_expert": "split",
    "routing.exploration": 0.5,
    "routing.balancing": "bias",
    "routing.bias_rate": 0.02,
    "training.max_epochs": 3,
    "training.batch_size": 5,
    "training.grad_accum_steps": 2,
    "training.log_every_steps": 1,
    "training.keep_last": 0,
    "training.warmup_steps": 3,
    "evaluation.eval_freq": 2,
    "evaluation.sample_tokens": 8,
    "hardware.num_threads": 1,
    "schedules.enable_moe_at_epoch": 2,
    "schedules.enable_align_at_step": 9,
    "schedules.enable_voter_at_epoch": 3,
    "schedules.route_temp": {"start": 1.5, "end": 0.8, "by": "epoch"},
    "schedules.moe_capacity": {"start": 1.2, "end": 1.0, "by": "step"},
    "schedules.align_weight": {"start": 0.1, "end": 0.3, "by": "step", "warmup": 10},
    "schedules.vote_threshold": {"start": 3.0, "end": 2.0, "by": "epoch"},
}
"""An epoch has five steps."""


@dataclass
class Curriculum:
    """The profile, trained in ``folder`` as often as asked."""

    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)

    def train(self, name: str, *plugins: Any, changes: Any = (), **options: Any) -> TinyRun:
        """A run in the folder ``name``; ``changes`` are settings of it alone."""
        overrides = {**SETTINGS, **self.settings, **dict(changes)}
        return tiny_run(
            *(f"apt_plugins.{plugin}.plugin" for plugin in NAMES),
            *plugins,
            profile=self._profile(),
            overrides={key: value for key, value in overrides.items() if value is not None},
            output=self.folder / name,
            **options,
        )

    def write(self, plugins: tuple[str, ...] = NAMES) -> Path:
        """The profile as a file, with ``plugins``."""
        data = {**self._profile(), "plugins": list(plugins)}
        for key, value in {**SETTINGS, **self.settings}.items():
            *path, last = key.split(".")
            section = data
            for part in path:
                section = section.setdefault(part, {})
            section[last] = value
        file = self.folder / "curriculum.yaml"
        file.write_text(yaml.safe_dump(data), encoding="utf-8")
        return file

    def checkpoints(self, name: str) -> list[Path]:
        return list_checkpoints(self.folder / name / "checkpoints")

    def log(self, name: str) -> str:
        return (self.folder / name / "log.txt").read_text(encoding="utf-8")

    def _profile(self) -> dict[str, Any]:
        text = self.folder / "text.txt"
        text.write_text(TEXT, encoding="utf-8")
        return {**copy.deepcopy(TINY_PROFILE), "data": {"train_path": str(text)}}


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plugins are found by the names that setup.cfg gives them, installed as it stands or not."""
    monkeypatch.delenv("APT_DISABLE_PLUGIN_AUTOLOAD", raising=False)
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    metadata = tmp_path / "site" / "apt_kernel-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: apt-kernel\nVersion: 0\n")
    points = setup["options.entry_points"]["apt.plugins"]
    (metadata / "entry_points.txt").write_text(f"[apt.plugins]{points}\n")
    monkeypatch.syspath_prepend(tmp_path / "site")


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that has learned nothing ends no answer."""
    monkeypatch.setattr(ReasoningQuality, "max_new_tokens", 8)


@pytest.fixture
def curriculum(tmp_path: Path) -> Curriculum:
    return Curriculum(tmp_path)


@pytest.fixture(scope="module")
def make_curriculum(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Mapping[str, Any]], Curriculum]:
    """For runs that several tests of a file look at."""
    return lambda settings: Curriculum(tmp_path_factory.mktemp("runs"), dict(settings))


@pytest.fixture
def profile(curriculum: Curriculum) -> Path:
    """What apt_train trains here."""
    return curriculum.write()
