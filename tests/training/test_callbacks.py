"""What a plugin gives to others to call: its failures are named, and seldom end the run."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from torch import nn
from torch.nn.modules import module as torch_module

from apt_core import StopTraining, hookimpl
from apt_core.errors import PluginError, TrainingError
from apt_core.runs import checkpoint
from apt_core.testing import TinyRun, tiny_run

STEPS = 6


def fails(*_: Any, **__: Any) -> None:
    raise KeyError("layer")


class Calls:
    """Something that can be called, and is no function."""

    def __call__(self, *_: Any) -> None:
        raise KeyError("layer")


def leaves(*_: Any, **__: Any) -> None:
    raise SystemExit(0)


class Posting(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        fails()


def listen(trainer: Any) -> None:
    logging.getLogger("apt").addHandler(Posting())


def filter_records(trainer: Any) -> None:
    # Of a logger, not of a handler.
    for name in ("apt.training", "apt.checkpoint"):
        logging.getLogger(name).addFilter(fails)


def make_records(trainer: Any) -> None:
    logging.setLogRecordFactory(fails)


def everywhere(trainer: Any) -> None:
    torch_module.register_module_forward_hook(fails)


def in_every_layer(trainer: Any) -> None:
    for module in trainer.model.modules():
        module.register_forward_hook(fails, with_kwargs=True)


def of_every_gradient(trainer: Any) -> None:
    for parameter in trainer.model.parameters():
        parameter.register_hook(fails)
        parameter.register_post_accumulate_grad_hook(fails)


ISOLATED: dict[str, Callable[[Any], Any]] = {
    "forward": lambda trainer: trainer.model.register_forward_hook(fails),
    "forward of all": in_every_layer,
    "before the forward": lambda trainer: trainer.model.register_forward_pre_hook(fails),
    "an object": lambda trainer: trainer.model.register_forward_hook(Calls()),
    "leaves": lambda trainer: trainer.model.register_forward_hook(leaves),
    "backward": lambda trainer: trainer.model.blocks[0].register_full_backward_hook(fails),
    "gradients": of_every_gradient,
    "optimizer": lambda trainer: trainer.optimizer.register_step_post_hook(fails),
    "state": lambda trainer: trainer.model.register_state_dict_post_hook(fails),
    "global": everywhere,
    "handler": listen,
    "filter": filter_records,
    "record": make_records,
}
"""What a plugin may register, in on_training_start or in a step, that fails when it is called."""


class Registering:
    def __init__(self, register: Callable[[Any], Any], at: int) -> None:
        self._register, self._at = register, at

    @hookimpl
    def on_training_start(self, trainer: Any) -> None:
        if self._at == 0:
            self._register(trainer)

    @hookimpl
    def on_step_start(self, trainer: Any, step: int) -> None:
        if self._at == step:
            self._register(trainer)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    names = ("apt", "apt.training", "apt.checkpoint")
    before = [(list(log.handlers), list(log.filters)) for log in map(logging.getLogger, names)]
    yield
    for name, (handlers, filters) in zip(names, before, strict=True):
        logging.getLogger(name).handlers[:] = handlers
        logging.getLogger(name).filters[:] = filters
    logging.setLogRecordFactory(logging.LogRecord)
    torch_module._global_forward_hooks.clear()


def run_with(*plugins: Any, output: Path, strict: bool = False) -> TinyRun:
    keys = {"training.save_every_steps": 2, "training.keep_last": 0, "training.log_every_steps": 1}
    return tiny_run(*plugins, steps=STEPS, strict=strict, output=output, overrides=keys)


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return run_with(output=tmp_path_factory.mktemp("quiet") / "run")


TURNS = [(kind, 3 * (number % 2)) for number, kind in enumerate(ISOLATED)]


@pytest.mark.parametrize(("kind", "at"), [*TURNS, ("forward", 3), ("gradients", 3), ("handler", 3)])
def test_a_callback_that_fails_costs_its_plugin_and_not_the_run(
    kind: str, at: int, quiet: TinyRun, tmp_path: Path
) -> None:
    run = run_with(Registering(ISOLATED[kind], at), output=tmp_path / "run")
    assert run.same_weights(quiet)
    assert (run.result.status, run.result.sample) == ("finished", quiet.result.sample)
    record = run.manager.records["registering"]
    assert record.failures
    for failure in record.failures:
        error = "SystemExit: 0" if kind == "leaves" else "KeyError: 'layer'"
        assert failure.error == error and Path(__file__).name in failure.where
        assert "(a callback)" in failure.hook or "(logging)" in failure.hook
    (row,) = run.manifest["plugins"]
    assert row["failures"] and run.manifest["status"] == "finished"
    assert len(checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")) == STEPS // 2
    assert "finished" in (tmp_path / "run" / "manifest.json").read_text()


@pytest.mark.parametrize("kind", ["forward", "handler"])
def test_strict_makes_it_an_error(kind: str, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=r"plugin registering failed in .* KeyError: 'layer'"):
        run_with(Registering(ISOLATED[kind], 3), output=tmp_path / "run", strict=True)
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "failed"


# What called them cannot go on ------------------------------------------------------------------


class OfTheLogits:
    @hookimpl
    def apt_loss_terms(self, trainer: Any, output: Any) -> None:
        if trainer.step == 3:
            output.logits.register_hook(fails)


class TakingPart:
    """It scales the logits, until it leaves."""

    @hookimpl
    def on_training_start(self, trainer: Any) -> None:
        def scale(module: nn.Module, args: Any, output: Any) -> Any:
            if trainer.step == 3:
                raise SystemExit(0)
            output.logits = output.logits * 1.0
            return output

        trainer.model.register_forward_hook(scale)


@pytest.mark.parametrize("plugin", [OfTheLogits, TakingPart])
def test_a_failure_that_ends_the_run_names_the_plugin(plugin: type, tmp_path: Path) -> None:
    with pytest.raises(PluginError) as caught:
        run_with(plugin(), output=tmp_path / "run")
    name = plugin.__name__.lower()
    for part in (f"plugin {name} failed in", "(a callback)", f"{Path(__file__).name}:"):
        assert part in str(caught.value)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["status"] == "failed" and name in manifest["error"]
    assert [len(row["failures"]) for row in manifest["plugins"]] == [1]
    assert len(checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")) == 2


class Stubborn:
    """Whatever it is asked while the run dies, it raises."""

    def __init__(self, error: BaseException) -> None:
        self._error = error
        self._dying = False

    @hookimpl
    def on_step_end(self, trainer: Any, step: int) -> None:
        if step == 3:
            self._dying = True
            fails()

    @hookimpl
    def apt_state_dict(self, trainer: Any) -> dict[str, int]:
        if self._dying:
            raise self._error
        return {"steps": trainer.step}

    @hookimpl
    def on_exception(self) -> None:
        raise self._error


class Unspeakable(TrainingError):
    def __str__(self) -> str:
        raise LookupError("no text")


@pytest.mark.parametrize(
    ("error", "told"),
    [(TrainingError("caf\udce9"), "caf\\udce9"), (Unspeakable(), "cannot be printed")],
)
def test_what_a_run_dies_of_may_be_unspeakable(
    error: Exception, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: Any) -> None:
        raise error

    monkeypatch.setattr("apt_core.training.step.log.StepLog.write", write)
    with pytest.raises(TrainingError):
        run_with(output=tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["status"] == "failed" and told in manifest["error"]


@pytest.mark.parametrize(
    "error",
    [
        GeneratorExit(),
        KeyboardInterrupt(),
        StopTraining("no"),
        SystemExit(0),
        PluginError("its own", plugin="x", hook="y"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_dying_run_keeps_its_checkpoint_and_its_manifest(
    error: BaseException, tmp_path: Path
) -> None:
    with pytest.raises(PluginError, match="on_step_end"):
        run_with(Stubborn(error), output=tmp_path / "run", strict=True)
    newest = checkpoint.newest_intact(tmp_path / "run" / "checkpoints")
    assert (newest.state.step, newest.state.plugins) == (3, {})
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "failed"


def test_hooks_of_all_modules_end_with_the_run_of_their_plugin(tmp_path: Path) -> None:
    calls: list[Any] = []

    class Counts:
        @hookimpl
        def on_training_start(self) -> None:
            torch_module.register_module_forward_hook(lambda *call: calls.append(call[0]))

    other = torch_module.register_module_forward_hook(Mock(return_value=None))
    run_with(Counts(), output=tmp_path / "run")
    assert len(calls) > 0
    calls.clear()
    run_with(output=tmp_path / "next")
    assert calls == []
    assert list(torch_module._global_forward_hooks) == [other.id]
