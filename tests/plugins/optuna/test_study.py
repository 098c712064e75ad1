"""Studies: trials pause and go on, die and are continued, fail, and are joined by others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from apt_core.json_files import read_json
from apt_core.parallel.child_process import command_of
from tests.optional import optional

pytestmark = pytest.mark.long

optuna = optional("optuna", 'needs pip install "apt-kernel[optuna]"')

STEPS = 9
TWO_WORKERS = ("-p", "tiny.yaml", "--space", "space.yaml", "--trials", "6", "--workers", "2")


def rows_of(tune, study="studies/tiny", *words):
    code, out, _ = tune("show", study, "--json", *words)
    assert code == 0
    return json.loads(out)


def test_a_study_pauses_trials_and_finds_better_than_the_profile(tune, here):
    from apt_core.runs import open_run
    from apt_core.runs.compare import compare_runs

    code, out, err = tune("--trials", "5")
    assert code == 0, err
    shown = rows_of(tune)
    assert shown["counts"]["complete"] + shown["counts"]["pruned"] == 5
    own, best = shown["trials"][0], shown["best"]
    assert own["baseline"] and own["state"] == "complete" and own["step"] == STEPS
    assert shown["counts"]["pruned"] and best["value"] < own["value"]
    assert "paused at step 1 of 9" in out and "goes on from step 1 of 9" in out
    assert f"best: trial {best['number']}" in out and "the profile itself" in out

    # A trial is a run like any other: it says whose it is, and opens.
    trial = Path("studies/tiny/trials") / f"{best['number']:04d}"
    told = read_json(trial / "manifest.json")["trial"]
    assert told["number"] == best["number"] and told["params"] == best["params"]
    assert told["study"] == "tiny" and Path(told["folder"]).samefile("studies/tiny")
    assert open_run(trial).position.step == STEPS

    # The best profile trains to the same bits, in one go and without the study's plugin.
    from apt_core.kernel import boot
    from apt_core.training import Trainer

    kernel = boot("studies/tiny/best.yaml")
    assert kernel.config.name == "tiny-tuned"
    assert kernel.config.training.learning_rate == best["params"]["training.learning_rate"]
    Trainer(kernel, output="once").fit()
    compared = compare_runs(Path("once"), trial)
    assert [str(each) for each in compared.differences if not each.what.startswith(OWN)] == []
    assert any("tensors" in each for each in compared.compared)

    # The same command again has nothing to do; more trials go on from where it ended.
    journal = Path("studies/tiny/journal.log")
    before = journal.stat().st_size
    assert tune("--trials", "5")[0] == 0
    assert journal.stat().st_size == before


OWN = ("the profile", "the state: plugin_records", "the state: scores")
"""What a run with the study's plugin in its list has otherwise, and one that was evaluated where it
paused."""


class Fakes:
    """Trains no model: ``train`` gives what a trial's training would, by its number and values."""

    def __init__(self) -> None:
        self.calls = []
        self.fails = {}

    def train(self, tuned, study, work, **options):
        from apt_plugins.optuna.trial_runs import Outcome

        self.calls.append((work.number, work.target))
        if problem := self.fails.get(work.number):
            raise problem if isinstance(problem, BaseException) else AssertionError
        step = (1, 3, 9)[work.target] if len(study.settings.rungs) == 3 else 9
        value = abs(work.params.get("training.learning_rate", 0.0) - 0.01) + 1 / step
        study.note(work.trial_id, total_steps=9)
        return Outcome("complete" if step == 9 else "paused", step, value)


@pytest.fixture
def fake(monkeypatch):
    fakes = Fakes()
    from apt_plugins.optuna.checking import Checked

    def check(space, kernel, boot):
        return Checked(space)

    monkeypatch.setattr("apt_plugins.optuna.worker.train", fakes.train)
    # Each takes a profile's checking, which other tests do.
    monkeypatch.setattr("apt_plugins.optuna.worker.Worker._refusal", lambda self, values: None)
    monkeypatch.setattr("apt_plugins.optuna.checking.check_space", check)
    monkeypatch.setattr("apt_plugins.optuna.worker.POLL_SECONDS", 0.0)
    return fakes


def counts(shown):
    return {state: count for state, count in shown["counts"].items() if count}


def test_values_are_a_function_of_the_study_so_far(tune, fake, here):
    """Whether it is interrupted does not matter, and no values are drawn twice."""
    assert tune("--trials", "11", "--study", "whole")[0] == 0
    for trials in (4, 11):
        fake.fails = {trials: KeyboardInterrupt()} if trials < 11 else {}
        code, _, err = tune("--trials", "11", "--study", "parts")
        assert code == (0 if trials == 11 else 130)
        assert trials == 11 or "go on with the same command: apt-tune" in err
    whole, parts = (
        [each["params"] for each in rows_of(tune, name)["trials"]] for name in ("whole", "parts")
    )
    assert whole == parts
    assert len({each["training.learning_rate"] for each in whole}) == 11
    assert tune("--trials", "12", "--study", "parts")[0] == 0
    shown = rows_of(tune, "parts")
    assert len(shown["trials"]) == 12
    assert counts(shown).keys() == {"complete", "pruned"}


def test_a_trial_whose_process_dies_is_continued_and_given_up_in_the_end(tune, fake, here):
    class Killed(BaseException):
        pass

    fake.fails = {1: Killed()}
    for _ in range(3):  # each is as if the process had been killed there
        with pytest.raises(Killed):
            tune("--trials", "4")
    assert fake.calls[-2:] == [(1, 0), (1, 0)]
    assert counts(rows_of(tune))["running"] == 1
    code, out, _ = tune("--trials", "4")
    assert code == 0 and "trial 1: failed: its process died 3 times" in out
    shown = rows_of(tune)
    assert len(shown["trials"]) == 4 and shown["counts"]["failed"] == 1
    assert shown["best"]["number"] != 1


def test_failures_are_the_trials_own_and_the_disk_is_everybodys(tune, here, monkeypatch):
    from apt_core.errors import DivergedError, TrainingError

    problems = {
        1: DivergedError("the loss is nan"),
        2: TrainingError("out of memory in step 1"),
        3: RuntimeError("a bug"),
    }

    def fit(tuned, study, work, watch, threads):
        if work.number in problems:
            raise problems[work.number]

        figures = {"val_loss": 2.0 if work.number else float("inf")}
        return SimpleNamespace(status="finished", step=9, reason="", figures=figures)

    monkeypatch.setattr("apt_plugins.optuna.trial_runs._fit", fit)
    assert tune("--trials", "5", "--pruner", "none")[0] == 0
    shown = rows_of(tune)["trials"]
    assert [each["state"] for each in shown] == ["failed"] * 4 + ["complete"]
    reasons = " ".join(each["reason"] for each in shown)
    for text in ("val_loss is inf", "loss is nan", "out of memory", "unexpected failure: Runtime"):
        assert text in reasons
    problems[5] = OSError(28, "No space left on device", "checkpoint")
    code, _, err = tune("--trials", "6", "--pruner", "none")
    assert code == 1 and "No space left" in err
    assert rows_of(tune)["trials"][5]["state"] == "running"
    del problems[5]
    assert tune("--trials", "6", "--pruner", "none")[0] == 0
    problems.update({n: TrainingError("bad") for n in range(9)})
    code, _, err = tune("--trials", "2", "--study", "all_bad")
    assert code == 1 and "no trial has come to its end" in err


def test_pruners_and_directions(tune, fake, here):
    assert tune("--trials", "9", "--pruner", "hyperband", "--study", "bands")[0] == 0
    firsts = {number: target for number, target in reversed(fake.calls)}
    assert set(firsts.values()) == {0, 1, 2}
    words = ("--metric", "val_ppl", "--direction", "maximize", "--no-baseline", "--sampler")
    assert tune("--trials", "5", "--study", "up", *words, "random", "--pruner", "none")[0] == 0
    shown = rows_of(tune, "up")
    assert shown["best"]["value"] == max(each["value"] for each in shown["trials"])
    assert not any(each["baseline"] for each in shown["trials"])


def test_a_study_is_joined_by_its_like_only(tune, fake, here):
    assert tune("--trials", "2")[0] == 0
    code, _, err = tune("--metric", "val_bpb", "--reduction-factor", "2")
    assert code == 2 and "--metric" in err and "--reduction-factor" in err
    code, _, err = tune("--set", "model.d_ff=48")
    assert code == 2 and "model.d_ff: is 48, and the study's trials were made with 32" in err
    assert tune("--trials", "2", "--set", "debug.log_level=WARNING")[0] == 0

    Path("space.yaml").write_text("model.dropout: [0.0, 0.2]", encoding="utf-8")
    code, _, err = tune("--trials", "3")
    assert code == 2 and "model.dropout: its kind, choices or log differ" in err
    Path("space.yaml").write_text(
        "training.learning_rate: {low: 1e-3, high: 1e-2, log: true}\n"
        "training.weight_decay: {low: 0, high: 1}",
        encoding="utf-8",
    )
    code, out, err = tune("--trials", "4")
    assert code == 0, err
    assert "training.learning_rate: its range differs" in out
    assert "training.weight_decay: new in the space" in out
    assert "model.dropout: it is searched no more" in out
    newest = rows_of(tune)["trials"][-1]["params"]
    assert newest.keys() == {"training.learning_rate", "training.weight_decay"}


def test_values_that_others_enqueue_are_tried(tune, fake, here):
    from apt_plugins.optuna.study import load_study

    assert tune("--trials", "1")[0] == 0
    study, _ = load_study(Path("studies/tiny"), None)
    study.optuna.enqueue_trial({"training.learning_rate": 0.01})
    assert tune("--trials", "3")[0] == 0
    shown = rows_of(tune)
    assert len(shown["trials"]) == 3
    assert shown["trials"][1]["params"]["training.learning_rate"] == 0.01
    assert shown["best"]["number"] == 1


def test_names_and_places(tune, fake, here, monkeypatch):
    """Names beyond ASCII, a renamed folder, folders that cannot be, and what is no study."""
    name = "studie Zürich 试验"
    assert tune("--trials", "2", "--study", name)[0] == 0
    Path(name).rename("moved")
    assert tune("--trials", "3", "--study", "moved")[0] == 0
    assert len(rows_of(tune, "moved")["trials"]) == 3
    Path("file").write_text("")
    for study in ("file", "file/below"):
        code, _, err = tune("--study", study)
        assert code == 2 and "the study's folder cannot be made" in err
    assert tune("show", "nowhere")[0] == 2
    Path("other").mkdir()
    Path("other/journal.log").write_text("no journal\nat all\n")
    for words in (("show", "other"), ("--study", "other")):
        code, _, err = tune(*words)
        assert code == 2 and "it is no journal of a study" in err
    # A line that was cut when a process died or the disk was full.
    with open("moved/journal.log", "a") as journal:
        journal.write('{"op_code": 4, "wor')
    assert tune("--trials", "4", "--study", "moved")[0] == 0
    assert len(rows_of(tune, "moved")["trials"]) == 4


def test_bad_input_is_told_at_once(tune, here):
    code, _, err = tune("--pruner", "having", "--sampler", "grid")
    assert code == 2 and "did you mean 'halving'?" in err and "--sampler" in err
    code, _, err = tune("--direction", "minimise")
    assert code == 2 and "did you mean 'minimize'?" in err
    Path("space.yaml").write_text("model.d_modle: [1, 2]\ntraining.batch_size: [0, x]")
    code, _, err = tune("--metric", "val_los")
    assert code == 2
    for text in ("did you mean 'val_loss'?", "did you mean 'd_model'?", "space.yaml:2"):
        assert text in err
    code, _, err = tune("-p", "tiny.yaml", "--space", "missing.yaml")
    assert code == 2 and "missing.yaml" in err
    assert not Path("studies").exists()


def test_a_dry_run_shows_and_makes_nothing(tune, here, monkeypatch):
    optuna.logging.set_verbosity(optuna.logging.INFO)  # as a new process has it
    code, out, err = tune("--dry-run", "--json")
    assert optuna.logging.get_verbosity() == optuna.logging.ERROR and "study created" not in err
    planned = json.loads(out)
    assert planned["samples"][0] == {"training.learning_rate": 0.001, "model.dropout": 0.0}
    assert len(planned["samples"]) == 5 and planned["seconds"] > 0
    monkeypatch.setattr("apt_plugins.optuna.estimate._seconds", lambda kernel: 60.0)
    code, out, _ = tune("--dry-run", "--trials", "6", "--workers", "2", "--pruner", "none")
    assert code == 0 and "0.0001 to 0.1, log" in out
    assert "6 trials by 2 worker(s): about 3:00" in out
    assert not Path("studies").exists()


def test_a_database_keeps_the_study_of_several_folders(tune, fake, here, monkeypatch):
    """Machines need not share the folder: each goes on with its own trials, and takes over those of
    one that is lost."""
    pytest.importorskip("sqlalchemy")

    class Killed(BaseException):
        pass

    url = f"sqlite:///{here}/study.db"
    fake.fails = {2: Killed()}
    with pytest.raises(Killed):
        tune("--trials", "4", "--study", "one/tiny", "--storage", url)
    fake.fails = {}
    waits = []

    def wait(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            monkeypatch.setattr("apt_plugins.optuna.study.LOST_SECONDS", -1.0)

    monkeypatch.setattr("apt_plugins.optuna.worker.time.sleep", wait)
    before = len(fake.calls)
    assert tune("--trials", "4", "--study", "two/tiny", "--storage", url)[0] == 0
    assert len(waits) >= 3
    later = [number for number, _ in fake.calls[before:]]
    assert later[0] == 3 and 2 in later, "its own first, then those of the lost folder"
    shown = rows_of(tune, "two/tiny", "--storage", url)
    assert len(shown["trials"]) == 4 and counts(shown).keys() == {"complete", "pruned"}
    assert "two" in shown["trials"][2]["folder"]


def test_a_storage_that_cannot_be_reached_is_named_without_its_password(tune, here):
    pytest.importorskip("psycopg")
    url = "postgresql+psycopg://me:hush%2Fhush@127.0.0.1:1/none"
    code, out, err = tune("--storage", url)
    assert code == 2 and "the storage cannot be used" in err
    assert "hush" not in out + err
    code, _, err = tune("--storage", "nonsense")
    assert code == 2 and "DIALECT" in err


def test_a_storage_that_fails_in_mid_run_loses_nothing(tune, here, monkeypatch):
    from apt_plugins.optuna.storage import StorageError
    from apt_plugins.optuna.study import Study

    report = Study.report

    def fail(self, trial_id, step, value):
        if step == 2:
            raise StorageError("the study's storage (the journal) fails: gone")
        report(self, trial_id, step, value)

    monkeypatch.setattr(Study, "report", fail)
    code, _, err = tune("--trials", "1", "--pruner", "none")
    assert code == 1 and "fails: gone" in err
    monkeypatch.setattr(Study, "report", report)
    assert tune("--trials", "1", "--pruner", "none")[0] == 0
    steps = [row["step"] for row in rows_in("studies/tiny/trials/0000") if "val_loss" in row]
    assert steps == sorted(steps) and steps[-1] == STEPS


def rows_in(run):
    lines = (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_two_workers_that_are_killed_leave_a_study_that_goes_on(here, forked):
    """Everything is killed when trials are under way: the study ends with exactly its trials, and
    what was trained is not trained again."""
    profile = yaml.safe_load(Path("tiny.yaml").read_text(encoding="utf-8"))
    profile["training"]["save_every_steps"] = 1
    Path("tiny.yaml").write_text(yaml.safe_dump(profile), encoding="utf-8")
    words = [*TWO_WORKERS, "--study", "killed"]
    command = command_of("apt_plugins.optuna.command", "apt-tune", words)
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    folder = Path("killed/trials")
    while len([*folder.glob("000*/checkpoints/step-*")]) < 4 and first.poll() is None:
        time.sleep(0.02)
    workers = children(first.pid)
    for pid in (first.pid, *workers):
        os.kill(pid, signal.SIGKILL)
    first.communicate()
    assert len(workers) == 2
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "goes on: " in again.stdout
    assert "6 trials: " in again.stdout and "pruned" in again.stdout
    runs = sorted(path.name for path in folder.iterdir())
    assert runs == [f"{number:04d}" for number in range(6)]
    # Steps of a resumed run are not in its metrics twice.
    for run in folder.iterdir():
        steps = [row["step"] for row in rows_in(run) if "loss" in row]
        assert steps == sorted(set(steps))


def children(pid):
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(path.parent.name))
    return found


def test_ctrl_c_saves_and_says_how_to_go_on(here, forked):
    words = [*TWO_WORKERS, "--study", "stopped"]
    words += ["--set", "training.max_steps=100000", "--set", "training.max_epochs=null"]
    words += ["--set", "evaluation.eval_freq=0"]
    command = command_of("apt_plugins.optuna.command", "apt-tune", words)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len([*Path("stopped/trials").glob("000*/metrics.jsonl")]) < 2 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert "go on with the same command: apt-tune" in err
    for run in Path("stopped/trials").iterdir():
        assert [*run.glob("checkpoints/step-*")], "it has saved"
