"""Two runs in one process, in turns or one within the other, share nothing: with all shipped
plugins on, each gives the bits, the rows and the lines that it gives alone."""

from __future__ import annotations

import importlib
import logging
import pkgutil
import re
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import apt_core
import apt_plugins
from apt_core import hookimpl
from apt_core.discovery import installed_plugins
from apt_core.testing import TinyRun, tiny_run
from apt_core.testing.module_state import KeptInModules

EXAMPLES = Path(__file__).parents[2] / "examples"
LEFT_OUT = {"hlbd", "growth", "to_tva", "tensorboard", "trackio", "wandb"}
"""Plugins that nothing but a certain source of data, or another model, has any use for, and
trackers, whose libraries keep something outside of a run's folder."""

SHIPPED = [
    *(n for n, p in installed_plugins().items() if p.dist == "apt-kernel" and n not in LEFT_OUT),
    # What scales the output of a feed-forward is none that experts can be made of.
    *(str(p) for p in sorted(EXAMPLES.glob("*.py")) if p.stem != "layer_scale"),
]
TIMED = re.compile(r"time/.*|tokens_per_s|mfu|memory_mb|peak_memory_mb")


def settings(number: int, folder: Path) -> dict[str, Any]:
    """Two profiles that differ in all that a plugin could keep of one for the other."""
    return {
        "training.seed": number,
        "training.deterministic": True,
        "training.log_every_steps": 1,
        "model.dropout": 0.1,
        "model.tva.s": 1,
        "model.moe.experts": (4, 2)[number],
        "model.bistate.mode": ("ema", "rdrop")[number],
        "model.bistate.weight": (0.5, 0.2)[number],
        "model.voting.threshold": (9.0, 0.5)[number],
        "retriever.folder": str(EXAMPLES),
        "retriever.search": "exact",
        "retriever.index": str(folder / "index"),
        "retriever.k": (2, 1)[number],
        "retriever.max_tokens": 8,
        "retriever.chunk_chars": 20 + number,
        "retriever.overlap_chars": 0,
        "routing.exploration": (0.3, 0.1)[number],
        "schedules.enable_moe_at_step": (4, 3)[number],
        "schedules.enable_quant_at_step": 5,
        "schedules.route_temp": {"start": 1.0, "end": 0.5, "by": "step", "until": 6 + number},
        "loss_logger.path": str(folder / "losses.csv"),
        "sqlite_tracker.path": str(folder / "metrics.db"),
    }


def run(number: int, folder: Path, *others: Any) -> TinyRun:
    return tiny_run(
        *SHIPPED,
        Says(),
        *others,
        steps=6 + number,
        overrides=settings(number, folder),
        output=folder / "run",
    )


def facts(of: TinyRun) -> dict[str, Any]:
    """All that a run has come to, but times and the names of folders."""
    folder = of.result.folder
    lines = [line[24:] for line in (folder / "log.txt").read_text(encoding="utf-8").splitlines()]
    hidden = [line for line in lines if "run folder" not in line and "data: " not in line]
    plugins = ("plugins: hands, ", "plugins: another, ")
    return {
        "rows": [{k: v for k, v in row.items() if not TIMED.fullmatch(k)} for row in of.metrics],
        "lines": [
            re.sub("|".join(plugins), "plugins: ", line.replace(str(folder), ""))
            for line in hidden
            if "checkpoint: " not in line
        ],
        "sample": of.result.sample,
        "losses": (folder.parent / "losses.csv").read_text(encoding="utf-8"),
        "failures": [row["name"] for row in of.manifest["plugins"] if row["failures"]],
    }


class Turns:
    """Lets one of several threads go on at a time."""

    def __init__(self, number: int) -> None:
        self._changed = threading.Condition()
        self._waiting = list(range(number))
        self.taken: list[int] = []

    @contextmanager
    def taking(self, me: int):
        self._wait(me)
        try:
            yield
        finally:
            with self._changed:
                self._waiting.remove(me)
                self._changed.notify_all()

    def hand_over(self, me: int) -> None:
        with self._changed:
            self._waiting.remove(me)
            self._waiting.append(me)
            self._changed.notify_all()
        self._wait(me)

    def _wait(self, me: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._waiting[0] == me, timeout=300)
            self.taken.append(me)


class Says:
    """Logs while the profile is checked."""

    @hookimpl
    def apt_configure(self, config: Any) -> None:
        logging.getLogger("apt.says").info("%d is being checked", config.training.seed)


class Hands:
    """Calls ``over`` in the middle of a run's steps, evaluations, generations and checkpoints."""

    def __init__(self, over: Callable[[], object]) -> None:
        self.over = over

    @hookimpl
    def on_step_start(self) -> None:
        self.over()

    @hookimpl
    def on_step_end(self) -> None:
        self.over()

    @hookimpl
    def on_evaluation_start(self) -> None:
        self.over()

    @hookimpl
    def on_generation_start(self) -> None:
        self.over()

    @hookimpl
    def on_checkpoint_saved(self) -> None:
        self.over()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[TinyRun]:
    return [run(number, tmp_path_factory.mktemp(f"alone{number}")) for number in range(2)]


def assert_as_alone(runs: list[TinyRun], alone: list[TinyRun]) -> None:
    for one, other in zip(runs, alone, strict=True):
        assert one.same_weights(other)
        assert facts(one) == facts(other)


def test_two_runs_in_turns_are_what_each_is_alone(alone: list[TinyRun], tmp_path: Path) -> None:
    turns, runs, errors = Turns(2), {}, []

    def train(number: int) -> None:
        try:
            with turns.taking(number):
                hands = Hands(lambda: turns.hand_over(number))
                runs[number] = run(number, tmp_path / str(number), hands)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=train, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    assert turns.taken[:20] == [0, 1] * 10
    assert_as_alone([runs[0], runs[1]], alone)


def test_a_run_within_a_run_is_what_it_is_alone(alone: list[TinyRun], tmp_path: Path) -> None:
    inner: list[TinyRun] = []

    class Another:
        @hookimpl
        def on_step_end(self, step: int) -> None:
            if step == 5:
                inner.append(run(1, tmp_path / "inner"))

    outer = run(0, tmp_path / "outer", Another())
    assert_as_alone([outer, *inner], alone)


RUNNING = "what is there of the runs that are under way, by run"
IN_MODULES = {
    "apt_core.log._own": RUNNING,
    "apt_core.log._RUN": RUNNING,
    "apt_core.log._noting": RUNNING,
    "apt_core.log._listening": RUNNING,
    "apt_core.modeling.seeds._wanting": RUNNING,
    "apt_core.secrets._KEPT": "the secrets of the profiles in use, which no run may print",
    "apt_core.runs.folder_lock._HELD": "the locks of this process, for its children to let go of",
}
CACHES = {
    "apt_core.config.yaml_text._yaml_of": "a function of its argument",
    "apt_core.data.order._block": "a function of its arguments, read-only",
    "apt_core.data.order._cycle": "a function of its argument",
    "apt_core.data.permutation.mixed": "a function of its arguments",
    "apt_core.data.permutation._sorted": "a function of its arguments, read-only",
    "apt_core.hook_returns._cpu": "a constant of torch, which is imported late",
    "apt_core.parallel.peak._peak": "a measurement of this machine",
    "apt_core.runs.folder._versions": "what is installed",
    "apt_core.testing.own_modules._folder": "where files are",
    "apt_core.plugin_state._can_be_saved": "a fact of safetensors",
    "apt_plugins.moe.cpu_threads._pool": "threads, which keep nothing from job to job",
    "apt_plugins.report.page._asset": "a file of the package",
    "apt_plugins.report.page.templates": "templates of a package",
}


class Watching(KeptInModules):
    """Looks in one step, with all plugins enabled, and after each generation and the run."""

    @hookimpl
    def on_step_end(self, step: int) -> None:
        if step == 5:
            self.look()


def test_modules_keep_nothing_of_a_run(alone: list[TinyRun], tmp_path: Path) -> None:
    """Neither a shipped plugin, nor an example, nor the core."""
    packages = ("apt_core", "apt_plugins", "apt_plugin_")
    for package in (apt_core, apt_plugins):
        for each in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not each.name.endswith("__main__"):
                importlib.import_module(each.name)

    def modules() -> list[Any]:
        return [module for name, module in sys.modules.items() if name.startswith(packages)]

    watching = Watching(modules)
    for number in range(2):
        run(number, tmp_path / str(number), watching)
        watching.look()
    assert watching.names.keys() <= IN_MODULES.keys()
    cached = {
        f"{value.__module__}.{value.__name__}"
        for module in modules()
        for value in vars(module).values()
        if hasattr(value, "cache_info") and value.__module__.startswith(packages)
    }
    assert cached == CACHES.keys()
