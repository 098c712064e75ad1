"""Runs cases of the fault matrix in forked children of this process, and judges what they left.

Before the first case everything is imported and one run is made, so that a child costs what a run
costs and nothing else. Children write to files; what came of them is looked at here.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import select
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, TextIO

import fault_kinds
import torch
import yaml
from fault_matrix import (
    ENDS_STAGE,
    GOES_ON,
    HOOKS,
    STOPS,
    TRAIN,
    Case,
    Outcome,
    Scene,
    cases_of,
    expected_of,
    loading,
    positions,
    scene_of,
    severity_of,
)

from apt_core import hookspecs
from apt_core.cli.run_command import run_command
from apt_core.cli.train import app
from apt_core.errors import CheckpointError
from apt_core.plugin_records import FAILURES_IN_ALL
from apt_core.runs import checkpoint
from apt_core.training.run import Run

STEPS = 8
SAVES_AT = 6
RESUMES_AT = 2

PROFILE: dict[str, Any] = {
    "name": "faults",
    "model": {"d_model": 16, "num_heads": 2, "num_layers": 1, "d_ff": 32, "vocab_size": 256,
              "max_seq_len": 16, "dropout": 0.1},
    "training": {"batch_size": 2, "grad_accum_steps": 2, "max_epochs": 2, "max_steps": STEPS,
                 "learning_rate": 1e-3, "warmup_steps": 0, "log_every_steps": 2,
                 "save_every_steps": 3, "keep_last": 0, "mixed_precision": False,
                 "background_timeout": 0.2},
    "evaluation": {"eval_freq": 3, "eval_batches": 2, "sample_tokens": 3},
    "hardware": {"device": "cpu"},
}  # fmt: skip
"""A run of two epochs of four steps, each of two micro-batches."""

TEXT = "".join(f"{n} apples and {n + 1} pears are {2 * n + 1} pieces of fruit.\n" for n in range(8))

SECONDS = 60.0
"""After which a child hangs."""

CLOCKED = ("tokens_per_s", "mfu", "memory_mb", "time/", "seconds", "training_seconds", "spent")
"""Beginnings of the names of figures that are of the machine."""

# What plugins are written like -----------------------------------------------------------------

HEAD = "import fault_kinds\nfrom apt_core import hookimpl\n\n\n"

IN_BACKGROUND = "@hookimpl(background=True)"

FORM_SOURCES = {
    "plain": "@hookimpl\ndef {hook}({names}):\n    return fault_kinds.act('{hook}', {given})\n",
    "method": """class Faulty:
    @hookimpl
    def {hook}(self{comma}{names}):
        return fault_kinds.act('{hook}', {given})


{hook} = Faulty().{hook}
""",
    "wrapper-before": """@hookimpl(wrapper=True)
def {hook}({names}):
    fault_kinds.act('{hook}', {given})
    return (yield)
""",
    "wrapper-after": """@hookimpl(wrapper=True)
def {hook}({names}):
    result = yield
    fault_kinds.act('{hook}', {given})
    return result
""",
    "wrapper-none": """@hookimpl(wrapper=True)
def {hook}({names}):
    if fault_kinds.due('{hook}', {given}):
        return
    yield
""",
    "wrapper-twice": """@hookimpl(wrapper=True)
def {hook}({names}):
    yield
    if fault_kinds.due('{hook}', {given}):
        yield
""",
}
FORM_SOURCES["background"] = FORM_SOURCES["plain"].replace("@hookimpl", IN_BACKGROUND)
FORM_SOURCES["alone"] = FORM_SOURCES["plain"]
FORM_SOURCES["first"] = FORM_SOURCES["plain"].replace("@hookimpl", "@hookimpl(priority=0)")
FORM_SOURCES["last"] = FORM_SOURCES["plain"].replace("@hookimpl", "@hookimpl(priority=100)")

KEEPS = "\n\n@hookimpl\ndef apt_state_dict():\n    return {'n': 1}\n"
"""A plugin is given state back that has kept some."""

OBSERVES = "@hookimpl\ndef {hook}({names}):\n    fault_kinds.observe('{hook}', {given})\n"

STUMBLES = """
@hookimpl
def on_step_end(step):
    if step in {steps}:
        raise RuntimeError("the real reason")
"""


def parameters_of(hook: str) -> list[str]:
    code = getattr(hookspecs, hook).__code__
    return list(code.co_varnames[: code.co_argcount])


def source_of(template: str, hook: str) -> str:
    names = parameters_of(hook)
    if IN_BACKGROUND in template:
        names = list(HOOKS[hook].background)
    given = "{" + ", ".join(f"'{name}': {name}" for name in names) + "}"
    return template.format(
        hook=hook, names=", ".join(names), comma=", " if names else "", given=given
    )


# Children --------------------------------------------------------------------------------------


@dataclass
class Left:
    """What a child left: its folder, its exit code (negative for a signal, None where it hung), and
    what it saw."""

    folder: Path
    code: int | None
    seen: dict[str, Any] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def text(self, name: str) -> str:
        path = self.folder / name
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    @property
    def said(self) -> str:
        return self.text("stdout") + self.text("stderr")

    @property
    def manifest(self) -> dict[str, Any]:
        path = self.run / "manifest.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def rows(self) -> list[dict[str, Any]]:
        path = self.run / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [without_clocks(json.loads(line)) for line in lines]

    def checkpoints(self) -> dict[int, Path]:
        found = checkpoint.list_checkpoints(self.run / "checkpoints")
        return {int(path.name.removeprefix("step-")): path for path in found}


def without_clocks(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_clocks(v) for k, v in value.items() if not k.startswith(CLOCKED)}
    return value


def start(folder: Path, plan: fault_kinds.Plan, arguments: Sequence[str]) -> int:
    """Fork a child that runs apt-train with these arguments in ``folder``; its pid."""
    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        # With one thread, torch has none that a fork could lose.
        warnings.simplefilter("ignore", DeprecationWarning)
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
    if child:
        return child
    code = 70
    try:
        code = _train(folder.resolve(), plan, arguments)
    except BaseException:
        with open(folder / "stderr", "a", encoding="utf-8") as file:
            file.write("escaped from the command:\n" + traceback.format_exc())
    finally:
        os._exit(code)


def enter(folder: Path) -> None:
    """Let this process, which is a child, write what it prints into ``folder``, and work there."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = map(_stream, (1, 2))
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
    os.environ["FAULTS_TEMPORARY"] = str(folder)
    os.chdir(folder)


def _train(folder: Path, plan: fault_kinds.Plan, arguments: Sequence[str]) -> int:
    enter(folder)
    traces = open(folder / "hangs", "w")  # noqa: SIM115
    faulthandler.dump_traceback_later(SECONDS - 10, file=traces)
    report = os.open(folder / "seen.json", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    fault_kinds.plan(plan)
    Run.run = _noting_the_start(Run.run)  # type: ignore[method-assign]
    code = run_command(app, "apt-train", list(arguments))
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    seen = fault_kinds.seen
    what = {
        "calls": seen.calls,
        "committed": seen.committed,
        "innocent": seen.innocent,
        "shown": seen.shown,
    }
    os.write(report, json.dumps(what).encode())
    return code


def _noting_the_start(start: Callable[[Run], Any]) -> Callable[[Run], Any]:
    """``start``, before which it is noted that there is a trainer, which has its folder."""

    def noting(run: Run) -> Any:
        fault_kinds.seen.trainer = run.loop.trainer
        return start(run)

    return noting


def _stream(descriptor: int) -> TextIO:
    return open(descriptor, "w", encoding="utf-8", closefd=False, buffering=1)


def finished(child: int, folder: Path, seconds: float = SECONDS) -> Left:
    """Wait for a child, kill it where it hangs, and see what it left."""
    descriptor = os.pidfd_open(child)
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        hangs = not poll.poll(seconds * 1000)
    finally:
        os.close(descriptor)
    if hangs:
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seen = (folder / "seen.json").read_text() if (folder / "seen.json").exists() else ""
    return Left(folder, None if hangs else code, json.loads(seen) if seen else {})


# The laboratory --------------------------------------------------------------------------------


@dataclass
class Verdict:
    """``outcome`` is what came of a case, ``wrong`` all that is not as it should be."""

    case: Case
    outcome: str
    wrong: list[str]
    seconds: float


class Laboratory:
    """Where cases are run: a folder with a text, profiles and plugins, and the runs without a fault
    that the others are compared with."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        (root / "text.txt").write_text(TEXT, encoding="utf-8")
        os.environ["APT_CACHE"] = str(root / "cache")
        self._innocent = self._plugin(
            "innocent.py", HEAD + "\n\n".join(source_of(OBSERVES, hook) for hook in HOOKS)
        )
        self._references: dict[tuple[str, int], Left] = {}
        self._reconnaissance: dict[str, Left] = {}
        self._states: dict[Path, Any] = {}
        self._count = self.share = 0
        torch.set_num_threads(1)
        # Whatever is made once a process is made here.
        warm = self._arguments(TRAIN, "quiet", [], root / "warm")
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
            code = run_command(app, "apt-train", warm)
        if code:
            raise RuntimeError(f"the run without a fault ends with exit code {code}")
        shutil.rmtree(root / "warm")

    def _plugin(self, name: str, source: str) -> Path:
        path = self.root / "plugins" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
        return path

    def faulty(self, hook: str, form: str) -> Path:
        """The plugin of a case. Its functions do nothing but what is planned."""
        path = self.root / "plugins" / f"{hook}-{form}" / "faulty.py"
        if not path.exists():
            extra = KEEPS if hook == "apt_load_state_dict" else ""
            source = HEAD + source_of(FORM_SOURCES[form], hook) + extra
            self._plugin(f"{hook}-{form}/faulty.py", source)
        return path

    def _arguments(
        self, scene: Scene, name: str, plugins: list[dict[str, Any]], output: Path, *more: str
    ) -> list[str]:
        profile = self.root / "profiles" / f"{name}.yaml"
        profile.parent.mkdir(exist_ok=True)
        if not profile.exists():
            if scene.stumbles:
                source = HEAD + STUMBLES.format(steps=scene.stumbles)
                path = self._plugin(f"{scene.name}/stumbles.py", source)
                plugins = [*plugins, {"name": str(path), "on_failure": scene.stumbles_as}]
            content = {**PROFILE, "data": {"train_path": str(self.root / "text.txt")}}
            profile.write_text(yaml.safe_dump(content | ({"plugins": plugins} if plugins else {})))
        return ["-p", str(profile), "--output", str(output), *scene.options, *more]

    def _fresh(self) -> Path:
        self._count += 1
        return self.root / "runs" / f"{self.share}-{self._count:06d}"

    def _run(
        self,
        scene: Scene,
        name: str,
        plugins: list[dict[str, Any]],
        plan: fault_kinds.Plan,
        *more: str,
        folder: Path | None = None,
    ) -> Left:
        folder = folder or self._fresh()
        if scene.resumes and not (folder / "run").exists():
            shutil.copytree(self._first_part(), folder / "run")
            more = (*more, "--resume")
        arguments = self._arguments(scene, name, plugins, Path("run"), *more)
        return finished(start(folder, plan, arguments), folder)

    def _first_part(self) -> Path:
        """A run that was stopped, in whose checkpoint the faulty plugin has state."""
        folder = self.root / "first-part"
        if not folder.exists():
            plugins = [{"name": str(self.faulty("apt_load_state_dict", "plain"))}]
            stop = ("--stop-at-step", str(RESUMES_AT))
            arguments = self._arguments(TRAIN, "first-part", plugins, folder / "run", *stop)
            left = finished(start(folder, fault_kinds.Plan(), arguments), folder)
            if left.code:
                raise RuntimeError(f"the first part of a run failed: {left.said}")
        return folder / "run"

    def reference(self, scene: Scene) -> Left:
        """The run without the faulty plugin, with a checkpoint of every step."""
        key = scene.name, 0
        if key not in self._references:
            name = f"quiet-{scene.name}"
            every = () if scene.name == "plan" else ("--training.save_every_steps", "1")
            left = self._run(scene, name, [], fault_kinds.Plan(), *every)
            if left.code != (1 if scene.stumbles_as == "required" else 0):
                raise RuntimeError(f"the {scene.name} run without a fault failed: {left.said}")
            self._references[key] = left
        return self._references[key]

    def usual(self, scene: Scene) -> Left:
        """The run without the faulty plugin, with checkpoints as in a case."""
        key = scene.name, 1
        if key not in self._references:
            left = self._run(scene, f"quiet-{scene.name}", [], fault_kinds.Plan())
            self._references[key] = left
        return self._references[key]

    def reconnoitre(self, hook: str) -> Left:
        """The run of a hook's cases without a fault: how often the hook is called, and when. The
        faulty plugin of it has every hook of the scene."""
        scene = scene_of(hook)
        if scene.name not in self._reconnaissance:
            hooks = [each for each in HOOKS if scene_of(each) == scene]
            sources = [source_of(FORM_SOURCES["plain"], each) for each in hooks]
            extra = KEEPS if "apt_load_state_dict" in hooks else ""
            path = self._plugin(f"{scene.name}/faulty.py", HEAD + "\n\n".join(sources) + extra)
            plugins = [{"name": str(path)}, {"name": str(self._innocent)}]
            left = self._run(scene, f"{scene.name}-recon", plugins, fault_kinds.Plan())
            self._reconnaissance[scene.name] = left
        return self._reconnaissance[scene.name]

    def _calls(self, hook: str) -> list[tuple[int | None, int | None]]:
        """The calls of a hook in a run without a fault."""
        calls = self.reconnoitre(hook).seen.get("calls", {}).get(hook, [])
        return [(taken, at) for taken, at in calls]

    def cases_of(self, hook: str) -> list[Case]:
        return cases_of(hook, self._places(hook))

    def _places(self, hook: str) -> dict[str, int]:
        places = positions(self._calls(hook), SAVES_AT)
        if not places:
            raise LookupError(
                f"{hook} is called in none of the scenes: add one to fault_matrix.SCENES in which "
                "it is"
            )
        return places

    # A case ------------------------------------------------------------------------------------

    def run(self, case: Case, *, keep: bool = False) -> Verdict:
        """Run a case and say what came of it."""
        began = time.perf_counter()
        scene = scene_of(case.hook)
        places = self._places(case.hook)
        always = case.position == "always"
        number = 1 if always else places[case.position]
        plan = fault_kinds.Plan(case.kind, number, always)
        on_failure = case.policy if case.policy == "required" else "isolate"
        plugins = [{"name": str(self.faulty(case.hook, case.form)), "on_failure": on_failure}]
        if case.form != "alone":
            plugins.append({"name": str(self._innocent)})
        name = f"{case.hook}-{case.form}-{on_failure}"
        more = ["--strict"] * (case.policy == "strict")
        left = self._run(scene, name, plugins, plan, *more)
        # A checkpoint is told of when it is written, which is no matter of steps alone.
        calls = left.seen.get("calls", {}).get(case.hook) or self._calls(case.hook)
        taken = calls[number - 1][0] if len(calls) >= number else None
        expected = expected_of(case, number, taken)
        found = described(left)
        wrong = [*self._judged(case, left, expected, taken, number)]
        outcome = f"not as expected: {found}" if wrong else expected.name
        if keep:
            wrong.append(f"(kept: {left.folder})")
        else:
            shutil.rmtree(left.folder, ignore_errors=True)
        return Verdict(case, outcome, wrong, time.perf_counter() - began)

    def _judged(
        self, case: Case, left: Left, expected: Outcome, taken: int | None, number: int
    ) -> Iterator[str]:
        """All that is wrong with what a case has left."""
        scene = scene_of(case.hook)
        if left.code is None:
            yield f"hangs:\n{left.text('hangs')}"
            return
        if left.code != expected.code:
            yield f"exit code {left.code}, expected {expected.code} ({expected.name})"
        for text in ("Traceback", "Logging error", "unexpected failure", "escaped from"):
            # Python tells of a thread that fails.
            if text in left.said and case.kind != "state-failing-thread":
                yield f"it says {text!r}"
        if not left.seen.get("committed"):
            yield "the fault was not committed"
            return
        status = left.manifest.get("status", "")
        began = taken is not None or scene.resumes
        if taken == STEPS and expected is STOPS and status == "finished":
            status = STOPS.status  # nothing was left to stop
        if began and status != expected.status and not (scene.resumes and taken is None):
            yield f"the manifest says {status!r}, not {expected.status!r}"
        if not began and scene.name != "plan" and expected is not GOES_ON and status:
            yield f"there is a run that never began: {status!r}"
        severity = severity_of(case)
        if severity == "failure":
            yield from self._naming(case, left, expected, number)
        elif severity == "left":
            ends = expected.code != 0 and scene.stumbles_as != "required"
            told = left.text("stderr") if ends else left.said + left.text("run/log.txt")
            # Some of what is left in a step is looked for once a step.
            one = f"plugin faulty left changed in {case.hook}" in told and "faulty.py:" in told
            if not one and not re.search("one of the plugins [^;]*faulty[^;]* left changed", told):
                yield "what the plugin has left changed is not told"
        elif severity == "judgement" and "plugin faulty" not in left.text("stderr"):
            yield "who judged the input is not said"
        if scene.name == "plan":
            if expected.code == 0 and _plan(left) != _plan(self.reference(scene)):
                yield "the plan is another"
        elif left.code != expected.code:
            return  # the rest follows from it
        elif expected in (GOES_ON, ENDS_STAGE):
            yield from self._differences(case, left, number, expected)
        elif taken is not None:
            yield from self._ending(case, left, taken)

    def _differences(self, case: Case, left: Left, number: int, expected: Outcome) -> Iterator[str]:
        """Between a run that went on and the quiet one."""
        usual, every = self.usual(scene_of(case.hook)), self.reference(scene_of(case.hook))
        own, others = left.checkpoints(), usual.checkpoints()
        if own.keys() != others.keys():
            yield f"checkpoints of steps {sorted(own)}, not {sorted(others)}"
        yield from self._unequal(own, every)
        if left.rows() != usual.rows():
            yield f"other rows of metrics: {_first_difference(left.rows(), usual.rows())}"
        if expected is ENDS_STAGE:
            return
        if lost := _logged(usual) - _logged(left):
            yield f"log.txt lacks {len(lost)} lines: {min(lost)}"
        if "finished: " not in left.text("stdout"):
            yield "no summary is shown"
        sample = left.manifest.get("sample"), usual.manifest.get("sample")
        if sample[0] != sample[1]:
            yield f"another sample: {sample[0]!r}, not {sample[1]!r}"
        if case.form != "alone":
            yield from self._beside(case, left, number)

    def _unequal(self, own: dict[int, Path], every: Left) -> Iterator[str]:
        others = every.checkpoints()
        for step, path in own.items():
            if step not in others:
                continue
            for name in ("model.safetensors", "optimizer.safetensors"):
                if (path / name).read_bytes() != (others[step] / name).read_bytes():
                    yield f"{name} of step {step} is not that of the quiet run"
            try:
                state = checkpoint.load(path).state
            except CheckpointError as error:
                yield f"the checkpoint of step {step} is not intact: {error}"
                continue
            known = self._state_of(others[step])
            for key in ("step", "epoch", "tokens", "modes", "precision"):
                is_, was = getattr(state, key), getattr(known, key)
                if is_ != was:
                    yield f"{key} of step {step} is {is_}, not {was}"

    def _state_of(self, path: Path) -> Any:
        """The state in a checkpoint of a run without a fault, which is read once."""
        if path not in self._states:
            self._states[path] = checkpoint.load(path).state
        return self._states[path]

    def _beside(self, case: Case, left: Left, number: int) -> Iterator[str]:
        """Was the innocent plugin called as often, and shown the same?"""
        quiet = self.reconnoitre(case.hook).seen
        own, others = dict(left.seen["innocent"]), dict(quiet["innocent"])
        failures = len(_row(left).get("failures", []))
        lost = _row(left).get("state") != "active"
        before = self._calls(case.hook)[number - 1][0] is None
        before = before or case.hook == "apt_transform_model"
        if lost and before:
            others["on_plugin_enabled"] -= 1
        if failures and not loading(case, number):
            others["on_plugin_failure"] = others.get("on_plugin_failure", 0) + failures
        if case.hook == "on_plugin_failure":  # never told again
            others["on_plugin_failure"] -= failures
        if HOOKS[case.hook].firstresult and case.kind.startswith("later"):
            others[case.hook] -= 1  # there is a result before it is asked
        for hook in own.keys() | others.keys():
            if own.get(hook, 0) != others.get(hook, 0):
                yield (
                    f"the innocent plugin was called {own.get(hook, 0)} times in {hook}, not "
                    f"{others.get(hook, 0)}"
                )
        for what, shown in quiet["shown"].items():
            if left.seen["shown"].get(what) != shown:
                yield f"the innocent plugin was shown other {what}"

    def _ending(self, case: Case, left: Left, taken: int) -> Iterator[str]:
        """Is the last whole step saved, and can the run go on from there?"""
        scene = scene_of(case.hook)
        own, every = left.checkpoints(), self.reference(scene)
        last = max(own, default=-1)
        # What is left in a step may be seen when that step is whole.
        whole = (taken, taken + 1) if severity_of(case) == "left" else (taken,)
        if taken and last not in whole:
            yield f"the last checkpoint is of step {last}, not {taken}"
            return
        yield from self._unequal(own, every)
        if not own or scene.stumbles:
            return
        again = self._run(
            scene, f"quiet-{scene.name}", [], fault_kinds.Plan(), "--resume", folder=left.folder
        )
        if again.code:
            yield f"the run cannot go on: {again.text('stderr')[-300:]}"
            return
        last, others = again.checkpoints(), every.checkpoints()
        for name in ("model.safetensors", "optimizer.safetensors"):
            if (last[STEPS] / name).read_bytes() != (others[STEPS] / name).read_bytes():
                yield f"the run that went on has another {name}"

    def _naming(self, case: Case, left: Left, expected: Outcome, number: int) -> Iterator[str]:
        """Is the failure told, with the plugin, the hook and the place, and counted?"""
        said = left.said + left.text("run/log.txt")
        ends = expected.code != 0 and scene_of(case.hook).stumbles_as != "required"
        where = left.text("stderr") if ends else said
        asked = loading(case, number)
        named = f"{case.hook} failed" if asked else f"plugin faulty failed in {case.hook}"
        flat = where.replace("\n", " ")
        if named not in flat or "faulty" not in flat:
            yield f"{named!r} is not said"
        lines = source_of(FORM_SOURCES[case.form], case.hook).count("\n") + HEAD.count("\n")
        if not any(f"faulty.py:{line}" in flat for line in range(1, lines + 1)):
            yield "the line of the plugin is not named"
        if ends and self._calls(case.hook)[number - 1][0] is None:
            return  # before there is a manifest of this run
        if scene_of(case.hook).name == "plan":
            return
        row = _row(left)
        failures = [failure["hook"] for failure in row.get("failures", [])]
        limit = min(HOOKS[case.hook].failure_limit, FAILURES_IN_ALL)
        due = len(self._calls(case.hook)) - number + 1
        count = min(limit, due) if case.position == "always" and not ends else 1
        if failures != [case.hook] * count:
            yield f"failures of {failures} are counted, not {count} of {case.hook}"
        state = "broken" if asked else "quarantined" if count >= limit else "active"
        if row.get("state") != state:
            yield f"the plugin is {row.get('state')}, not {state}"
        if left.seen["committed"] != count:
            yield f"the fault was committed {left.seen['committed']} times, not {count}"


def described(left: Left) -> str:
    if left.code is None:
        return "hangs"
    status = left.manifest.get("status", "")
    return f"exit {left.code}{f', {status}' if status else ''}"


def _plan(left: Left) -> dict[str, Any]:
    """What of a plan is the same in every process."""
    try:
        plan = json.loads(left.text("stdout"))
    except ValueError:
        return {}
    same = {key: plan[key] for key in ("profile", "device", "providers", "model", "batch")}
    return {**same, "memory": [stage["memory"] for stage in plan["stages"]]}


def _logged(left: Left) -> set[str]:
    """The lines of log.txt that are the same in every run, without times and other numbers."""
    lines = (
        line.partition(" ")[2].partition(" ")[2] for line in left.text("run/log.txt").split("\n")
    )
    own = ("model built", "run folder", "plugin ")  # of which one tells of plugins
    return {
        re.sub(r"[\d.,]+|checkpoint: .*", "#", line)
        for line in lines
        if not any(w in line for w in own)
    }


def _row(left: Left) -> dict[str, Any]:
    rows = left.manifest.get("plugins", [])
    return next((row for row in rows if row["name"] == "faulty"), {})


def _first_difference(own: list[Any], others: list[Any]) -> str:
    for mine, other in zip(own, others, strict=False):
        for key in mine.keys() | other.keys():
            if mine.get(key) != other.get(key):
                return f"{key} after step {mine.get('step')}: {mine.get(key)}, not {other.get(key)}"
    return f"{len(own)} of them, not {len(others)}"


def run_all(
    laboratory: Laboratory,
    cases: Sequence[Case],
    jobs: int,
    tell: Callable[[Verdict], None],
    *,
    keep: bool = False,
) -> list[Verdict]:
    """Run the cases, divided among ``jobs`` forks of this process; ``tell`` is called as they
    end."""
    for hook in dict.fromkeys(case.hook for case in cases):
        laboratory.reconnoitre(hook)
        laboratory.reference(scene_of(hook))
        laboratory.usual(scene_of(hook))
    readers = [_worker(laboratory, cases[share::jobs], share, keep) for share in range(jobs)]
    waiting = {reader.fileno(): reader for _, reader in readers}
    poll = select.poll()
    for number in waiting:
        poll.register(number, select.POLLIN)
    verdicts = []
    while waiting:
        for number, _ in poll.poll():
            line = waiting[number].readline()
            if not line:
                poll.unregister(number)
                waiting.pop(number).close()
                continue
            told = json.loads(line)
            verdicts.append(Verdict(Case(**told.pop("case")), **told))
            tell(verdicts[-1])
    for child, _ in readers:
        os.waitpid(child, 0)
    if len(verdicts) != len(cases):
        raise RuntimeError(f"{len(cases) - len(verdicts)} cases were not run")
    return verdicts


def _worker(
    laboratory: Laboratory, cases: Sequence[Case], share: int, keep: bool
) -> tuple[int, IO[str]]:
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, os.fdopen(reading, encoding="utf-8")
    code = 1
    try:
        os.close(reading)
        laboratory.share = share
        with os.fdopen(writing, "w", encoding="utf-8", buffering=1) as file:
            for case in cases:
                file.write(json.dumps(asdict(laboratory.run(case, keep=keep))) + "\n")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
