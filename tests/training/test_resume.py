"""Promise 4: a run that was stopped in any way goes on bit-exactly, or says why it cannot."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

DROPOUT = ("--model.dropout", "0.2", "--training.grad_accum_steps", "2")

STOP = """
from apt_core import hookimpl

@hookimpl
def on_step_end(step, trainer):
    if step == {step}:
        {action}
"""


def stopping_plugin(folder: Path, step: int, action: str) -> str:
    path = folder / "stopper.py"
    path.write_text(STOP.format(step=step, action=action), encoding="utf-8")
    return str(path)


def training_rows(run) -> list[tuple]:
    return [(r["step"], r["loss"], r["grad_norm"]) for r in run.metrics if "loss" in r]


def test_stopped_and_resumed_equals_in_one_go(apt_train, tmp_path):
    """Again and again: before, at and after the end of the first epoch (6 steps), with dropout."""
    whole = apt_train(*DROPOUT, name="whole")
    assert whole.code == 0, whole.err
    resume: tuple[str, ...] = ()
    for step in (1, 5, 6, 7, 11):
        folder = tmp_path / f"stops-{step}"
        folder.mkdir()
        plugin = stopping_plugin(folder, step, "trainer.request_stop('enough')")
        part = apt_train(*DROPOUT, "--plugin", plugin, *resume, name="parts")
        assert (part.code, part.manifest["status"]) == (0, "stopped"), part.err
        assert part.manifest["step"] == step
        resume = ("--resume",)
    second = apt_train(*DROPOUT, "--resume", name="parts")
    assert second.code == 0, second.err
    assert second.manifest["step"] == whole.manifest["step"] > step
    assert whole.same_weights(second)
    assert training_rows(whole) == training_rows(second)
    assert whole.manifest["figures"]["val_loss"] == second.manifest["figures"]["val_loss"]


def test_a_broken_state_item_is_noticed(apt_train, tmp_path, monkeypatch):
    """The control: without the optimizer's moments the weights do differ."""
    whole = apt_train(name="whole")
    plugin = stopping_plugin(tmp_path, 5, "trainer.request_stop('enough')")
    apt_train("--plugin", plugin, name="parts")
    monkeypatch.setattr("apt_core.training.restoring.load_optimizer", lambda *arguments: None)
    second = apt_train("--resume", name="parts")
    assert not whole.same_weights(second)


@pytest.mark.usefixtures("forked")
def test_sigkill_in_mid_epoch(apt_train, tmp_path, profile):
    whole = apt_train(*DROPOUT, "--training.save_every_steps", "2", name="whole")
    plugin = stopping_plugin(tmp_path, 5, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    killed = subprocess.run(
        [
            sys.executable, "-m", "apt_core", "train", "-p", str(profile), *DROPOUT,
            "--training.save_every_steps", "2", "--plugin", plugin,
            "--output", str(tmp_path / "parts"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL
    second = apt_train(*DROPOUT, "--training.save_every_steps", "2", "--resume", name="parts")
    assert second.code == 0, second.err
    assert "resumed from" in second.out and "step-00000004" in second.out
    assert whole.same_weights(second)
    assert training_rows(whole) == training_rows(second)


SIGNALS = {signal.SIGINT: (130, 3), signal.SIGTERM: (143, 6), signal.SIGHUP: (129, 8)}
"""The exit code, and the step in which the run is told."""


@pytest.mark.usefixtures("forked")
def test_a_signal_ends_with_a_usable_checkpoint(apt_train, tmp_path, profile):
    whole = apt_train(name="whole")
    resume: tuple[str, ...] = ()
    for number, (code, step) in SIGNALS.items():
        folder = tmp_path / number.name
        folder.mkdir()
        process = subprocess.Popen(
            [
                sys.executable, "-m", "apt_core", "train", "-p", str(profile), *resume,
                "--output", str(tmp_path / "parts"), "--plugin",
                stopping_plugin(folder, step, f"import os; os.kill(os.getpid(), {int(number)})"),
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip
        output, _ = process.communicate(timeout=120)
        assert process.returncode == code, output
        assert "to go on: apt-train" in output and "--resume" in output
        assert "Traceback" not in output
        resume = ("--resume",)
    second = apt_train("--resume", name="parts")
    assert second.code == 0, second.err
    assert whole.same_weights(second)


@pytest.mark.usefixtures("forked")
def test_nohup_is_respected(tmp_path, profile):
    plugin = stopping_plugin(tmp_path, 2, f"import os; os.kill(os.getpid(), {int(signal.SIGHUP)})")
    heard = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        done = subprocess.run(
            [
                sys.executable, "-m", "apt_core", "train", "-p", str(profile), "--plugin",
                plugin, "--output", str(tmp_path / "run"), "--training.max_steps", "4",
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGHUP, heard)
    assert done.returncode == 0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["status"], manifest["step"]) == ("finished", 4)


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[-1] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()


@pytest.mark.parametrize(
    ("file", "how"), [("model.safetensors", "flipped"), ("manifest.json", "missing")]
)
def test_a_damaged_checkpoint_is_skipped_loudly(apt_train, tmp_path, file, how):
    """test_checkpoints.py damages every file in every way."""
    whole = apt_train("--training.save_every_steps", "2", name="whole")
    plugin = stopping_plugin(tmp_path, 6, "trainer.request_stop('enough')")
    first = apt_train("--training.save_every_steps", "2", "--plugin", plugin, name="parts")
    damage(first.checkpoints[-1] / file, how)
    second = apt_train("--training.save_every_steps", "2", "--resume", name="parts")
    assert second.code == 0, second.err
    assert "checkpoint skipped" in second.out
    assert "step-00000004" in second.out
    assert whole.same_weights(second)


def test_no_intact_checkpoint_is_an_error(apt_train):
    first = apt_train("--training.max_steps", "3")
    for path in first.checkpoints:
        damage(path / "model.safetensors", "flipped")
    second = apt_train("--training.max_steps", "3", "--resume")
    assert second.code == 1
    assert "no intact checkpoint" in second.err and "sha256" in second.err


def test_a_checkpoint_never_runs_code(apt_train, tmp_path, vouch):
    """A profile inside a checkpoint is read as plain data."""
    first = apt_train("--training.max_steps", "3")
    folder = first.checkpoints[-1]
    marker = tmp_path / "marker"
    evil = f"!!python/object/apply:os.system ['touch {marker}']\n"
    (folder / "profile.yaml").write_text(evil, encoding="utf-8")
    vouch(folder, {"profile.yaml": hashlib.sha256(evil.encode()).hexdigest()})
    second = apt_train("--training.max_steps", "3", "--resume")
    assert second.code == 1
    assert "profile cannot be read" in second.err
    assert not marker.exists()


def test_an_output_folder_in_use_is_refused(apt_train):
    apt_train("--training.max_steps", "2")
    again = apt_train("--training.max_steps", "2")
    assert again.code == 2
    assert "in use" in again.err and "--resume" in again.err


def test_resume_without_a_run_is_refused(apt_train):
    run = apt_train("--resume", name="nothing")
    assert run.code == 2
    assert "no run to resume" in run.err


def test_a_run_that_was_killed_before_its_manifest_begins_anew(apt_train, tmp_path):
    (tmp_path / "killed" / "checkpoints").mkdir(parents=True)
    run = apt_train("--resume", "--training.max_steps", "1", name="killed")
    assert run.code == 0
    assert "before its first checkpoint" in run.out


@pytest.mark.parametrize(
    ("key", "value"), [("training.learning_rate", "0.5"), ("training.max_steps", "5")]
)
def test_a_key_that_changes_training_is_refused(apt_train, key, value):
    apt_train("--training.max_steps", "3")
    second = apt_train("--training.max_steps", "3", f"--{key}", value, "--resume")
    assert second.code == 2
    assert key in second.err
    assert "Traceback" not in second.err


def test_a_free_key_may_change_and_is_told(apt_train):
    plugin_free = ("--training.max_steps", "3")
    apt_train(*plugin_free)
    second = apt_train(*plugin_free, "--training.log_every_steps", "1", "--resume")
    assert second.code == 0, second.err
    assert "training.log_every_steps differs" in second.out


def test_resume_from_an_older_checkpoint_sets_the_newer_ones_aside(apt_train):
    first = apt_train("--training.save_every_steps", "2", "--training.keep_last", "0")
    older = next(path for path in first.checkpoints if path.name == "step-00000004")
    second = apt_train(
        "--training.save_every_steps", "2", "--training.keep_last", "0",
        "--resume-from", str(older),
    )  # fmt: skip
    assert second.code == 0, second.err
    assert list((second.folder / "checkpoints").glob("superseded-*"))
    assert training_rows(second)[0][0] < 4 < training_rows(second)[-1][0]
    assert len({row[0] for row in training_rows(second)}) == len(training_rows(second))


@pytest.mark.usefixtures("forked")
def test_a_run_that_was_killed_before_its_first_checkpoint_starts_anew(
    apt_train, tmp_path, profile
):
    plugin = stopping_plugin(tmp_path, 3, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    subprocess.run(
        [
            sys.executable, "-m", "apt_core", "train", "-p", str(profile), "--plugin", plugin,
            "--output", str(tmp_path / "parts"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )  # fmt: skip
    whole = apt_train(name="whole")
    second = apt_train("--resume", name="parts")
    assert second.code == 0, second.err
    assert "starting anew" in second.out
    assert whole.same_weights(second)
    assert training_rows(whole) == training_rows(second)


@pytest.mark.usefixtures("forked")
def test_two_runs_in_one_folder_are_refused(apt_train, tmp_path, profile):
    apt_train("--training.max_steps", "3", name="parts")
    plugin = tmp_path / "second.py"
    plugin.write_text(
        "import subprocess, sys\nfrom apt_core import hookimpl\n\n"
        "@hookimpl\ndef on_training_start(trainer):\n"
        "    done = subprocess.run([sys.executable, '-m', 'apt_core', 'train', '-p', "
        f"{str(profile)!r}, '--training.max_steps', '3', '--output', str(trainer.folder.path), "
        "'--resume'], capture_output=True, text=True)\n"
        "    print(done.returncode, done.stderr)\n",
        encoding="utf-8",
    )
    second = apt_train(
        "--training.max_steps", "3", "--plugin", str(plugin), "--resume", name="parts"
    )
    assert second.code == 0, second.err
    assert "2 error" in second.out and "another run is going on" in second.out


def test_a_lost_manifest_costs_nothing_where_checkpoints_are(apt_train):
    first = apt_train("--training.max_steps", "3")
    (first.folder / "manifest.json").unlink()
    second = apt_train("--training.max_steps", "3", "--resume")
    assert second.code == 0, second.err
    assert second.manifest["status"] == "finished"


def test_a_finished_run_that_is_resumed_adds_no_row(apt_train):
    first = apt_train("--training.max_steps", "3")
    rows = first.metrics
    second = apt_train("--training.max_steps", "3", "--resume")
    assert second.metrics == rows


def test_quarantine_survives_a_resume(apt_train, tmp_path):
    failing = tmp_path / "failing.py"
    failing.write_text(
        "from apt_core import hookimpl\n\n@hookimpl\ndef on_step_end(step, trainer):\n"
        "    if step == 4:\n        trainer.request_stop('half')\n    raise ValueError('boom')\n",
        encoding="utf-8",
    )
    stopper = stopping_plugin(tmp_path, 4, "trainer.request_stop('half')")
    apt_train("--plugin", f"{failing},{stopper}")
    second = apt_train("--plugin", str(failing), "--resume")
    assert second.code == 0, second.err
    assert "stays quarantined" in second.out
    row = next(row for row in second.manifest["plugins"] if row["name"] == "failing")
    assert (row["state"], len(row["failures"])) == ("quarantined", 3)


ENDINGS = """
import os, signal
from apt_core import hookimpl

state = {{"ended": [], "evaluated": 0}}

@hookimpl
def on_epoch_end(epoch):
    state["ended"].append(epoch)

@hookimpl
def on_evaluation_start(trainer):
    state["evaluated"] += 1
    if {kill} and trainer.step == 12 and not os.path.exists({marker!r}):
        open({marker!r}, "w").close()
        os.kill(os.getpid(), signal.{number})

@hookimpl
def apt_state_dict(trainer):
    return state

@hookimpl
def apt_load_state_dict(trainer, state):
    globals()["state"].update(state)

@hookimpl
def apt_metrics(trainer):
    return {{"ended": len(state["ended"])}}
"""


@pytest.mark.parametrize("number", ["SIGINT", "SIGKILL"])
@pytest.mark.usefixtures("forked")
def test_an_epoch_that_was_not_ended_is_ended_by_the_resume(apt_train, tmp_path, profile, number):
    """The signal comes in the evaluation at the end of epoch 1, on a step that is saved too."""
    plugin = tmp_path / "endings.py"
    marker = str(tmp_path / "marker")
    saves = ("--training.save_every_steps", "4", "--evaluation.save_best", "true")
    plugin.write_text(ENDINGS.format(kill=False, marker=marker, number=number))
    whole = apt_train("--plugin", str(plugin), *saves, name="whole")
    plugin.write_text(ENDINGS.format(kill=True, marker=marker, number=number))
    subprocess.run(
        [
            sys.executable, "-m", "apt_core", "train", "-p", str(profile), *saves,
            "--plugin", str(plugin), "--output", str(tmp_path / "parts"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )  # fmt: skip
    assert Path(marker).exists()
    second = apt_train("--plugin", str(plugin), *saves, "--resume", name="parts")
    assert second.code == 0, second.err
    assert whole.same_weights(second)
    evaluated = [[r["step"] for r in run.metrics if "val_loss" in r] for run in (whole, second)]
    assert evaluated[0] == evaluated[1]
    ended = [[r["endings/ended"] for r in run.metrics if "loss" in r] for run in (whole, second)]
    assert ended[0] == ended[1]


def test_what_a_killed_save_left_is_cleared_and_what_it_moved_comes_back(apt_train):
    first = apt_train("--training.max_steps", "3")
    folder = first.checkpoints[0].parent
    (folder / ".step-00000009.123.tmp").mkdir()
    first.checkpoints[0].rename(folder / ".step-00000003.replaced.tmp")
    second = apt_train("--training.max_steps", "3", "--resume")
    assert second.code == 0, second.err
    assert [path.name for path in folder.iterdir()] == ["step-00000003"]


def test_an_optimizer_that_keeps_numbers_in_its_groups_goes_on_with_them(apt_train, tmp_path):
    plugin = tmp_path / "counting.py"
    plugin.write_text(
        "import torch\nfrom apt_core import ProviderSpec, hookimpl\n\n"
        "class Counting(torch.optim.SGD):\n"
        "    def step(self, closure=None):\n"
        "        for group in self.param_groups:\n"
        "            group['k'] = group.get('k', 0) + 1\n"
        "            group['weight_decay'] = 1e-3 * group['k']\n"
        "        return super().step(closure)\n\n"
        "class Provider:\n    def __init__(self, config): pass\n"
        "    def create(self, groups, *, learning_rate, weight_decay):\n"
        "        return Counting(groups, lr=learning_rate)\n\n"
        "@hookimpl\ndef apt_register_providers():\n"
        "    return [ProviderSpec('optimizer', 'counting', Provider)]\n",
        encoding="utf-8",
    )
    chosen = ("--plugin", str(plugin), "--training.optimizer_name", "counting")
    whole = apt_train(*chosen, name="whole")
    stopper = stopping_plugin(tmp_path, 5, "trainer.request_stop('half')")
    apt_train(*chosen, "--plugin", stopper, name="parts")
    second = apt_train(*chosen, "--resume", name="parts")
    assert second.code == 0, second.err
    assert whole.same_weights(second)


def test_plugin_state_survives_a_resume(apt_train, tmp_path):
    """JSON and tensors, nested, with non-ASCII keys."""
    plugin = tmp_path / "counter.py"
    plugin.write_text(
        "import torch\nfrom apt_core import hookimpl\n\n"
        "state = {'数': 0, 'deep': [{'tensor': torch.zeros(2)}]}\n\n"
        "@hookimpl\ndef on_step_end(step, trainer):\n    state['数'] += 1\n"
        "    state['deep'][0]['tensor'] += step\n"
        "    if step == 3 and trainer.config.evaluation.sample_tokens == 3:\n"
        "        trainer.request_stop('half')\n\n"
        "@hookimpl\ndef apt_state_dict(trainer):\n    return state\n\n"
        "@hookimpl\ndef apt_load_state_dict(trainer, state):\n"
        "    globals()['state'] = state\n\n"
        "@hookimpl\ndef apt_metrics(trainer):\n"
        "    return {'count': state['数'], 'sum': state['deep'][0]['tensor'].sum()}\n",
        encoding="utf-8",
    )
    whole = apt_train("--plugin", str(plugin), name="whole")
    apt_train("--plugin", str(plugin), "--evaluation.sample_tokens", "3", name="parts")
    second = apt_train("--plugin", str(plugin), "--resume", name="parts")
    assert second.code == 0, second.err
    assert whole.metrics[-2]["counter/count"] == second.metrics[-2]["counter/count"]
    assert whole.metrics[-2]["counter/sum"] == second.metrics[-2]["counter/sum"]
