"""Starting several processes, and every way in which they end.

The first test starts interpreters, as a user does; in the others the processes are forks.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from apt_core.cache import cache_dir
from apt_core.cli import train as cli_train
from apt_core.errors import TrainingError
from apt_core.parallel.launch import already_reported, launch
from apt_core.parallel.signals import Interrupts
from apt_core.parallel.world import STORE_VARIABLE, shared_store
from apt_core.runs.checkpoint import load, newest_intact
from apt_core.runs.tensor_files import SavedTensors

ROOT = Path(__file__).parents[2]
# As the console script: without the working directory on the import path.
APT_TRAIN = [sys.executable, "-P", "-m", "apt_core", "train"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TWO = ["--nproc", "2", "--training.grad_accum_steps", "1"]

DIES = """
import os, signal
from apt_core import hookimpl

MODE = os.environ["MODE"]

@hookimpl
def on_training_start(trainer):
    (trainer.output_dir / f"{trainer.rank}.pid").write_text(str(os.getpid()))

@hookimpl
def on_step_start(step, trainer):
    if (trainer.rank, step) != (1, 5):
        return
    if MODE == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if MODE == "layer":
        def broken(*arguments):
            raise RuntimeError("a layer of the second process is broken")
        trainer.model.forward = broken

@hookimpl
def apt_loss_terms(trainer, output):
    if MODE == "term" and (trainer.rank, trainer.step) == (1, 4):
        raise RuntimeError("a term of the second process is broken")
    return {"none": output.logits.sum() * 0}
"""

DEAF = """
import os, signal, threading
import torch.distributed as dist
from apt_core import hookimpl
from apt_core.parallel import liveness

if os.environ["MODE"] == "stop":
    liveness.BEAT_SECONDS, liveness.SILENT_SECONDS = 0.5, 4.0
    end = signal.SIGSTOP
else:
    end = signal.SIGKILL
    let_go = threading.Event()
    reduce = dist.all_reduce

    def all_reduce(tensor, **options):
        "As NCCL does: wait for one that is gone, and once it is ended leave the tensor as it was."
        done = threading.Event()
        def work():
            whole = tensor.clone()
            try:
                reduce(whole, **options)
            except RuntimeError:
                return
            tensor.copy_(whole)
            done.set()
        threading.Thread(target=work, daemon=True).start()
        while not done.wait(0.02) and not let_go.is_set():
            pass

    dist.all_reduce = all_reduce
    liveness.end_collectives = let_go.set

@hookimpl
def apt_loss_terms(trainer):
    if (trainer.rank, trainer.step) == (1, 5):  # in the sixth
        os.kill(os.getpid(), end)
"""


WANDB = """
import os, stat
from pathlib import Path
import wandb
from apt_core import hookimpl

def listening(pid):
    "Addresses at which a process waits for others, as the kernel prints them."
    found = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        link = os.readlink(descriptor) if descriptor.is_symlink() else ""
        if link.startswith("socket:["):
            found.add(link[8:-1])
    tables = [Path(f"/proc/{pid}/net/{name}") for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table.read_text().splitlines()[1:]]
    return [row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in found]

@hookimpl
def on_training_start(trainer):
    addresses = [*listening(os.getpid()), *listening(os.getppid())]
    store = Path(os.environ["APT_STORE"]).parent
    text = f"{wandb.NAME} {stat.S_IMODE(store.stat().st_mode):o} {' '.join(addresses)}"
    (trainer.output_dir / f"{trainer.rank}.txt").write_text(text)
"""
LOOPBACK = ("0100007F", "0" * 24 + "01000000")


@pytest.fixture
def arguments(profile: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The words after ``apt-train`` for a run in ``tmp_path / name``."""

    def words(*more: str, name: str = "run") -> list[str]:
        common = {"grad_accum_steps": 2, "log_every_steps": 1, "keep_last": 0}
        settings = [f"--training.{key}={value}" for key, value in common.items()]
        settings += ["--hardware.num_threads=1", "--output", str(tmp_path / name)]
        return ["-p", str(profile), *settings, *more]

    return words


@pytest.fixture
def dies(tmp_path: Path) -> str:
    path = tmp_path / "dies.py"
    path.write_text(DIES, encoding="utf-8")
    return str(path)


def environment(mode: str = "", imports: Sequence[Path] = (ROOT,)) -> dict[str, str]:
    path = os.pathsep.join(map(str, imports))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MODE": mode}


def train(
    words: Sequence[str],
    mode: str = "",
    program: Sequence[str] = APT_TRAIN,
    imports: Sequence[Path] = (ROOT,),
) -> Any:
    return subprocess.run(
        [*program, *words],
        env=environment(mode, imports),
        capture_output=True,
        text=True,
        timeout=120,
    )


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    saved = SavedTensors(checkpoint / "model")
    targets = {name: torch.zeros(size, dtype=kind) for name, (size, kind) in saved.shapes.items()}
    saved.read_into(targets, "model")
    return targets


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.long
def test_a_run_of_two_processes_speaks_with_one_voice_and_is_closed_to_others(
    arguments: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plugin in the working directory has the name of the library that it uses, and a file the
    name of one that every run uses."""
    library = tmp_path / "library"
    library.mkdir()
    (library / "wandb.py").write_text("NAME = 'library'\n", encoding="utf-8")
    (tmp_path / "wandb.py").write_text(WANDB, encoding="utf-8")
    (tmp_path / "numpy.py").write_text("raise RuntimeError('not numpy')\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    words = arguments("--training.max_steps=6", "--plugin", "wandb.py", *TWO)
    done = train(words, imports=[ROOT, library])
    assert (done.returncode, done.stderr) == (0, "")
    for rank in range(2):
        text = (tmp_path / "run" / f"{rank}.txt").read_text()
        name, mode, *addresses = text.split()
        assert (name, mode) == ("library", "700")
        assert addresses and set(addresses) <= set(LOOPBACK), addresses
    lines = done.stdout.splitlines()
    for begins in ("model built:", "Epoch 1/", "checkpoint:", "finished:", "tokenizer:"):
        found = [line for line in lines if line.startswith(begins)]
        # The last step is saved before it is judged on the held-out text, and once more after.
        times = 2 if begins == "checkpoint:" else 1
        assert found and all(found.count(line) == times for line in found), done.stdout
    assert "in 2 processes (ddp)" in done.stdout
    steps = [row["step"] for row in rows(tmp_path / "run") if "loss" in row]
    assert steps == [1, 2, 3, 4, 5, 6]
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("model built") == 1
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["world_size"] == 2


@pytest.mark.usefixtures("forked")
def test_a_loss_term_that_fails_in_one_process_ends_the_run_which_resumes_bit_equal(
    arguments: Callable[..., list[str]], apt_train: Callable[..., Any], dies: str, tmp_path: Path
) -> None:
    done = train(arguments("--plugin", dies, *TWO), "term")
    assert done.returncode == 1
    own = [line for line in done.stderr.splitlines() if line.startswith("process 1: ")]
    assert own[0] == "process 1: Traceback (most recent call last):"
    assert any(line.startswith(f'process 1:   File "{dies}", line') for line in own)
    assert "the processes of a run must train on the same loss" in own[-1]
    assert "error: another process of the run has ended" in done.stderr
    assert "step 4; to go on: apt-train" in done.stderr
    assert "--nproc 2" in done.stderr
    assert load(tmp_path / "run" / "checkpoints" / "step-00000004").state.step == 4
    # Goes on in one process, as if nothing had been.
    for name, more in (("run", ["--resume"]), ("whole", [])):
        assert apt_train(*arguments(*more, name=name)[2:], name=name).code == 0
    ends = [tmp_path / name / "checkpoints" / "step-00000012" for name in ("run", "whole")]
    resumed, whole = map(weights, ends)
    assert all(tensor.equal(whole[name]) for name, tensor in resumed.items())


@pytest.mark.usefixtures("forked")
def test_a_process_that_is_killed_ends_the_run_with_a_checkpoint(
    arguments: Callable[..., list[str]], dies: str, tmp_path: Path
) -> None:
    started = time.monotonic()
    done = train(arguments("--plugin", dies, *TWO), "kill")
    assert time.monotonic() - started < 60
    assert done.returncode == 1
    assert "error: process 1 was killed by signal 9" in done.stderr
    assert "error: another process of the run has ended" in done.stderr
    assert newest_intact(tmp_path / "run" / "checkpoints").state.step == 4
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["status"] == "failed"
    assert "another process of the run has ended" in manifest["error"]


@pytest.mark.parametrize("mode", ["deaf", pytest.param("stop", marks=pytest.mark.long)])
@pytest.mark.usefixtures("forked")
def test_processes_that_notice_nothing_themselves_end_with_the_last_whole_step(
    arguments: Callable[..., list[str]], apt_train: Callable[..., Any], tmp_path: Path, mode: str
) -> None:
    """A collective of NCCL waits for a process that was killed, and one of Gloo for a process that
    was stopped. No row is due of the step that the host has gone on to meanwhile."""
    deaf = tmp_path / "deaf.py"
    deaf.write_text(DEAF, encoding="utf-8")
    seldom = "--training.log_every_steps=4"
    done = train(arguments("--plugin", str(deaf), seldom, *TWO), mode)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "error: process 1 was killed by signal 9" in done.stderr
    assert "error: another process of the run has ended" in done.stderr
    checkpoint = newest_intact(tmp_path / "run" / "checkpoints")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert checkpoint.state.step == manifest["step"] == 5
    assert (
        apt_train(*arguments(seldom, "--stop-at-step=5", name="whole")[2:], name="whole").code == 0
    )
    whole = load(tmp_path / "whole" / "checkpoints" / "step-00000005")
    same = ("epoch", "tokens", "nonfinite_steps")
    assert [getattr(checkpoint.state, key) for key in same] == [
        getattr(whole.state, key) for key in same
    ]
    expected = weights(whole.path)
    assert all(tensor.equal(expected[name]) for name, tensor in weights(checkpoint.path).items())


@pytest.mark.long
@pytest.mark.usefixtures("forked")
def test_a_layer_that_fails_in_one_process_leaves_the_last_sharded_checkpoint(
    arguments: Callable[..., list[str]], apt_train: Callable[..., Any], dies: str, tmp_path: Path
) -> None:
    sharded = ["--hardware.distributed", "fsdp", "--training.save_every_steps", "3"]
    done = train(arguments("--plugin", dies, *sharded, *TWO), "layer")
    assert done.returncode == 1
    assert "process 1: RuntimeError: a layer of the second process is broken" in done.stderr
    assert "no checkpoint of step 4: the other processes have the rest" in done.stdout
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [path.name for path in sorted(checkpoints.iterdir())] == ["step-00000003"]
    resumed = apt_train(*arguments("--resume")[2:])
    assert resumed.code == 0
    assert "resumed from" in resumed.out


@pytest.mark.parametrize(
    ("number", "code", "to_workers"),
    [(signal.SIGTERM, 143, True), (signal.SIGINT, 130, False)],
    ids=["SIGTERM to all", "Ctrl-C"],
)
@pytest.mark.usefixtures("forked")
def test_a_signal_ends_all_processes_with_a_checkpoint(
    arguments: Callable[..., list[str]],
    dies: str,
    tmp_path: Path,
    number: signal.Signals,
    code: int,
    to_workers: bool,
) -> None:
    """A scheduler may signal every process, and the launcher tells its own once more; a terminal
    signals the group of the launcher."""
    words = arguments("--plugin", dies, "--training.max_epochs=100000", *TWO)
    with subprocess.Popen(
        [*APT_TRAIN, *words],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        metrics = tmp_path / "run" / "metrics.jsonl"
        while process.poll() is None and (not metrics.exists() or len(rows(tmp_path / "run")) < 4):
            time.sleep(0.05)
        for file in (tmp_path / "run").glob("*.pid") if to_workers else ():
            os.kill(int(file.read_text()), number)
        os.killpg(process.pid, number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (code, "")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["status"] == "interrupted"
    assert newest_intact(tmp_path / "run" / "checkpoints").state.step == manifest["step"]
    assert f"interrupted: {manifest['step']} steps" in out
    assert out.count("to go on: apt-train") == 1


@pytest.mark.usefixtures("forked")
def test_bad_input_that_every_process_finds_is_reported_once(
    arguments: Callable[..., list[str]],
) -> None:
    done = train(arguments("--training.batch_size=64", *TWO))
    assert done.returncode == 2
    assert done.stderr.count("one optimizer step takes 128") == 1
    assert done.stderr.startswith("error: data.train_path: the training text has")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.usefixtures("forked")
@pytest.mark.long
def test_torchrun_starts_the_processes_too(
    arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    module = ["-m", "apt_core", "train"]
    refused = train(arguments("--nproc=2"), program=[*TORCHRUN, "--", *module])
    assert refused.returncode != 0
    assert refused.stderr.count("error: --nproc: torchrun has started the processes already") == 1
    done = train(arguments("--training.max_steps=2"), program=[*TORCHRUN, *module])
    assert done.returncode == 0
    assert done.stdout.count("in 2 processes (ddp)") == 1
    assert len([row for row in rows(tmp_path / "run") if "loss" in row]) == 2


def test_a_profile_for_gpus_that_are_not_there_trains_in_one_process(
    arguments: Callable[..., list[str]], apt_train: Callable[..., Any]
) -> None:
    words = ["--hardware.distributed", "true", "--hardware.num_gpus", "4", "--training.max_steps=2"]
    done = apt_train(*words)
    assert done.code == 0
    assert "hardware.num_gpus: 4 asked, 0 usable here: 1 process(es)" in done.out
    assert "inactive: hardware.distributed (the run has one process" in done.out
    assert done.manifest["world_size"] == 1
    strict = apt_train(*words, "--strict", name="strict")
    assert strict.code == 2
    assert "4 asked, 0 usable here" in strict.err


@pytest.mark.parametrize("number", ["0", "-1", "two"])
def test_a_number_of_processes_below_one_is_bad_input(
    apt_train: Callable[..., Any], number: str
) -> None:
    done = apt_train("--nproc", number)
    assert done.code == 2
    assert "nproc" in done.err


def test_one_process_is_this_one(apt_train: Callable[..., Any]) -> None:
    done = apt_train("--nproc", "1", "--training.max_steps=2")
    assert done.code == 0
    assert done.manifest["world_size"] == 1


class Foreign:
    """Runs code where it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_a_foreign_value_in_the_store_of_nproc_runs_no_code(tmp_path, monkeypatch):
    """Nor does it hide an error. (The folder is the person's own, of mode 0700: see above.)"""
    monkeypatch.setenv(STORE_VARIABLE, str(tmp_path / "store"))
    ran = tmp_path / "ran"
    value = pickle.dumps(Foreign(ran))
    pickle.loads(value)
    assert ran.is_dir()
    ran.rmdir()
    store = shared_store()
    said = hashlib.sha256(b"an error").hexdigest()
    store.set(f"apt/said/{said}", value)
    assert not already_reported("an error", 0)  # everyone says it
    assert store.get(f"apt/said/{said}") == value and not ran.exists()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("code", "said"), [(3, "exit code 3"), (-9, "killed by signal 9")])
def test_of_processes_that_end_at_once_the_silent_one_is_the_cause(
    monkeypatch, capsys, rank: int, code: int, said: str
) -> None:
    """The others have noticed that it is gone, and end with 1 before the launcher looks."""

    class Ended:
        def __init__(self, command: Sequence[str], *, env: dict[str, str], **_: Any) -> None:
            self.code = code if int(env["RANK"]) == rank else 1

        def poll(self) -> int:
            return self.code

        def send_signal(self, number: int) -> None: ...

    monkeypatch.setattr("apt_core.parallel.launch.subprocess.Popen", Ended)
    assert launch(2, []) == 1
    assert f"process {rank} " in (text := capsys.readouterr().err) and said in text


def test_a_process_that_is_terminated_with_the_others_still_says_why_it_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its launcher terminates it as soon as another has ended, which may be at any moment."""

    class Failing:
        world_size, folder, step = 2, None, 0
        stopping = SimpleNamespace(interrupts=Interrupts(alone=False))

        def __init__(self, *arguments: Any, **options: Any) -> None:
            pass

        def fit(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            raise TrainingError("another process of the run has ended")

    ended: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: ended.append(number))
    monkeypatch.setattr("apt_core.training.Trainer", Failing)
    monkeypatch.setattr(
        "apt_core.training.summary.resume_hint",
        lambda *arguments: os.kill(os.getpid(), signal.SIGTERM) or "",
    )
    kernel: Any = SimpleNamespace(config=SimpleNamespace(name="tiny"))
    try:
        with pytest.raises(TrainingError):
            cli_train.run(kernel, Console(quiet=True), again="")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended == []


SLOW = """
import os, time
from pathlib import Path
from apt_core import ProviderSpec, hookimpl
from apt_core.parallel import liveness
from apt_core.providers import DatasetProvider

liveness.BEAT_SECONDS, liveness.SILENT_SECONDS = 0.2, 1.5

class Slow(DatasetProvider):
    "The process that reads it first takes longer than the others may be silent, and fails."
    name = "slow"

    def documents(self):
        try:
            (Path(__file__).parent / "first").touch(exist_ok=False)
        except FileExistsError:
            while True:
                time.sleep(0.05)
                yield "for ever"
        yield "a document"
        time.sleep(3)
        yield 17

    def fingerprint(self):
        return "slow"

@hookimpl
def apt_register_providers():
    return [ProviderSpec("dataset", "slow", Slow)]
"""


@pytest.mark.usefixtures("forked")
def test_a_store_that_one_process_cannot_build_ends_those_that_wait_for_it(
    arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    """The next one begins to build it, and is told to stop. Until then they wait, for longer than
    a process may be silent."""
    slow = tmp_path / "slow.py"
    slow.write_text(SLOW, encoding="utf-8")
    done = train(arguments("--plugin", str(slow), "--data.loader", "slow", *TWO))
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error:") == 1
    assert "document 2 of documents() is an int, not a document" in done.stderr
    assert "killed" not in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()
    assert not list((cache_dir() / "stores").glob("*.building-*"))
