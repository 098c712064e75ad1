"""Hooks in the background: beside the loop, in order, bounded, and handled as all others are."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from apt_core import ConfigError, StopTraining, hookimpl
from apt_core.background_hooks import BackgroundHooks
from apt_core.errors import PluginError
from apt_core.hookspecs import POLICIES, hooks_where
from apt_core.plugin_manager import PluginManager
from apt_core.process_watch import EarlyWatch

SECONDS = 60.0


def background(function: Callable[..., Any]) -> Callable[..., Any]:
    return hookimpl(background=True)(function)


class Gate:
    """A hook that waits until it is let go."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()
        self.rows: list[tuple[int, dict[str, float], str]] = []

    @hookimpl(background=True)
    def on_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.entered.set()
        assert self.opened.wait(SECONDS)
        self.rows.append((step, metrics, threading.current_thread().name))

    @hookimpl(background=True)
    def on_checkpoint_saved(self, path: Path) -> None:
        self.rows.append((-1, {}, str(path)))


@pytest.mark.parametrize(
    ("hook", "function", "options", "message"),
    [
        ("on_step_end", lambda step: None, {}, "cannot run in the background"),
        ("apt_metrics", lambda: None, {}, "cannot run in the background"),
        ("on_metrics", lambda step: (yield), {"wrapper": True}, "cannot be a wrapper"),
        ("on_metrics", lambda step: None, {"collective": True}, "cannot be a collective"),
        ("on_training_start", lambda trainer: None, {}, "'trainer' changes while the run goes on"),
        ("on_exception", lambda error: None, {}, "'error' changes while the run goes on"),
    ],
)
def test_what_is_no_report_is_refused_in_the_background(
    manager: PluginManager, plugin_of: type, hook: str, function: Any, options: Any, message: str
) -> None:
    marked = hookimpl(background=True, **options)(function)
    with pytest.raises(ConfigError, match=message) as refused:
        manager.register(plugin_of(**{hook: marked}), "mine")
    (problem,) = refused.value.problems
    assert problem.key == f"plugin mine, {hook}"
    assert "test_background_hooks.py" in problem.where


def test_what_a_hook_may_hand_to_the_background_is_of_the_hook() -> None:
    from apt_core.hookspecs import REACHES_WEIGHTS
    from apt_core.inspect.listing import hook_facts

    for hook in hooks_where(lambda policy: bool(policy.background)):
        allowed = set(POLICIES[hook].background)
        assert allowed <= set(hook_facts(hook)["signature"].partition("(")[2][:-1].split(", "))
        assert not allowed & (REACHES_WEIGHTS - {"request"}), hook
        assert not (POLICIES[hook].in_step or POLICIES[hook].changes_weights), hook


def test_calls_keep_their_order_on_a_thread_of_the_plugin(
    manager: PluginManager, plugin_of: type
) -> None:
    gate, threads = Gate(), []
    gate.opened.set()
    manager.register(gate, "one")
    other = plugin_of(on_metrics=background(lambda: threads.append(threading.current_thread())))
    manager.register(other, "two")
    with manager.background_hooks(1000, 0.0):
        row = {"loss": 1.0}
        for step in range(50):
            manager.hook.on_metrics(metrics=row, step=step)
            row["loss"] += 1.0  # what was handed over stays as it was
        manager.finish_background(SECONDS)
    assert [step for step, _, _ in gate.rows] == [*range(50)]
    assert [metrics["loss"] for _, metrics, _ in gate.rows] == [step + 1.0 for step in range(50)]
    assert {name for _, _, name in gate.rows} == {"apt-background-one"}
    assert {thread.name for thread in threads} == {"apt-background-two"}
    assert not any(thread.is_alive() for thread in threads)


def test_without_a_run_they_are_called_like_others(manager: PluginManager) -> None:
    gate = Gate()
    gate.opened.set()
    manager.register(gate, "one")
    manager.hook.on_metrics(metrics={}, step=1)
    assert [name for _, _, name in gate.rows] == [threading.current_thread().name]


def test_a_full_queue_drops_and_counts(
    manager: PluginManager, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate()
    manager.register(gate, "slow")
    with manager.background_hooks(3, 0.0), caplog.at_level(logging.DEBUG, "apt.plugins"):
        manager.hook.on_metrics(metrics={}, step=0)
        assert gate.entered.wait(SECONDS)
        for step in range(1, 10):
            manager.step = step
            manager.hook.on_metrics(metrics={}, step=step)
        manager.hook.on_checkpoint_saved(path=Path("last"), trainer=None)
        manager.settle_background()
        manager.settle_background()
        gate.opened.set()
        manager.finish_background(SECONDS)
    assert [step for step, _, _ in gate.rows] == [0, 1, 2, 3, -1]
    assert manager.records["slow"].dropped == {"on_metrics": 6}
    assert manager.records["slow"].failures == []
    said = [record for record in caplog.records if "has lost" in record.getMessage()]
    assert [(record.levelname, record.getMessage()) for record in said] == [
        ("WARNING", f"plugin slow has lost 6 calls of on_metrics in the background: {reason}")
        for reason in ("3 calls wait already", "in the whole run")
    ]


def fails(step: int) -> None:
    raise ValueError(f"no {step}")


def test_a_failure_is_named_counted_and_quarantined(
    manager: PluginManager, plugin_of: type
) -> None:
    told = []
    manager.register(plugin_of(on_metrics=background(fails)), "bad")
    manager.register(plugin_of(on_plugin_failure=lambda failure: told.append(failure)), "listens")
    with manager.background_hooks(100, 0.0):
        for step in range(1, 8):
            manager.step = step
            manager.hook.on_metrics(metrics={}, step=step)
        manager.step = 20
        manager.finish_background(SECONDS)
    record = manager.records["bad"]
    assert [(f.hook, f.step, f.error) for f in record.failures] == [
        ("on_metrics", step, f"ValueError: no {step}") for step in (1, 2, 3)
    ]
    line = fails.__code__.co_firstlineno + 1
    assert record.failures[0].where.endswith(f"test_background_hooks.py:{line}")
    assert record.state == "quarantined"
    assert told == record.failures
    assert record.dropped == {}


@pytest.mark.parametrize("how", ["fails", "drops", "hangs", "leaves"])
def test_strict_makes_an_error_of_each(
    plugin_of: type, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = PluginManager(strict=True)
    manager.watch = EarlyWatch()
    gate, waits = Gate(), threading.Event()
    drain = BackgroundHooks.drained

    def drained(self: BackgroundHooks, until: float) -> bool:
        waits.set()
        return drain(self, until)

    monkeypatch.setattr(BackgroundHooks, "drained", drained)

    def leaves() -> None:
        assert waits.wait(SECONDS)
        sys.setrecursionlimit(sys.getrecursionlimit() + 1)

    functions = {"fails": background(fails), "leaves": background(leaves)}
    if how in functions:
        manager.register(plugin_of(on_metrics=functions[how]), "bad")
    else:
        manager.register(gate, "bad")
    messages = {
        "fails": "failed in on_metrics at step 0 .*: ValueError: no 0; the run stops because",
        "drops": "has lost 2 calls of on_metrics in the background: 1 calls .* the run stops",
        "hangs": "AbandonedCallError: it has not returned 0.01 seconds after",
        "leaves": "left changed in on_metrics .*: recursion limit .*; the run stops because",
    }
    with manager.background_hooks(1 if how == "drops" else 100, 0.0):
        manager.hook.on_metrics(metrics={}, step=0)
        if how in ("drops", "hangs"):
            assert gate.entered.wait(SECONDS)
        for step in (1, 2, 3) if how == "drops" else ():
            manager.hook.on_metrics(metrics={}, step=step)
        with pytest.raises(PluginError, match=messages[how]):
            if how == "drops":
                manager.settle_background()
            else:
                manager.finish_background(0.01 if how == "hangs" else SECONDS)
        gate.opened.set()


def test_what_hangs_is_told_of_and_left_behind(
    manager: PluginManager, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate()
    manager.register(gate, "hangs")
    with manager.background_hooks(100, 1e-6):
        manager.step = 4
        manager.hook.on_metrics(metrics={}, step=4)
        assert gate.entered.wait(SECONDS)
        manager.hook.on_metrics(metrics={}, step=5)
        manager.settle_background()
        manager.settle_background()
        (told,) = [r.getMessage() for r in caplog.records if "has been in" in r.getMessage()]
        assert told.startswith("plugin hangs has been in on_metrics of step 4, in the background")
        assert "1 calls wait" in told
        assert "self.opened.wait(SECONDS)" in told
        assert "background_hooks.py" not in told.replace("test_background_hooks.py", "")
        manager.finish_background(0.0)
        manager.hook.on_metrics(metrics={}, step=6)  # nothing is queued any more
    (failure,) = manager.records["hangs"].failures
    assert (failure.hook, failure.step) == ("on_metrics", 4)
    assert failure.error.startswith("AbandonedCallError: it has not returned 0 seconds after the")
    assert "test_background_hooks.py:" in failure.error
    assert manager.records["hangs"].dropped == {"on_metrics": 1}
    gate.opened.set()


def test_what_is_left_behind_leaves_the_process_to_those_after_the_run(
    manager: PluginManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    gate = Gate()
    manager.register(gate, "late")
    with manager.background_hooks(100, 0.0):
        manager.hook.on_metrics(metrics={}, step=1)
        assert gate.entered.wait(SECONDS)
        manager.finish_background(0.0)
    (thread,) = [each for each in threading.enumerate() if each.name == "apt-background-late"]
    monkeypatch.chdir(tmp_path)
    gate.opened.set()
    thread.join(SECONDS)
    assert not thread.is_alive() and Path.cwd() == tmp_path


@pytest.mark.parametrize("error", [StopTraining("enough"), KeyboardInterrupt()])
def test_a_stop_reaches_the_loop_when_it_next_looks(
    manager: PluginManager, plugin_of: type, error: BaseException
) -> None:
    def stop() -> None:
        raise error

    manager.register(plugin_of(on_metrics=background(stop)), "stops")
    with manager.background_hooks(100, 0.0):
        manager.hook.on_metrics(metrics={}, step=1)
        with pytest.raises(type(error)):
            manager.finish_background(SECONDS)


def test_a_failure_in_the_telling_of_one_is_counted_and_not_told_again(
    manager: PluginManager, plugin_of: type
) -> None:
    told = []

    def tell(failure: Any) -> None:
        told.append(failure.plugin)
        raise ValueError("cannot tell")

    manager.register(plugin_of(on_metrics=background(fails)), "bad")
    manager.register(plugin_of(on_plugin_failure=background(tell)), "tells")
    with manager.background_hooks(100, 0.0):
        manager.hook.on_metrics(metrics={}, step=1)
        manager.finish_background(SECONDS)
    assert told == ["bad"]
    assert [len(manager.records[name].failures) for name in ("bad", "tells")] == [1, 1]


def test_draws_on_a_thread_move_no_global_generator(
    manager: PluginManager, plugin_of: type
) -> None:
    torch = pytest.importorskip("torch")
    from torch.nn import functional

    def draw(step: int) -> None:
        ones = torch.ones(64)
        torch.rand(3), torch.randn(3), torch.randint(5, (3,)), torch.randint(2, 5, (3,))
        torch.randperm(5), torch.rand_like(ones), torch.randn_like(ones), torch.bernoulli(ones / 2)
        torch.randint_like(ones, 5), torch.randint_like(ones, 2, 5), ones.clone().normal_()
        functional.dropout(ones), torch.nn.Linear(2, 2), torch.multinomial(ones, 2)
        x = torch.ones(1, 1, 4, 8)
        functional.scaled_dot_product_attention(x, x, x)
        torch.rand(3, generator=torch.Generator())
        if step:
            torch.nn.LSTM(2, 2, num_layers=2, dropout=0.5)(torch.ones(3, 1, 2))
            functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5)

    manager.register(plugin_of(on_metrics=background(draw)), "draws")
    before = torch.get_rng_state()
    with manager.background_hooks(100, 0.0):
        manager.hook.on_metrics(metrics={}, step=0)
        manager.finish_background(SECONDS)
    assert torch.equal(torch.get_rng_state(), before)
    assert manager.records["draws"].failures == []
    with manager.background_hooks(100, 0.0):
        manager.hook.on_metrics(metrics={}, step=1)
        manager.finish_background(SECONDS)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("over", [False, True])
def test_what_a_thread_changes_in_the_process_is_put_back_and_told(
    manager: PluginManager, plugin_of: type, watched: bool, over: bool
) -> None:
    """By a call that is ``over`` when the run ends, or is made then."""
    import os

    torch = pytest.importorskip("torch")
    called = threading.Event()

    def change() -> None:
        assert called.wait(SECONDS)
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)  # of this thread alone
        os.chdir("/")
        raise ValueError("and more")

    folder = os.getcwd()
    manager.watch = EarlyWatch() if watched else None
    manager.register(plugin_of(on_metrics=background(change)), "messy")
    with manager.background_hooks(100, 0.0):
        manager.hook.on_metrics(metrics={}, step=1)
        called.set()
        if over:
            assert manager.background is not None
            manager.background.drained(monotonic() + SECONDS)
        manager.finish_background(SECONDS)
    assert torch.get_default_dtype() is torch.float32
    assert os.getcwd() == folder
    assert torch.is_grad_enabled()
    record = manager.records["messy"]
    (left,) = record.leftovers
    assert left.hook == "on_metrics"
    assert "default dtype from torch.float32 to torch.float64" in left.error
    assert "working directory" in left.error
    assert [failure.error for failure in record.failures] == ["ValueError: and more"]


@pytest.mark.parametrize("within", ["begins", "ends"])
def test_what_a_hook_changes_for_a_moment_is_no_change_of_a_call_beside_it(
    manager: PluginManager, plugin_of: type, within: str
) -> None:
    """The call begins, or ends, while the hook computes in another type."""
    torch = pytest.importorskip("torch")
    gate = Gate()

    def compute() -> None:
        torch.set_default_dtype(torch.float64)
        try:
            if within == "begins":
                manager.hook.on_metrics(metrics={}, step=1)
                assert gate.entered.wait(SECONDS)
            else:
                gate.opened.set()
                assert manager.background is not None
                assert manager.background.drained(monotonic() + SECONDS)
            assert torch.zeros(1).dtype is torch.float64
        finally:
            torch.set_default_dtype(torch.float32)

    manager.register(plugin_of(on_step_end=hookimpl(compute)), "computes")
    manager.register(gate, "innocent")
    with manager.background_hooks(100, 0.0):
        if within == "ends":
            manager.hook.on_metrics(metrics={}, step=1)
            assert gate.entered.wait(SECONDS)
        manager.hook.on_step_end(step=1, loss=torch.zeros(()), trainer=None)
        gate.opened.set()
        manager.finish_background(SECONDS)
    assert torch.get_default_dtype() is torch.float32
    assert [step for step, _, _ in gate.rows] == [1]
    records = manager.records.values()
    assert [record.leftovers for record in records] == [[], []]
    assert [record.failures for record in records] == [[], []]


def test_what_the_loop_changes_meanwhile_stays_and_is_no_plugins_change(
    manager: PluginManager, plugin_of: type
) -> None:
    begun, goes_on = threading.Event(), threading.Event()

    def report() -> None:
        begun.set()
        assert goes_on.wait(SECONDS)

    before = sys.getrecursionlimit()
    manager.register(plugin_of(on_metrics=background(report)), "innocent")
    try:
        with manager.background_hooks(100, 0.0):
            manager.hook.on_metrics(metrics={}, step=1)
            assert begun.wait(SECONDS)
            sys.setrecursionlimit(before + 7)
            goes_on.set()
            manager.finish_background(SECONDS)
            assert sys.getrecursionlimit() == before + 7
    finally:
        sys.setrecursionlimit(before)
    assert manager.records["innocent"].leftovers == []
