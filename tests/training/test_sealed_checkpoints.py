"""What a checkpoint says of itself may agree throughout and still be nothing to go on with."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from apt_core.errors import CheckpointError
from apt_core.runs import checkpoint
from apt_core.runs.checkpoint_parts import load_optimizer, optimizer_tensors
from apt_core.runs.scores import EVALUATION
from apt_core.runs.tensor_files import SavedTensors, write_whole
from apt_core.testing import tiny_run

Seal = Callable[[Path], None]

OVERRIDES = {"training.save_every_steps": 1}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped") / "run"
    tiny_run(overrides=OVERRIDES, steps=4, output=folder, stop_at_step=2)
    return folder


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    shutil.copy(stopped.with_name("run.txt"), tmp_path / "run.txt")
    return shutil.copytree(stopped, tmp_path / "run")


def test_rows_that_call_the_kind_of_a_provider_its_slot_are_read(seal: Seal, run: Path) -> None:
    newest = run / "checkpoints" / "step-00000002"
    file = newest / "manifest.json"
    written = json.loads(file.read_text())
    rows = [dict(row) for row in written["providers"]]
    for row in written["providers"]:
        row["slot"] = row.pop("kind")
    file.write_text(json.dumps(written))
    seal(newest)
    assert checkpoint.load(newest).manifest["providers"] == rows


@pytest.mark.parametrize("wrong", [[], None, True, {}, "text", 10**400])
@pytest.mark.parametrize("key", ["loss", "scores"])
def test_scores_of_an_evaluation_are_numbers(run: Path, key: str, wrong: Any) -> None:
    path = run / "checkpoints" / "step-00000002" / EVALUATION
    scores = {"val_loss": wrong if key == "scores" else 1.0}
    record = {"watched": "w", "loss": wrong if key == "loss" else 1.0, "scores": scores}
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**record, "sha256": digest}))
    assert checkpoint.newest_intact(run / "checkpoints").state.step == 1


INNER = [
    ("state.json", ("optimizer_groups", 0, "settings", "maximize"), 1),
    ("state.json", ("optimizer_groups", 0, "settings", "eps"), "text"),
    ("state.json", ("optimizer_groups", 0, "settings", "eps"), True),
    ("state.json", ("tensors", "model", "final_norm.weight"), []),
    ("manifest.json", ("providers", 0, "kind"), [[]]),
    ("manifest.json", ("providers", 0, "asked"), None),
    ("manifest.json", ("providers", 0), {}),
    ("manifest.json", ("plugins",), [{"name": {}}]),
]  # fmt: skip


def test_the_one_before_is_used_where_an_inner_value_is_of_another_kind(
    seal: Seal, run: Path
) -> None:
    newest = run / "checkpoints" / "step-00000002"
    original = shutil.copytree(newest, run.parent / "original")
    for file, (*way, last), new in INNER:
        shutil.rmtree(newest)
        shutil.copytree(original, newest)
        value: Any = json.loads((newest / file).read_text())
        inner = value
        for key in way:
            inner = inner[key]
        inner[last] = new
        (newest / file).write_text(json.dumps(value))
        seal(newest)
        assert checkpoint.newest_intact(run / "checkpoints").state.step == 1, (file, way, new)


@pytest.mark.parametrize(
    ("state", "wrong", "said"),
    [
        ("exp_avg", torch.zeros(5), r"torch.float32 \[5\], not torch.float32 \[2, 3\]"),
        ("exp_avg", torch.zeros(()), r"\[\], not torch.float32 \[2, 3\]"),
        ("exp_avg_sq", torch.zeros(0), r"\[0\], not torch.float32 \[2, 3\]"),
        ("exp_avg_sq", torch.zeros(2, 3, dtype=torch.int64), "torch.int64"),
        ("exp_avg_sq", torch.zeros(2, 3, dtype=torch.float16), "torch.float16"),
        ("step", torch.zeros(3), r"\[3\], not torch.float32 \[\]"),
        ("step", torch.tensor(1), "torch.int64"),
        ("step", None, "AdamW does not take the state"),
    ],
)
def test_a_fused_step_gets_no_state_that_it_would_read_beyond(
    tmp_path: Path, state: str, wrong: torch.Tensor | None, said: str
) -> None:
    model = nn.Linear(3, 2, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    tensors = optimizer_tensors(model, optimizer)
    del tensors[f"weight//{state}"]
    if wrong is not None:
        tensors[f"weight//{state}"] = wrong
    write_whole(tmp_path / "optimizer", tensors)
    with pytest.raises(CheckpointError, match=said):
        load_optimizer(model, optimizer, SavedTensors(tmp_path / "optimizer"))


def test_the_first_step_blames_the_checkpoint_for_state_that_it_cannot_take(
    seal: Seal, run: Path
) -> None:
    """A flag that is one, and asks for moments that are not there."""
    for path in checkpoint.list_checkpoints(run / "checkpoints"):
        state = json.loads((path / "state.json").read_text())
        state["optimizer_groups"][0]["settings"]["amsgrad"] = True
        (path / "state.json").write_text(json.dumps(state))
        seal(path)
    with pytest.raises(CheckpointError, match=r"checkpoint of step 2 holds.*max_exp_avg_sq"):
        tiny_run(overrides=OVERRIDES, steps=4, output=run, resume=True)
