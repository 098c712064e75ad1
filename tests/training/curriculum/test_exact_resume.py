"""Promise 4 on either side of each switch of a curriculum, with all of its plugins on."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch

from apt_core.training import restoring
from apt_core.training.restoring import Restoring

if TYPE_CHECKING:
    from tests.training.curriculum.conftest import Curriculum

MOE, ALIGN, VOTER = 5, 8, 10
"""The last steps before each becomes enabled."""

VARIANTS: dict[str, dict[str, Any]] = {
    "shared": {"training.ema_decay": 0.9},
    # The values that routing has set last stay when it is disabled.
    "granular": {
        "model.moe.granularity": 2,
        "model.moe.scores": "sigmoid",
        "model.moe.shared_expert": "none",
        "training.optimizer_name": "muon",
        "schedules.disable_routing_at_step": 12,
    },
}
KILLS = {"shared": range(MOE - 1, VOTER + 2), "granular": (MOE, ALIGN, VOTER + 2)}
"""After these steps, one after another, the run of a variant is killed."""

SAVING = {"training.save_every_steps": 1}


@pytest.fixture(scope="module")
def whole(make_curriculum: Callable[..., Curriculum]) -> Callable[[str], tuple[Curriculum, Any]]:
    """A variant with its run in one go."""
    made: dict[str, tuple[Curriculum, Any]] = {}

    def get(variant: str) -> tuple[Curriculum, Any]:
        if variant not in made:
            curriculum = make_curriculum(VARIANTS[variant])
            made[variant] = curriculum, curriculum.train("whole", changes=SAVING)
        return made[variant]

    return get


def events(manifest: dict[str, Any]) -> list[tuple[str, str, int]]:
    return [(e["plugin"], e["event"], e["step"]) for e in manifest["timeline"]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_and_resumed_is_in_one_go(
    whole, in_children, differences, killer, variant: str
) -> None:
    """On either side of each switch, and where one process has taken no step but one."""
    curriculum, run = whole(variant)
    for n in KILLS[variant]:
        again = n > KILLS[variant][0]
        part = partial(curriculum.train, "killed", killer(n), changes=SAVING, resume=again)
        assert in_children(part) == [-signal.SIGKILL]
    resumed = curriculum.train("killed", resume=True)
    log = curriculum.log("killed")
    assert all(f"(step {n})" in log for n in KILLS[variant])
    folder = curriculum.folder
    assert differences(folder / "whole", folder / "killed") == []
    for key in ("sample", "switches", "timeline"):
        assert resumed.manifest[key] == run.manifest[key]


@pytest.mark.parametrize("variant", VARIANTS)
def test_everything_that_is_compared_takes_part(whole, variant: str) -> None:
    curriculum, run = whole(variant)
    seen = events(run.manifest)
    expected = [("moe", MOE + 1), ("align", ALIGN + 1), ("voter", VOTER + 1)]
    assert [event for event in seen if event[0] != "routing"] == [
        (plugin, "enabled", step) for plugin, step in expected
    ]
    last = [row for row in run.metrics if "loss" in row][-1]
    assert {"moe.balance", "moe.z", "align.kl", "align.info_nce"} <= {
        key.removeprefix("loss/") for key in last
    }
    assert any(row.get("moe/drop_rate", 0) > 0 for row in run.metrics)
    assert run.manifest["sample"]
    assert "8 of 8 tokens were put to the vote" in curriculum.log("whole")
    saved = torch.cat([t.flatten() for t in biases(curriculum)])
    assert saved.abs().max() > 0


def biases(curriculum: Curriculum) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    saved = load_file(curriculum.checkpoints("whole")[-1] / "model.safetensors")
    return [tensor for name, tensor in saved.items() if name.endswith("router.bias")]


def without_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    restore = Restoring.restore

    def restored(self: Any, found: Any) -> None:
        restore(self, found)
        for name, buffer in self._run.trained.model.named_buffers():
            if name.endswith("router.bias"):
                buffer.zero_()

    monkeypatch.setattr(Restoring, "restore", restored)


def without_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Restoring, "_restore_averages", lambda self, found: None)


def without_routing_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restoring, "call_buffers_loaded", lambda model: None)


@pytest.mark.parametrize(
    ("forget", "variant", "n", "seen_in"),
    [
        (without_bias, "shared", MOE + 1, "router.bias"),
        (without_teacher, "shared", ALIGN + 1, "average-"),
        (without_routing_values, "granular", VOTER + 2, "loss"),
    ],
)
def test_what_is_not_restored_is_noticed(
    whole, differences, monkeypatch, forget, variant, n, seen_in
) -> None:
    curriculum, _ = whole(variant)
    name = forget.__name__
    shutil.copytree(curriculum.folder / "whole", curriculum.folder / name)
    forget(monkeypatch)
    start = curriculum.folder / name / "checkpoints" / f"step-{n:08d}"
    curriculum.train(name, resume_from=start)
    found = differences(curriculum.folder / "whole", curriculum.folder / name)
    assert any(seen_in in item for item in found)
