"""``apt-train --verify-resume``: promise 4 on the user's own profile and plugins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from apt_core.cli.run_command import run_command
from apt_core.cli.train import app
from apt_core.errors import TrainingError

PLUGIN = """
import torch
from apt_core import hookimpl

counter = {"steps": 0, "seen": torch.zeros(1)}

@hookimpl
def apt_loss_terms(output):
    return {"term": 0.01 * (counter["steps"] + 1) * output.logits.square().mean()}

@hookimpl
def on_step_end():
    counter["steps"] += 1
    counter["seen"] += 1
"""
KEEPS_ITS_STATE = """
@hookimpl
def apt_state_dict(trainer):
    return counter

@hookimpl
def apt_load_state_dict(trainer, state):
    globals()["counter"] = state
"""
FORGETS_A_PART = """
since = 0

@hookimpl
def apt_state_dict(trainer):
    return {**counter, "since": since}

@hookimpl
def apt_load_state_dict(trainer, state):
    counter["steps"] = state["steps"]

@hookimpl
def on_step_start():
    globals()["since"] += 1
"""
FAILS = """
from apt_core import hookimpl

@hookimpl
def on_metrics():
    raise ValueError("broken")
"""
QUICK = (
    "--hardware.num_threads", "1", "--model.dropout", "0.1", "--training.grad_accum_steps", "2",
    "--training.ema_decay", "0.9", "--evaluation.eval_freq", "3", "--stop-at-step", "8",
)  # fmt: skip


@pytest.fixture
def verify(profile, tmp_path, capsys, monkeypatch, forked) -> Callable[..., tuple[int, str, str]]:
    """Verify the tiny profile with this plugin; the exit code and what was printed."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def call(plugin: str, *arguments: str) -> tuple[int, str, str]:
        path = tmp_path / "counting.py"
        path.write_text(plugin, encoding="utf-8")
        words = ["-p", str(profile), "--plugin", str(path), "--verify-resume", *QUICK, *arguments]
        code = run_command(app, "apt-train", words)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


TRACKER = """
from pathlib import Path
from apt_core import SectionSpec, hookimpl
from apt_core.config import Section

class Settings(Section):
    pass

@hookimpl
def apt_register_config():
    return [SectionSpec("monitoring.tracker", Settings)]

@hookimpl
def on_metrics():
    Path(__file__).with_name("told").touch()
"""


def test_a_profile_that_resumes_exactly_passes_and_no_tracker_is_told(verify, tmp_path):
    """Beside the verdict it is said which plugin has failed, and which was not enabled yet."""
    words = ["--output", str(tmp_path / "verified"), "--set", "schedules.enable_late_at_step=9"]
    for name, source in {"tracker": TRACKER, "failing": FAILS, "late": PLUGIN}.items():
        (tmp_path / f"{name}.py").write_text(source)
        words += ["--plugin", str(tmp_path / f"{name}.py")]
    code, out, err = verify(PLUGIN + KEEPS_ITS_STATE, *words)
    assert code == 0, out + err
    assert "note: plugin failing is " in out
    assert "failed in on_metrics at " in out
    assert "ValueError: broken (in one go and resumed); what it did not do was not compared" in out
    assert "note: nothing was compared of late, not enabled after 8 steps" in out
    assert "left out: tracker" in out and not (tmp_path / "told").exists()
    assert "bit-equal: " in out
    for part in ("of model", "of optimizer", "of ema", "1 tensors of plugins", "rows of metrics"):
        assert part in out
    killed = Path(tmp_path / "verified" / "killed_and_resumed" / "log.txt").read_text()
    assert "(step 4)" in killed


def test_a_plugin_that_does_not_save_its_state_is_found(verify):
    code, out, err = verify(PLUGIN)
    assert code == 1
    assert "resuming is not exact" in err
    assert "differs: model: " in out
    assert "differs: loss/counting.term after step 5" in out
    assert "Traceback" not in err


def test_a_part_of_a_plugins_state_that_is_not_restored_is_found(verify):
    """It changes neither the weights nor a row."""
    code, out, err = verify(PLUGIN + FORGETS_A_PART)
    assert code == 1
    assert "differs: plugins: counting.seen#0" in out
    assert "differs: the state of plugin counting" in out
    assert "2 differences" in err


@pytest.mark.long
def test_two_processes_with_a_sharded_model_are_verified(verify):
    code, out, err = verify(
        PLUGIN + KEEPS_ITS_STATE, "--nproc", "2", "--hardware.distributed", "fsdp",
    )  # fmt: skip
    assert code == 0, out + err
    assert "of optimizer" in out


def test_it_goes_without_resume(verify):
    code, _, err = verify(PLUGIN, "--resume")
    assert code == 2
    assert "--verify-resume goes without --resume" in err


@pytest.mark.parametrize(("device", "deterministic"), [("cuda", True), ("cpu", False)])
def test_a_gpu_is_compared_with_deterministic_kernels(verify, monkeypatch, device, deterministic):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    commands: list[Sequence[str]] = []

    def ran(command: Sequence[str]) -> None:
        commands.append(command)
        raise TrainingError("enough")

    monkeypatch.setattr("apt_core.training.verify._run", ran)
    code, out, _ = verify(PLUGIN, "--hardware.device", device)
    assert code == 1
    assert ("training.deterministic=true" in commands[0]) is deterministic
    assert ("training.deterministic is on" in out) is deterministic
