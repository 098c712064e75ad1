"""What a plugin changes in the process is put back after the call, and told by its name; the
weights stay those of the run without it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _device
from torch.utils._python_dispatch import TorchDispatchMode

from apt_core import hookimpl, torch_state
from apt_core.errors import PluginError
from apt_core.testing import TINY_PROFILE, TinyRun, tiny_run
from apt_core.torch_state import STATES, TorchWatch
from apt_core.training import Trainer

OVERRIDES = {
    "model.dropout": 0.3,
    "training.log_every_steps": 1,
    "evaluation.eval_freq": 2,
    "evaluation.sample_tokens": 3,
}
STEPS = 4


class Doubling(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        result = function(*args, **(kwargs or {}))
        return result * 2 if function is nn.functional.cross_entropy else result


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        return function(*args, **(kwargs or {}))


def entered(context: Any) -> None:
    KEPT.append(context)
    context.__enter__()


KEPT: list[Any] = []
"""Contexts that nobody leaves: a generator that is collected would leave its own."""

CHANGES: dict[str, Callable[[], object]] = {
    "inference mode": lambda: entered(torch.inference_mode()),
    "grad mode": lambda: torch.set_grad_enabled(False),
    "torch function modes": lambda: entered(Doubling()),
    "default device": lambda: torch.set_default_device("meta"),
    "torch dispatch modes": lambda: entered(Passing()),
    "torch function state": lambda: entered(torch._C.DisableTorchFunction()),
    "default dtype": lambda: torch.set_default_dtype(torch.float64),
    "autocast nesting": lambda: entered(torch.autocast("cpu", enabled=False)),
    "autocast": lambda: entered(torch.autocast("cpu", dtype=torch.bfloat16)),
    "saved-tensors hooks": lambda: entered(
        torch.autograd.graph.saved_tensors_hooks(lambda x: x * 2, lambda x: x)
    ),
    "ban of saved-tensors hooks": lambda: entered(
        torch.autograd.graph.disable_saved_tensors_hooks("no")
    ),
    "multithreaded backward": lambda: entered(torch.autograd.set_multithreading_enabled(False)),
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True),
    "number of threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "fp32 precision": lambda: torch.set_float32_matmul_precision("medium"),
    "deterministic algorithms": lambda: torch.use_deterministic_algorithms(True),
    "math attention kernel": lambda: torch.backends.cuda.enable_math_sdp(False),
    "flash attention kernel": lambda: torch.backends.cuda.enable_flash_sdp(False),
    "order of attention kernels": lambda: torch._C._set_sdp_priority_order([2, 1, 0, 3, 4]),
    "mkldnn_enabled": lambda: setattr(torch.backends.mkldnn, "enabled", False),
    "bf16 reduction": lambda: setattr(
        torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False
    ),
    "flushing of denormal numbers": lambda: torch.set_flush_denormal(True),
    "recursion limit": lambda: __import__("sys").setrecursionlimit(150),
    "working directory": lambda: os.chdir("/"),
    "numpy's error handling": lambda: np.seterr(all="raise"),
}

HOOKS = (
    "apt_configure", "on_training_start", "on_step_start", "apt_loss_terms", "on_backward_end",
    "on_step_end", "on_metrics", "on_evaluation_start", "on_checkpoint_saved",
    "apt_logits_processors",
)  # fmt: skip
IN_A_STEP = ("on_step_start", "apt_loss_terms", "on_backward_end", "on_step_end")


def plugin(hook: str, change: Callable[[Any], object], *, raises: bool, at: int = 1) -> Any:
    """A plugin that changes something in one call of ``hook``, by default the first."""

    class Careless:
        def __init__(self) -> None:
            self.calls = 0

        def act(self, trainer: Any) -> None:
            self.calls += 1
            if self.calls == at:
                change(trainer)
                if raises:
                    raise RuntimeError("failed before it could tidy up")

    takes = (
        "trainer" if hook not in ("apt_configure", "on_metrics", "apt_logits_processors") else ""
    )
    scope: dict[str, Any] = {}
    exec(f"def {hook}(self, {takes}): self.act({takes or None})", scope)
    setattr(Careless, hook, hookimpl(scope[hook]))
    return Careless()


@pytest.fixture(scope="module")
def quiet() -> Iterator[TinyRun]:
    yield ran()


@pytest.fixture(autouse=True)
def state_of_the_process(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test leaves to the next what a broken watch would."""
    monkeypatch.chdir(tmp_path)
    state = TorchWatch()
    before = state.before()
    yield
    assert state.put_back(before) == []


def ran(*plugins: Any, **options: Any) -> TinyRun:
    """A run in which failures are isolated."""
    options.setdefault("strict", False)
    return tiny_run(*plugins, steps=STEPS, **{"overrides": OVERRIDES, **options})


def same(run: TinyRun, quiet: TinyRun) -> bool:
    return run.same_weights(quiet)


def losses(run: TinyRun) -> list[tuple[Any, ...]]:
    return [(row["step"], row.get("loss"), row.get("val_loss")) for row in run.metrics]


def left_by(hook: str, changes: Sequence[tuple[str, Callable[[], object]]], quiet: TinyRun) -> None:
    """Each change, in a call of ``hook``, is put back and told of its plugin, of which one in three
    raises. Some are made in one run, except in a step, where not all is looked at after each
    call."""
    size = 1 if hook in IN_A_STEP else 5
    for at in range(0, len(changes), size):
        together = changes[at : at + size]
        plugins = []
        for number, (_, change) in enumerate(together, start=at):
            raises = number % 3 == 1
            plugins.append(plugin(hook, lambda _, change=change: change(), raises=raises))
            type(plugins[-1]).__name__ = f"Careless{number}"
        run = ran(*plugins)
        assert same(run, quiet) and losses(run) == losses(quiet), together
        for row, (name, _) in zip(run.manifest["plugins"], together, strict=True):
            told = [f["error"] for f in row["failures"] if "left changed" in f["error"]]
            assert len(told) == 1 and name in told[0], (name, row)
            assert row["failures"][0]["hook"] == hook


@pytest.mark.parametrize("hook", HOOKS)
def test_what_a_hook_changes_in_the_process_is_put_back(quiet: TinyRun, hook: str) -> None:
    """All of them in loss terms, where they matter at once; a share of them in each other hook."""
    first, every = (0, 1) if hook == "apt_loss_terms" else (HOOKS.index(hook) % 6, 6)
    changes = list(CHANGES.items())[first::every]
    if hook == "apt_logits_processors":  # a generation has no gradients
        changes = [change for change in changes if change[0] != "grad mode"]
    left_by(hook, changes, quiet)


def test_every_state_is_tried() -> None:
    """Those that are left out are switches of the same shape, most of them of GPUs."""
    left_out = {state.name for state in STATES} - set(CHANGES)
    assert all(name.endswith(("kernel", "reduction")) or "_" in name for name in left_out), left_out


OTHER_WAYS: tuple[tuple[str, Callable[[], object]], ...] = (
    ("autocast", lambda: torch.set_autocast_dtype("cpu", torch.float16)),
    ("autocast", lambda: entered(torch.autocast("xpu"))),
    ("torch function modes", lambda: entered(torch.device("meta"))),
    ("default device", lambda: entered(_device.DeviceContext("meta"))),
    ("fp32", lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16")),
    ("fp32", lambda: setattr(torch.backends, "fp32_precision", "tf32")),
    ("fp32", lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True)),
)


@pytest.mark.parametrize("hook", ["on_training_start", "on_step_end"])
def test_the_same_state_may_be_changed_in_other_ways(hook: str, quiet: TinyRun) -> None:
    left_by(hook, OTHER_WAYS, quiet)


def part(trainer: Any) -> None:
    trainer.model.blocks[0].eval()


def whole(trainer: Any) -> None:
    trainer.model.eval()


@pytest.mark.parametrize(
    ("hook", "change", "kept"),
    [
        ("on_step_end", whole, False),
        ("on_step_end", part, False),
        ("on_backward_end", part, False),
        ("apt_loss_terms", whole, False),
        ("apt_loss_terms", part, False),
        ("on_checkpoint_saved", whole, False),
        ("on_training_start", whole, False),
        ("on_step_start", whole, False),
        ("on_training_start", part, True),
        ("on_step_start", part, True),
    ],
)
def test_modes_are_set_where_steps_are_prepared_and_never_of_the_whole_model(
    quiet: TinyRun, hook: str, change: Callable[[Any], object], kept: bool
) -> None:
    run = ran(
        plugin(hook, change, raises=False),
        overrides={**OVERRIDES, "training.grad_accum_steps": 1, "training.save_every_steps": 2},
    )
    (row,) = run.manifest["plugins"]
    told = [f["error"] for f in row["failures"]]
    if kept:
        assert not told and not same(run, quiet)
    else:
        assert len(told) == 1 and "training mode" in told[0]
        assert row["failures"][0]["hook"] == hook
        assert same(run, quiet)


def test_training_mode_in_an_evaluation_is_put_back(quiet: TinyRun) -> None:
    run = ran(
        plugin("on_evaluation_start", lambda trainer: trainer.model.train(), raises=False),
    )
    assert losses(run) == losses(quiet) and same(run, quiet)
    assert "eval mode" in run.manifest["plugins"][0]["failures"][0]["error"]


def test_a_mode_that_is_meant_stays_beside_one_that_is_left(quiet: TinyRun) -> None:
    keeps = plugin("on_training_start", part, raises=False)
    meant = ran(keeps)
    keeps = plugin("on_training_start", part, raises=False)
    leaves = plugin("on_step_end", whole, raises=False)
    type(leaves).__name__ = "Leaving"
    both = ran(keeps, leaves)
    assert same(both, meant) and not same(both, quiet)


def test_what_plugins_leave_is_told_once_and_ends_a_strict_run(quiet: TinyRun) -> None:
    class Always:
        @hookimpl
        def on_step_end(self) -> None:
            torch.set_num_threads(3)

    run = ran(Always())
    assert same(run, quiet)
    (row,) = run.manifest["plugins"]
    assert row["state"] == "active" and len(row["failures"]) == 1
    with pytest.raises(PluginError, match=r"always left changed in on_step_end.*threads.*--strict"):
        ran(Always(), strict=True)


def test_what_a_module_sets_as_it_is_imported_is_put_back(quiet: TinyRun, tmp_path: Any) -> None:
    path = tmp_path / "careless.py"
    path.write_text(
        "import torch\nfrom apt_core import hookimpl\n"
        "torch.set_default_dtype(torch.float64)\n"
        "@hookimpl\ndef on_step_end(): pass\n"
    )
    run = ran(path)
    assert same(run, quiet)
    (failure,) = run.manifest["plugins"][0]["failures"]
    assert failure["hook"] == "its import" and "default dtype" in failure["error"]


def test_callbacks_and_wrappers_leave_nothing_either(quiet: TinyRun) -> None:
    class Hooked:
        @hookimpl
        def on_training_start(self, trainer: Any) -> None:
            trainer.model.blocks[0].register_forward_hook(self.look)

        def look(self, *_: Any) -> None:
            torch.set_grad_enabled(False)

    class Wrapping:
        @hookimpl(wrapper=True)
        def on_step_end(self) -> Any:
            torch.set_default_dtype(torch.float64)
            result = yield
            torch.set_float32_matmul_precision("medium")
            return result

    for careless, told in ((Hooked(), ["grad mode"]), (Wrapping(), ["default dtype", "fp32"])):
        run = ran(careless)
        assert same(run, quiet)
        failures = run.manifest["plugins"][0]["failures"]
        assert len(failures) == len(told)
        for failure, what in zip(failures, told, strict=True):
            assert what in failure["error"]


def test_a_plugin_among_others_is_the_one_that_is_named(quiet: TinyRun) -> None:
    class Innocent:
        @hookimpl
        def on_step_end(self) -> None: ...

    class Guilty:
        @hookimpl
        def on_step_end(self) -> None:
            with contextlib.ExitStack() as stack:
                stack.enter_context(torch.no_grad())
                stack.pop_all()
            torch.set_grad_enabled(False)

    run = ran(Innocent(), Guilty())
    assert same(run, quiet)
    rows = {row["name"]: row["failures"] for row in run.manifest["plugins"]}
    assert rows["innocent"] == [] and len(rows["guilty"]) == 1


def test_torch_may_come_with_the_plugin_that_sets_its_state(tmp_path: Path) -> None:
    """Where nothing has imported it before, it is put back to what torch comes with."""
    (tmp_path / "first.py").write_text(
        "import sys\nfrom apt_core import hookimpl\n"
        "@hookimpl\ndef apt_configure(config):\n"
        "    assert 'torch' not in sys.modules\n    import os, torch\n    os.chdir('/')\n"
        "    torch.set_num_threads(7)\n    torch.set_default_dtype(torch.float16)\n"
    )
    script = (
        "import os, sys\nfrom apt_core.kernel import boot\n"
        "finders = list(sys.meta_path)\n"
        "kernel = boot({}, plugins=['first.py'], files=False)\n"
        "import torch\n"
        "print(torch.get_num_threads(), torch.get_default_dtype(), os.getcwd())\n"
        "print(sys.meta_path == finders)\n"
        "print(*[left.error for left in kernel.manager.records['first'].leftovers])\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    state, finders, error = done.stdout.splitlines()
    assert not state.startswith("7") and state.endswith(f" torch.float32 {tmp_path}")
    assert finders == "True"
    for name in ("working directory", "default dtype", "number of threads", "to 7"):
        assert name in error


def test_a_plugin_that_is_registered_just_before_the_run_is_watched(tmp_path: Any) -> None:
    trainer = Trainer(
        {**TINY_PROFILE, "data": {"loader": "pydoc"}}, output=tmp_path / "run", stop_at_step=1
    )
    trainer.manager.register(plugin("on_step_end", whole, raises=False), "late")
    trainer.fit()
    (left,) = trainer.manager.records["late"].leftovers
    assert "training mode" in left.error
    assert trainer.model.training


def test_steady_steps_are_looked_at_as_a_whole_until_something_is_found(
    quiet: TinyRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch_state, "CLOSE_STEPS", 1)

    class Before:
        @hookimpl
        def apt_loss_terms(self) -> None: ...

    class Guilty:
        @hookimpl
        def apt_loss_terms(self, trainer: Any) -> None:
            if trainer.step in self.at:
                torch.set_grad_enabled(False)

        def __init__(self, *at: int) -> None:
            self.at = at

    class Late:
        @hookimpl
        def apt_loss_terms(self, trainer: Any) -> None:
            if trainer.step == 2:
                raise ValueError("no")

    def told(*plugins: Any, **options: Any) -> tuple[list[str], dict[str, list[str]]]:
        caplog.clear()
        run = ran(*plugins, **options)
        assert same(run, quiet)
        warnings = [r.getMessage() for r in caplog.records if "left changed" in r.getMessage()]
        rows = run.manifest["plugins"]
        return warnings, {r["name"]: [f["error"] for f in r["failures"]] for r in rows}

    (first, second), failures = told(Before(), Guilty(2, 3))
    assert first.startswith("one of the plugins before, guilty left changed: grad mode")
    assert second.startswith("plugin guilty left changed in apt_loss_terms at step 4")
    assert failures["before"] == [] and len(failures["guilty"]) == 1
    (alone,), _ = told(Guilty(2))
    assert alone.startswith("plugin guilty left changed in apt_loss_terms at step 3")
    with pytest.raises(PluginError, match=r"one of the plugins before, guilty .*--strict"):
        told(Before(), Guilty(2), strict=True)

    (either,), failures = told(Guilty(2), Late())
    assert either.startswith("one of the plugins guilty, late left changed: grad mode")
    assert failures["guilty"] == [] and failures["late"] == ["ValueError: no"]


def test_each_change_that_has_several_suspects_is_told(
    quiet: TinyRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch_state, "CLOSE_STEPS", 0)

    class Innocent:
        @hookimpl
        def on_step_end(self) -> None: ...

    class Guilty:
        @hookimpl
        def on_step_end(self, step: int) -> None:
            if step == 2:
                torch.set_grad_enabled(False)
            if step == 3:
                torch.set_default_dtype(torch.float64)

    assert same(ran(Innocent(), Guilty()), quiet)
    told = [r.getMessage() for r in caplog.records if "one of the plugins" in r.getMessage()]
    grad_mode, dtype = told
    assert "grad mode" in grad_mode and "default dtype" in dtype


def test_a_change_in_a_steady_step_never_reaches_the_weights(
    quiet: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A share of the changes, each in one of the hooks of a step, and the likely ones in the last:
    what is left there meets the evaluation and the next batch."""
    monkeypatch.setattr(torch_state, "CLOSE_STEPS", 2)
    hooks = ("apt_loss_terms", "on_step_start", "on_step_end")
    cases = [(hooks[number % 3], name) for number, name in enumerate([*CHANGES][::3])]
    cases += [("on_step_end", name) for name in ("grad mode", "default dtype", "inference mode")]
    for hook, name in cases:
        change = CHANGES[name]
        run = ran(plugin(hook, lambda _, change=change: change(), raises=False, at=3))
        assert same(run, quiet), (hook, name)
        (row,) = run.manifest["plugins"]
        assert [name in f["error"] for f in row["failures"]] == [True], (hook, row)
