"""A run that begins before its data is built: what it sees is a function of its looks, which are
on record, so that it goes on from any place as if nothing had been."""

from __future__ import annotations

import gc
import json
import os
import signal
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from apt_core import AptError, hookimpl
from apt_core.config import parse_override
from apt_core.data import early
from apt_core.data.loading import load_data
from apt_core.data.store import build, format
from apt_core.data.store.format import DamagedStoreError, StoreError, read_manifest
from apt_core.data.store.lock import is_locked
from apt_core.errors import ConfigError
from apt_core.kernel import boot
from apt_core.runs import checkpoint
from apt_core.runs.events import read_events
from apt_core.testing import TINY_PROFILE, tiny_run
from apt_core.training.prepare import prepare

STEPS = 24
SETTINGS = {
    "model.max_seq_len": 32,
    "training.batch_size": 2,
    "training.grad_accum_steps": 2,
    "training.log_every_steps": 1,
    "training.keep_last": 0,
    "training.save_every_steps": 2,
    "training.max_steps": STEPS,
    "evaluation.eval_freq": 6,
    "evaluation.sample_tokens": 0,
    "hardware.num_threads": 1,
}


@dataclass
class Trial:
    """A corpus, the builder of its store, which stops after each shard until the gate is opened,
    and the runs on it."""

    folder: Path
    builders: list[int] = field(default_factory=list)

    @property
    def stores(self) -> Path:
        return self.folder / "cache" / "stores"

    @property
    def profile(self) -> dict[str, Any]:
        path = str(self.folder / "texts.jsonl")
        data = {"loader": "jsonl", "train_path": path, "packing": "concat", "begin_early": True}
        by_epoch = ("max_epochs", "save_freq")
        training = {k: v for k, v in TINY_PROFILE["training"].items() if k not in by_epoch}
        data |= {"max_length": 24, "val_fraction": 0.2}
        return {**TINY_PROFILE, "training": training, "data": data}

    def write(self, records: int = 110) -> None:
        lines = [
            {"text": f"text {n} of {n * n % 97} apples and {n % 13} pears"} for n in range(records)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (self.folder / "texts.jsonl").write_text(text, encoding="utf-8")

    def start(self) -> None:
        """Start a builder, and wait for its first shards."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child:
            self.builders.append(child)
            while not any(map(is_locked, self.stores.glob("*.lock"))):
                time.sleep(0.005)
            self.until(1)
            return
        publish, count = build.EarlyStore.publish, iter(range(1, 1000))

        def gated(*arguments: Any) -> None:
            publish(*arguments)
            gate = self.folder / f"gate-{next(count)}"
            while not gate.exists():
                time.sleep(0.005)

        build.EarlyStore.publish = gated  # type: ignore[method-assign]
        code = 1
        try:
            load_data(boot(self.profile, overrides=self.overrides()), workers=1)
            code = 0
        finally:
            os._exit(code)

    def end(self) -> None:
        """Let the last builder build the rest."""
        for number in range(1, 100):
            (self.folder / f"gate-{number}").touch()
        assert os.waitpid(self.builders.pop(), 0)[1] == 0

    def kill(self) -> None:
        child = self.builders.pop()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

    def until(self, shards: int) -> None:
        while self.known() < shards:
            time.sleep(0.005)

    def known(self) -> int:
        for path in self.stores.glob("*.early"):
            try:
                return len(read_manifest(path).parts["train"].shards)
            except DamagedStoreError:
                pass
        return 0

    def overrides(self, **changes: Any) -> list[Any]:
        settings = {**SETTINGS, **changes}
        return [parse_override(f"{key}={json.dumps(value)}") for key, value in settings.items()]

    def train(self, name: str, *plugins: Any, changes: Any = (), **options: Any) -> Any:
        return tiny_run(
            *plugins,
            profile=self.profile,
            overrides={**SETTINGS, **dict(changes)},
            output=self.folder / name,
            **options,
        )

    def looks(self, name: str) -> list[tuple[int, int, int, bool]]:
        found = checkpoint.list_checkpoints(self.folder / name / "checkpoints")[-1]
        looks = checkpoint.load(found).state.looks
        return [(look.step, look.start, look.stop, look.whole) for look in looks]

    def seen(self, name: str) -> dict[int, list[Any]]:
        """What the ranks saw in each step, as often as it was taken."""
        found: dict[int, list[Any]] = {}
        for path in sorted((self.folder / f"{name}.seen").iterdir()):
            found.setdefault(int(path.name[:3]), []).append(json.loads(path.read_text()))
        return found


class Opens:
    """Writes down what each step sees, and opens a gate before some of them."""

    def __init__(self, trial: Trial, name: str, gates: dict[int, int]) -> None:
        self.trial, self.gates = trial, gates
        self.folder = trial.folder / f"{name}.seen"

    @hookimpl
    def on_step_start(self, step: int, batch: list[Any], trainer: Any) -> None:
        self.folder.mkdir(exist_ok=True)
        windows = trainer.parts.plan.drawn(1, step - 1).windows.tolist()
        ids = [each.input_ids.tolist() for each in batch]
        name = f"{step:03d}-{trainer.world_size}-{trainer.rank}-{os.getpid()}.json"
        text = json.dumps([trainer.world_size, trainer.rank, windows, ids])
        (self.folder / name).write_text(text, encoding="utf-8")
        if not trainer.rank and step in self.gates:
            shards = self.trial.known()
            (self.trial.folder / f"gate-{self.gates[step]}").touch()
            self.trial.until(shards + 1)


@pytest.fixture
def trial(tmp_path, monkeypatch) -> Iterator[Trial]:
    monkeypatch.setenv("APT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(format, "FIRST_SHARD_TOKENS", 900)
    monkeypatch.setattr(format, "SHARD_TOKENS", 900)
    made = Trial(tmp_path)
    made.write()
    yield made
    while made.builders:
        made.kill()


def test_a_run_goes_on_with_what_has_come_and_sees_each_window_once(trial, monkeypatch, tmp_path):
    trial.start()
    opens = Opens(trial, "whole", {3: 1})
    trial.train("whole", opens, changes={"data.num_workers": 2})
    looks = trial.looks("whole")
    first = looks[0][2]
    assert looks[0] == (1, 0, first, False)
    # What came in step 3 follows when the first windows are used up; then nothing has come.
    assert looks[1][1:] == (first, looks[1][2], False) and looks[1][0] == first // 4 + 1
    assert looks[2][1:] == (0, looks[1][2], False)
    windows = [w for step, (one,) in sorted(trial.seen("whole").items()) for w in one[2]]
    assert sorted(windows[: looks[1][2]]) == list(range(looks[1][2]))
    events = [e for e in read_events(trial.folder / "whole").events if e.kind == "looked"]
    assert [event.data["number"] for event in events] == list(range(len(looks)))
    gc.collect()  # what the run has read
    trial.end()
    # The store is the one that is built without a run; a run on it begins with all of it.
    (one,) = (tmp_path / "cache" / "stores").iterdir()
    monkeypatch.setenv("APT_CACHE", str(tmp_path / "other"))
    load_data(boot(trial.profile, overrides=trial.overrides()), workers=1)
    (other,) = (tmp_path / "other" / "stores").iterdir()
    names = {path.name for path in one.iterdir() if path.name != "checked.json"}
    assert names == {path.name for path in other.iterdir() if path.name != "checked.json"}
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in names)
    late = trial.train("late", Opens(trial, "late", {}))
    assert [look[3] for look in trial.looks("late")] == [True]
    held_out = [late.result.figures["val_loss"], late.manifest["data"]["val_tokens"]]
    whole = json.loads((trial.folder / "whole" / "manifest.json").read_text())
    assert held_out[1] == whole["data"]["val_tokens"]


def test_a_killed_run_looks_up_nothing_again(trial, in_children, killer, ranks):
    """Killed after a look that its last checkpoint does not know of, when more shards are there; it
    goes on in two processes, and then in one."""
    trial.start()
    shared = {"training.grad_accum_steps": 1, "hardware.distributed": True}
    trial.train("probe", Opens(trial, "probe", {}), stop_at_step=2)
    known = trial.looks("probe")[0][2] // 4  # steps with the first windows
    n = known + 1 + known % 2  # an odd number of steps: one after the last checkpoint
    assert in_children(
        lambda: trial.train(
            "moving", Opens(trial, "moving", {3: 1}), killer(n, micro=1, saved=n - 1)
        )
    ) == [-signal.SIGKILL]
    trial.end()
    again = [Opens(trial, "moving", {}), killer(n + 2, micro=1, saved=n + 1)]
    run = partial(trial.train, "moving", *again, changes=shared, resume=True)
    assert in_children(*ranks(run)) == [-signal.SIGKILL] * 2
    trial.train("moving", Opens(trial, "moving", {}), resume=True)
    seen, twice = trial.seen("moving"), 0
    assert sorted(seen) == list(range(1, STEPS + 1))
    for step, times in seen.items():
        assert len({tuple(one[2]) for one in times}) == 1, step
        alone = [one[3] for one in times if one[0] == 1]
        pairs = sorted([one[1], one[3]] for one in times if one[0] == 2)
        whole = alone[0] if alone else [pairs[0][1][0], pairs[1][1][0]]
        assert all(one == whole for one in alone)
        if pairs:
            assert [share[0] for _, share in pairs] == whole
        twice += len(alone) > 1 or bool(alone and pairs)
    assert twice >= 2
    looks = trial.looks("moving")
    assert [look[3] for look in looks] == [False, False, True]


def test_a_run_ends_with_the_build_and_goes_on_with_the_next_one(trial, monkeypatch):
    """All that is there is trained on first, and the checkpoint of it kept."""
    trial.start()
    trial.kill()
    trial.start()  # what the first one has left is read meanwhile
    monkeypatch.setattr("apt_core.training.looking.WAIT_SECONDS", 0.01)

    class Kills:
        @hookimpl
        def on_step_end(self, step: int) -> None:
            if step == 1:
                trial.kill()

    with pytest.raises(StoreError, match="is not being built any more, and the run has trained on"):
        trial.train("run", Kills())
    looks = trial.looks("run")
    assert len(looks) == 1
    last = checkpoint.list_checkpoints(trial.folder / "run" / "checkpoints")[-1]
    assert checkpoint.load(last).state.step == looks[0][2] // 4
    # The rest of the corpus is mended, which is no other text to the run.
    with (trial.folder / "texts.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"text": "one more"}\n')
    assert trial.train("run", resume=True).result.status == "finished"
    assert [look[3] for look in trial.looks("run")] == [False, True]
    with pytest.raises(AptError, match=r"data\.begin_early: is False"):
        trial.train("run", changes={"data.begin_early": False}, resume=True)
    # What it has trained on is another text.
    trial.write()
    text = (trial.folder / "texts.jsonl").read_text(encoding="utf-8")
    (trial.folder / "texts.jsonl").write_text(text.replace("text 3 ", "text X "), encoding="utf-8")
    with pytest.raises(AptError, match="another text"):
        trial.train("run", resume=True)


def test_a_run_that_is_refused_leaves_no_builder(trial, monkeypatch):
    trial.start()
    trial.kill()
    builders = []

    class Sleeps(early.Builder):
        def __init__(self, command: Any) -> None:
            super().__init__(["sleep", "60"])
            builders.append(self)

    monkeypatch.setattr(early, "Builder", Sleeps)
    kernel = boot(trial.profile, overrides=trial.overrides(**{"evaluation.best_by": "luck"}))
    kernel.builder = ("build",)
    with pytest.raises(ConfigError, match=r"evaluation\.best_by"):
        prepare(kernel, torch.device("cpu"))
    (builder,) = builders
    assert not builder.runs


def test_a_run_that_waits_for_the_windows_of_a_step_keeps_to_its_limits(trial):
    trial.start()
    many = {"training.batch_size": 500, "training.max_seconds": 0.1}
    result = trial.train("waits", changes=many).result
    assert (result.status, result.step) == ("stopped", 0)
    assert "training.max_seconds" in result.reason


@pytest.mark.parametrize(
    ("changes", "schedules", "message"),
    [
        ({"training.max_steps": None}, {}, r"data\.begin_early: needs training\.max_steps"),
        ({"data.packing": "pad"}, {}, r"data\.begin_early: needs data\.packing: concat"),
        ({}, {"enable_moe_at_epoch": 2}, r"schedules\.enable_moe_at_epoch: counts by epoch"),
        (
            {"data.mixture": [{"name": "a", "source": "pydoc"}]},
            {},
            r"data\.begin_early: goes without data\.mixture",
        ),
    ],
)
def test_what_depends_on_the_data_s_length_is_refused(trial, changes, schedules, message):
    overrides = trial.overrides(**changes)
    with pytest.raises(ConfigError, match=message):
        boot({**trial.profile, "schedules": schedules}, plugins=["moe"], overrides=overrides)
