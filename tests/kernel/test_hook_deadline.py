"""A hook that hangs is told of while it hangs, and is quarantined when it returns."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from apt_core import ConfigError, StopTraining, hook_deadline, hookimpl
from apt_core.config import parse_config
from apt_core.errors import PluginError
from apt_core.kernel import boot
from apt_core.plugin_manager import PluginManager

SECONDS = 0.05


class Reports(logging.Handler):
    """Wakes what hangs once it is told of."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.told = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if " has been in " in text:
            self.texts.append(text)
            self.told.set()


@pytest.fixture
def reports() -> Iterator[Reports]:
    handler, logger = Reports(), logging.getLogger("apt.plugins")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "apt-hook-deadline"]


def hangs(reports: Reports) -> None:
    assert reports.told.wait(60)


def raises(reports: Reports) -> None:
    hangs(reports)
    raise ValueError("gave up")


@pytest.mark.parametrize("hang", [hangs, raises])
def test_a_hook_that_hangs_is_told_of_with_its_stack_and_quarantined_when_it_returns(
    reports: Reports, plugin_of: type, hang: Callable[[Reports], None]
) -> None:
    manager = PluginManager()
    manager.register(plugin_of(on_step_end=lambda: hang(reports)), "slow")
    manager.step = 7
    with manager.hook_deadline(SECONDS):
        manager.hook.on_step_end(step=7, loss=None, trainer=None)
        assert threads()
    assert not threads()
    (report,) = reports.texts
    assert "plugin slow has been in on_step_end for " in report
    assert " at step 7 " in report
    assert "reports.told.wait(60)" in report
    assert "plugin_manager.py" not in report
    (failure,) = manager.records["slow"].failures
    assert failure.error.startswith("HookTimeoutError: it has returned after ")
    assert failure.quarantined
    assert manager.records["slow"].state == "quarantined"


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_wrapper_is_watched_before_and_after_its_yield(
    reports: Reports, plugin_of: type, when: str
) -> None:
    def around() -> Generator[None, Any, None]:
        if when == "before":
            hangs(reports)
        yield
        if when == "after":
            hangs(reports)

    manager = PluginManager()
    manager.register(plugin_of(apt_metrics=hookimpl(wrapper=True)(around)), "outer")
    manager.register(plugin_of(apt_metrics=lambda: {"a": 1.0}), "inner")
    with manager.hook_deadline(SECONDS):
        assert manager.hook.apt_metrics(trainer=None) == [{"a": 1.0}]
    assert "plugin outer has been in apt_metrics" in reports.texts[0]
    assert manager.is_quarantined("outer")
    assert not manager.is_quarantined("inner")


def test_whoever_hangs_is_blamed_and_not_who_is_around_it(
    reports: Reports, plugin_of: type
) -> None:
    manager = PluginManager()

    def around() -> Generator[None, Any, None]:
        yield

    manager.register(plugin_of(apt_metrics=hookimpl(wrapper=True)(around)), "outer")
    manager.register(plugin_of(apt_metrics=lambda: hangs(reports)), "inner")
    manager.register(
        plugin_of(on_step_end=lambda: manager.hook.apt_metrics(trainer=None)), "caller"
    )
    with manager.hook_deadline(SECONDS):
        manager.hook.on_step_end(step=1, loss=None, trainer=None)
    quarantined = [name for name in manager.records if manager.is_quarantined(name)]
    assert quarantined == ["inner"]


def test_required_and_strict_end_the_run(reports: Reports, plugin_of: type) -> None:
    manager = PluginManager(strict=True)
    manager.register(plugin_of(on_step_end=lambda: hangs(reports)), "slow")
    with (
        manager.hook_deadline(SECONDS),
        pytest.raises(PluginError, match="HookTimeoutError: it has returned after"),
    ):
        manager.hook.on_step_end(step=1, loss=None, trainer=None)


def test_a_stop_after_the_deadline_is_a_stop(reports: Reports, plugin_of: type) -> None:
    def stops() -> None:
        hangs(reports)
        raise StopTraining("enough")

    manager = PluginManager()
    manager.register(plugin_of(on_step_end=stops), "slow")
    with manager.hook_deadline(SECONDS), pytest.raises(StopTraining):
        manager.hook.on_step_end(step=1, loss=None, trainer=None)
    assert not manager.records["slow"].failures


def test_a_hook_that_may_last_is_told_of_only(
    reports: Reports, plugin_of: type, caplog: pytest.LogCaptureFixture
) -> None:
    manager = PluginManager(strict=True)
    manager.register(plugin_of(on_training_end=lambda: hangs(reports)), "uploads")
    with manager.hook_deadline(SECONDS):
        manager.hook.on_training_end(trainer=None, run=None)
    assert len(reports.texts) == 1
    assert "plugin uploads: on_training_end has returned after" in caplog.text
    assert not manager.records["uploads"].failures


def test_time_in_which_the_process_stood_still_or_a_debugger_had_it_does_not_count(
    reports: Reports, plugin_of: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = 0.0
    clock = time.monotonic
    monkeypatch.setattr(hook_deadline.time, "monotonic", lambda: clock() + stopped)

    def stop() -> None:
        nonlocal stopped
        stopped += 1e6

    manager = PluginManager()
    manager.register(plugin_of(on_step_end=stop, on_epoch_start=stop), "quick")
    with manager.hook_deadline(1e5):
        manager.hook.on_step_end(step=1, loss=None, trainer=None)
    assert not manager.records["quick"].failures
    assert not reports.texts


def test_a_debugger_has_all_the_time(
    reports: Reports, plugin_of: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hook_deadline, "DEBUGGERS", (__name__.partition(".")[0],))
    manager = PluginManager()
    manager.register(plugin_of(on_step_end=lambda: reports.told.wait(SECONDS * 6)), "inspected")
    with manager.hook_deadline(SECONDS):
        manager.hook.on_step_end(step=1, loss=None, trainer=None)
    assert not manager.records["inspected"].failures
    assert not reports.texts


def test_nothing_is_watched_where_it_is_off_and_other_threads_never_are(plugin_of: type) -> None:
    manager = PluginManager()
    seen: list[Any] = []
    manager.register(plugin_of(on_step_end=lambda: seen.append(manager.deadline)), "plugin")
    with manager.hook_deadline(0.0):
        manager.hook.on_step_end(step=1, loss=None, trainer=None)
        assert not threads()
    assert seen == [None]

    with manager.hook_deadline(60):
        running: list[Any] = []
        deadline = manager.deadline
        assert deadline is not None
        (call,) = manager.order("on_step_end")
        other = threading.Thread(target=lambda: running.append(deadline.enter(call)))
        other.start()
        other.join()
    assert running == [None]


IMPORTING = """
import logging, threading
told = threading.Event()
class Reports(logging.Handler):
    def emit(self, record):
        if " has been in " in record.getMessage():
            told.set()
handler = Reports()
logging.getLogger("apt.plugins").addHandler(handler)
assert told.wait(60)
logging.getLogger("apt.plugins").removeHandler(handler)
from apt_core import hookimpl
@hookimpl
def on_step_end():
    pass
"""


def test_an_import_that_hangs_is_told_of_before_the_run(reports: Reports, tmp_path: Path) -> None:
    plugin = tmp_path / "importing.py"
    plugin.write_text(IMPORTING, encoding="utf-8")
    kernel = boot({"training": {"hook_timeout": SECONDS}}, plugins=[str(plugin)], files=False)
    assert "plugin importing has been in its import for" in reports.texts[0]
    assert "importing.py" in reports.texts[0]
    assert kernel.manager.records["importing"].state == "active"
    assert not threads()


def test_the_setting_is_checked() -> None:
    for wrong in (-1, "never", float("inf")):
        with pytest.raises(ConfigError, match="hook_timeout"):
            parse_config({"training": {"hook_timeout": wrong}})


def test_it_can_be_turned_off_in_a_profile_that_extends_another(
    reports: Reports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From before the plugins are imported."""
    started: list[float] = []
    monkeypatch.setattr(hook_deadline.HookDeadline, "start", lambda self: started.append(1))
    plugin = tmp_path / "importing.py"
    plugin.write_text("from apt_core import hookimpl\n", encoding="utf-8")
    profile = tmp_path / "off.yaml"
    profile.write_text("extends: base\nname: off\ntraining: {hook_timeout: 0}\n")
    kernel = boot(str(profile), plugins=[str(plugin)], files=False)
    assert kernel.config.training.hook_timeout == 0
    assert not started
