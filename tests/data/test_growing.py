"""The order of a run that begins before its data is built."""

from __future__ import annotations

import time
from math import inf
from types import SimpleNamespace

import numpy as np
import pytest

from apt_core.data import early
from apt_core.data.growing import GrowingOrder
from apt_core.data.looks import Look
from apt_core.data.order import StepPlan

PER_STEP = 4


def order(looks=(), *, seed=3, steps=60):
    made = GrowingOrder(StepPlan(steps * PER_STEP, seq_len=8, windows_per_step=PER_STEP), seed=seed)
    for windows, whole in looks:
        made.add(made.next_look(1, windows, 1, whole=whole, sha256=""))
    return made


def seen(made, steps):
    return np.concatenate([made.step(1, index).windows for index in range(steps)]).tolist()


def test_all_windows_come_once_before_any_comes_again():
    made = order([(10, False), (10, False), (25, False), (31, True)])
    assert [(look.start, look.stop) for look in made.looks] == [
        (0, 10),
        (0, 10),
        (10, 25),
        (25, 31),
    ]
    windows = seen(made, 40)
    for first, last, expected in (
        (0, 10, range(10)),
        (10, 20, range(10)),  # nothing had come
        (20, 35, range(10, 25)),
        (35, 41, range(25, 31)),
        (41, 72, range(31)),  # epochs of all of them
        (72, 103, range(31)),
    ):
        assert sorted(windows[first:last]) == list(expected)
        assert windows[first:last] != list(expected)
    assert windows[:10] != windows[10:20] and windows[41:72] != windows[72:103]


def test_a_step_is_a_function_of_seed_step_and_looks_alone():
    looks = [(10, False), (25, False), (31, True)]
    whole = order(looks)
    for index in (39, 0, 7, 3, 3):
        again = order(looks).step(1, index)
        assert again.windows.tolist() == whole.step(1, index).windows.tolist()
        assert not again.sources.any()
    assert seen(order(looks, seed=4), 5) != seen(whole, 5)
    # Later looks change nothing before them.
    assert seen(order(looks[:2]), 6) == seen(whole, 6)


def test_what_is_not_known_is_no_step():
    made = order()
    assert made.known_steps == 0
    for windows, known in ((10, 2), (13, 3), (14, 3), (16, 4)):
        made.add(made.next_look(1, windows, 1, whole=False, sha256=""))
        assert made.known_steps == known
        with pytest.raises(IndexError, match=f"step {known + 1} are not known yet"):
            made.step(1, known)
    made.add(made.next_look(1, 16, 1, whole=True, sha256=""))
    assert made.known_steps == inf
    assert made.step(1, 59).windows.max() < 16
    with pytest.raises(IndexError):
        made.step(1, 60)


def test_a_look_is_read_back_and_nothing_else_is():
    look = Look(step=1, start=0, stop=3, shards=1, whole=False, sha256="a")
    assert Look.model_validate(look.model_dump()) == look
    for wrong in ({"stop": 0}, {"stop": "3"}, {"more": 1}, {"start": -1}):
        with pytest.raises(ValueError, match="validation error"):
            Look.model_validate({**look.model_dump(), **wrong})


class Store:
    """A store that another process may be building."""

    def __init__(self) -> None:
        self.being_built = True

    def is_being_built(self) -> bool:
        return self.being_built

    def newest(self) -> None:
        return None


def test_a_builder_is_started_where_no_other_process_builds(monkeypatch):
    """Another run may end, and the builder with it, before the store is whole."""
    builders = []

    def begin(command):
        builders.append(SimpleNamespace(command=command, runs=True))
        return builders[-1]

    monkeypatch.setattr(early, "Builder", begin)
    store = Store()
    first = early.GrowingData(8, store, ["build"])
    other = early.GrowingData(8, store, patient=True)
    alone = early.GrowingData(8, store)
    assert first.more_comes() and other.more_comes() and alone.more_comes() and not builders
    store.being_built = False
    assert first.more_comes() and len(builders) == 1
    assert other.more_comes() and not alone.more_comes()  # it has not begun yet
    builders[0].runs = False  # it has failed: no other one is started
    assert not first.more_comes() and len(builders) == 1
    monkeypatch.setattr(early, "START_SECONDS", 0.0)
    assert not other.more_comes()


PLUGIN = """
import time
from pathlib import Path

from apt_core import ProviderSpec, hookimpl
from apt_core.providers import DatasetProvider


class Gated(DatasetProvider):
    def documents(self):
        yield from (f"document {n}" for n in range(30))
        while not Path("gate").exists():
            time.sleep(0.01)

    def fingerprint(self):
        return "gated"


@hookimpl
def apt_register_providers():
    return [ProviderSpec("dataset", "gated", Gated)]
"""


@pytest.mark.long
def test_the_builder_s_process_tidies_up_when_it_is_ended_and_says_why_it_failed(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("APT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "gated.py").write_text(PLUGIN, encoding="utf-8")
    words = ["--profile", "tiny_debug", "--plugin", "gated.py", "--data.loader", "gated"]
    stores = tmp_path / "cache" / "stores"

    ended = early.Builder(early.builder_command(words))
    failed = early.Builder(early.builder_command([*words, "--data.val_fraction", "2"]))
    while not [*stores.glob("*.building-*")]:
        assert ended.runs, ended.failure()
        time.sleep(0.01)
    ended.close()
    assert not ended.runs and not [*stores.iterdir()]
    (tmp_path / "gate").touch()
    whole = early.Builder(early.builder_command(words))
    while whole.runs or failed.runs:
        time.sleep(0.01)
    assert whole.failure() == "" and len([*stores.glob("*/store.json")]) == 1
    assert failed.failure().startswith("error: ") and "data.val_fraction" in failed.failure()
