"""``tiny_run``: a whole run in a moment, the same whenever it is run."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from apt_core import ConfigError, hookimpl
from apt_core.errors import PluginError
from apt_core.testing import TINY_PROFILE, Recorder, tiny_run

if TYPE_CHECKING:
    from tests.testing.conftest import WritePlugin

OBSERVER = "@hookimpl\ndef on_step_end(step):\n    seen.append(step)\n\nseen = []\n"
FAILING = "@hookimpl\ndef on_step_end(step):\n    1 / 0\n"


def test_a_run_goes_through_the_whole_life_cycle() -> None:
    recorder = Recorder()
    run = tiny_run(recorder)
    recorder.assert_order(
        "on_training_start",
        "on_evaluation_end",
        "on_epoch_start",
        "on_step_start",
        "on_step_end",
        "on_metrics",
        "on_epoch_end",
        "on_epoch_start",
        "on_checkpoint_saved",
        "on_generation_end",
        "on_training_end",
    )
    assert run.result.status == "finished" and run.result.epoch == 2
    assert recorder.count("on_step_end") == run.result.step > 10


def test_two_runs_have_the_same_weights_and_another_seed_has_others() -> None:
    first = tiny_run(steps=3)
    assert first.same_weights(tiny_run(steps=3))
    assert not first.same_weights(tiny_run(steps=4))
    assert not first.same_weights(tiny_run(steps=3, overrides={"training.seed": 1}))


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_steps_ends_the_run_early(steps: int) -> None:
    run = tiny_run(steps=steps)
    assert run.result.step == steps == run.manifest["step"]
    assert run.metrics[-1]["step"] == steps and "val_loss" in run.metrics[-1]


def test_plugins_are_objects_names_or_paths(write: WritePlugin) -> None:
    reference = write(OBSERVER)
    for plugin in (reference, Path(reference)):
        run = tiny_run(plugin, steps=2)
        assert run.manager.get_plugin("mine").seen == [1, 2]
    assert [row["name"] for row in run.manifest["plugins"]] == ["mine"]


def test_profile_and_overrides_say_what_is_trained() -> None:
    profile = {**TINY_PROFILE, "name": "mine", "model": {**TINY_PROFILE["model"], "d_ff": 8}}
    run = tiny_run(steps=1, profile=profile, overrides={"model.num_layers": 2})
    assert run.manifest["profile"] == "mine"
    assert run.weights["blocks.1.ffn.gate.weight"].shape == (8, 16)
    with pytest.raises(ConfigError, match="did you mean 'd_model'"):
        tiny_run(overrides={"model.d_modle": 3})


def test_a_failure_raises_unless_strict_is_off(write: WritePlugin) -> None:
    reference = write(FAILING)
    with pytest.raises(PluginError, match=r"mine failed in on_step_end at step 1 .*ZeroDivision"):
        tiny_run(reference, steps=5)
    run = tiny_run(reference, steps=5, strict=False)
    record = run.manager.records["mine"]
    assert (record.state, len(record.failures)) == ("quarantined", 3)
    assert run.same_weights(tiny_run(steps=5))


def test_a_run_in_a_folder_can_be_resumed(folder: Path) -> None:
    class Half:
        @hookimpl
        def on_step_end(self, step, trainer):
            if step == 3:
                trainer.request_stop("half of it")

    part = tiny_run(Half(), steps=6, output=folder / "runs" / "one")
    assert (part.result.status, part.result.step) == ("stopped", 3)
    rest = tiny_run(steps=6, output=folder / "runs" / "one", resume=True)
    assert rest.result.step == 6 and rest.same_weights(tiny_run(steps=6))


def test_nothing_is_left_behind(folder: Path) -> None:
    tiny_run(steps=1)
    assert [path.name for path in folder.iterdir()] in ([], ["cache"])


NUMBERS = itertools.count()
STATE = "state = {'steps': 0}\n"
COUNTS = """
@hookimpl
def on_step_end(step):
    state["steps"] += 1


@hookimpl
def apt_state_dict():
    return dict(state)


@hookimpl
def apt_load_state_dict(state):
    pass
"""
LOADS = COUNTS.replace("(state):\n    pass", "(state):\n    globals()['state'].update(state)")


def plugin_in(folder: Path, kind: str, hooks: str) -> str:
    """A reference to a plugin that counts steps: a file, a module, the module of a package, or one
    whose state is in a module beside it."""
    name = f"counts_{next(NUMBERS)}"
    head = "from apt_core import hookimpl\n"
    own, beside = STATE, ""
    if kind.endswith("beside"):
        own, beside = f"from {name}_state import state\n", STATE
    if kind.startswith("package"):
        (folder / name).mkdir()
        own = own.replace(f"from {name}_state", f"from {name}.state")
        (folder / name / "__init__.py").write_text("")
        (folder / name / "state.py").write_text(beside)
        (folder / name / "plugin.py").write_text(head + own + hooks)
        return f"{name}.plugin"
    (folder / f"{name}_state.py").write_text(beside)
    (folder / f"{name}.py").write_text(head + own + hooks)
    return f"{name}.py" if kind.startswith("file") else name


KINDS = [f"{kind}{beside}" for kind in ("file", "module", "package") for beside in ("", "_beside")]


@pytest.mark.parametrize(
    ("kind", "hooks"),
    [
        *((kind, LOADS) for kind in KINDS),
        # What it has not loaded is missing wherever its state is.
        ("file", COUNTS),
        ("package_beside", COUNTS),
    ],
    ids=lambda value: None if value in KINDS else "forgets" if value is COUNTS else "loads",
)
def test_a_run_that_resumes_has_what_its_checkpoint_gives_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str, hooks: str
) -> None:
    """And not what an earlier run of this process has left in a module."""
    monkeypatch.syspath_prepend(folder)
    reference = plugin_in(folder, kind, hooks)
    options = {"steps": 6, "output": folder / "run"}
    tiny_run(reference, stop_at_step=4, **options)
    name = reference.partition(".")[0]
    modules = {n: vars(m) for n, m in sys.modules.items() if n.startswith(name)}
    before = {n: values["state"] for n, values in modules.items() if "state" in values}
    resumed = tiny_run(reference, resume=True, **options)
    (plugin,) = (p for _, p in resumed.manager.list_name_plugin())
    assert plugin.state == {"steps": 6 if hooks is LOADS else 2}
    for n, state in before.items():
        assert sys.modules[n].state is state
        assert isinstance(state, dict) is (n != name)
        assert not isinstance(state, dict) or state == {"steps": 4}


def test_each_run_imports_a_plugin_that_nobody_has_imported(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(folder)
    reference = plugin_in(folder, "package", COUNTS)
    for _ in range(2):
        run = tiny_run(reference, steps=3)
        assert [p.state for _, p in run.manager.list_name_plugin()] == [{"steps": 3}]


def test_a_module_that_cannot_run_twice_keeps_what_it_has_and_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(folder)
    reference = plugin_in(folder, "package_beside", COUNTS)
    once = "import sys\nassert not hasattr(sys, 'counted_once')\nsys.counted_once = True\n"
    monkeypatch.setattr(sys, "counted_once", True, raising=False)
    monkeypatch.delattr(sys, "counted_once")
    name = reference.partition(".")[0]
    (folder / name / "state.py").write_text(once + STATE)
    options = {"steps": 6, "output": folder / "run"}
    tiny_run(reference, stop_at_step=4, **options)
    with pytest.warns(UserWarning, match=f"{name}.state cannot be run a second time"):
        tiny_run(reference, resume=True, **options)


def test_a_plugin_that_is_installed_is_imported_anew_by_a_resume(folder: Path) -> None:
    from apt_plugins.report import plugin

    options = {"steps": 2, "output": folder / "run"}
    run = tiny_run("report", stop_at_step=1, **options)
    assert isinstance(run.manager.get_plugin("report"), plugin.Plugin)
    run = tiny_run("report", resume=True, **options)
    assert not isinstance(run.manager.get_plugin("report"), plugin.Plugin)
    assert sys.modules["apt_plugins.report.plugin"] is plugin


def test_a_run_that_ends_before_its_first_row_has_none() -> None:
    class Stops:
        @hookimpl
        def on_training_start(self, trainer: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    assert [row for row in tiny_run(Stops()).metrics if "loss" in row] == []
