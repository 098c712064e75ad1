"""The fault matrix: which cases there are, and what is to come of each, as data.

Cases are made from the specifications of the hooks, so a new hook has its cases with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fault_kinds import groups_of

from apt_core.hookspecs import POLICIES as HOOKS
from apt_core.markers import Stage, ignored

# Where a hook is called ------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """A command in which a hook is called: ``options`` of apt-train; a plugin that ``stumbles`` (in
    on_step_end of some steps) under ``stumbles_as``; with ``resumes`` the second part of a run;
    ``strict`` says whether --strict leaves anything of it."""

    name: str
    options: tuple[str, ...] = ()
    stumbles: tuple[int, ...] = ()
    stumbles_as: str = "isolate"
    resumes: bool = False
    strict: bool = True


TRAIN = Scene("train")

SCENES: dict[str, Scene] = {
    "on_provider_fallback": Scene("fallback", ("--model.attention_name", "flash_v2"), strict=False),
    "on_plugin_failure": Scene("stumbling", stumbles=(1, 5), strict=False),
    "on_exception": Scene("dying", stumbles=(5,), stumbles_as="required"),
    "apt_load_state_dict": Scene("resume", resumes=True),
    "on_resume": Scene("resume", resumes=True),
    "apt_costs": Scene("plan", ("--dry-run", "--json")),
}
"""Of hooks that are not called in every run."""


def scene_of(hook: str) -> Scene:
    return SCENES.get(hook, TRAIN)


# Outcomes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """``code`` is that of the command, ``status`` that of the manifest ("" where there is none)."""

    name: str
    code: int
    status: str


GOES_ON = Outcome("goes on", 0, "finished")
FAILS = Outcome("ends, saved", 1, "failed")
ENDS_STAGE = Outcome("ends its stage alone", 0, "finished")
BAD_INPUT = Outcome("bad input", 2, "")
STOPS = Outcome("stops, saved", 0, "stopped")
INTERRUPTED = Outcome("interrupted, saved", 130, "interrupted")

EXPECTED: dict[str, dict[str, Outcome]] = {
    "failure": {"isolate": GOES_ON, "required": FAILS, "strict": FAILS},
    "judgement": {"isolate": BAD_INPUT, "required": BAD_INPUT, "strict": BAD_INPUT},
    "stop": {"isolate": STOPS, "required": STOPS, "strict": STOPS},
    "interrupt": {"isolate": INTERRUPTED, "required": INTERRUPTED, "strict": INTERRUPTED},
    "left": {"isolate": GOES_ON, "required": FAILS, "strict": FAILS},
    "nothing": {"isolate": GOES_ON, "required": GOES_ON, "strict": GOES_ON},
}
"""By what a fault is to the guard, and the policy."""

WATCHED = frozenset(
    f"state-{name}"
    for name in (
        "default-dtype", "default-device", "saved-tensors", "save-on-cpu",
        "anomaly", "function-mode", "dispatch-mode", "threads", "matmul", "deterministic",
        "mkldnn", "sdp", "sdp-flash", "recursion", "chdir", "chdir-gone", "numpy-errors",
    )
)  # fmt: skip
"""Changes of global state that are told, with the plugin and the hook, wherever they are left."""

POLICIES = ("isolate", "required", "strict")


def loading(case: Case, number: int) -> bool:
    """Is the plugin asked what it declares, and broken where it fails?"""
    return HOOKS[case.hook].stage is Stage.LOADING and number == 1


def severity_of(case: Case) -> str:
    """What the fault of a case is to the guard: a key of EXPECTED."""
    group, _, name = case.kind.partition("-")
    if case.form in ("wrapper-none", "wrapper-twice"):
        return "failure"
    if group == "hang":
        return "failure"
    if group == "raise":
        if name.startswith("StopTraining"):
            return "stop"
        if name == "KeyboardInterrupt":
            return "interrupt"
        if name.startswith("ConfigError") and HOOKS[case.hook].judges_input:
            return "judgement"
        return "failure"
    if case.kind in WATCHED:
        return "left"
    looked_at = HOOKS[case.hook].returns is not ignored
    if group == "later" or (group == "return" and looked_at):
        return "failure"
    return "failure" if case.kind == "return-half-a-generator" else "nothing"


def expected_of(case: Case, number: int, taken: int | None) -> Outcome:
    """What is to come of a case whose fault is committed in the ``number``-th call of the hook,
    after ``taken`` steps (None: before the run has its folder)."""
    severity = severity_of(case)
    if severity == "judgement" and taken is not None:
        severity = "failure"  # bad input is told before a run begins
    outcome = EXPECTED[severity][case.policy]
    scene = scene_of(case.hook)
    if scene.stumbles_as == "required":
        return FAILS  # of something else
    if severity == "failure" and loading(case, number) and outcome is FAILS:
        return BAD_INPUT
    if outcome is STOPS and taken is None:
        return BAD_INPUT
    if outcome is STOPS and HOOKS[case.hook].stage is Stage.ENDING:
        return ENDS_STAGE
    if scene.name == "plan":
        return Outcome(outcome.name, outcome.code, "")
    return outcome


# Cases -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A plugin that commits a fault of one ``kind`` in one ``hook``, at one ``position``, written
    in one ``form``, under one ``policy``."""

    hook: str
    kind: str
    policy: str
    position: str
    form: str = "plain"

    def __str__(self) -> str:
        form = "" if self.form == "plain" else f"/{self.form}"
        return f"{self.hook}/{self.kind}/{self.policy}/{self.position}{form}"


FORMS = ("alone", "first", "last", "method", "wrapper-before", "wrapper-after")
"""How else a plugin may implement a hook, and that it may be the only one."""

IN_FORMS = ("raise-ValueError", "raise-SystemExit", "raise-GeneratorExit", "raise-StopIteration",
            "raise-StopTraining", "raise-KeyboardInterrupt")  # fmt: skip
"""What is tried in every form."""

IN_BACKGROUND = ("raise-ValueError", "raise-SystemExit", "hang")
"""What is tried in the background."""

Positions = Mapping[str, int]
"""By name, which call of a hook it is, from 1."""


def positions(calls: Sequence[tuple[int | None, int | None]], saves_at: int) -> dict[str, int]:
    """Where among its ``calls`` a hook is tried: before the start, in the first step and one in the
    middle, at a checkpoint (in step ``saves_at``), and at the end. Each call has one name."""
    found: dict[str, int] = {}

    def take(name: str, numbers: Iterator[int]) -> None:
        number = next(numbers, None)
        if number is not None and number not in found.values():
            found[name] = number

    numbered = list(enumerate(calls, start=1))
    take("start", (n for n, (_, at) in numbered if not at))
    take("first", (n for n, (_, at) in numbered if at == 1))
    take("middle", (n for n, (_, at) in numbered if at in (4, 5)))
    take("checkpoint", (n for n, (_, at) in numbered if at == saves_at))
    take("end", iter([len(calls)] if calls else []))
    return found


def cases_of(hook: str, places: Positions) -> list[Case]:
    """All cases of a hook: every kind, isolated and, where that can matter, under one of the
    policies that end a run, at positions in turn; a plain exception everywhere, in every form."""
    names = list(places)
    found: dict[Case, None] = {}

    def add(kind: str, policy: str, position: str, form: str = "plain") -> None:
        found[Case(hook, kind, policy, position, form)] = None

    turn = 0
    for group, kinds in groups_of(hook).items():
        for number, kind in enumerate(kinds):
            matters = group not in ("mutate", "state") or kind in WATCHED
            # Of several plugins it is not always known which one has left something.
            ends = "strict" if kind in WATCHED else POLICIES[1 + number % 2]
            for policy in ("isolate", ends) if matters else ("isolate",):
                add(kind, policy, names[turn % len(names)])
                turn += 1
    for policy in POLICIES:
        for position in names:
            add("raise-ValueError", policy, position)
    add("raise-ValueError", "isolate", "always")
    forms = [form for form in FORMS if not (HOOKS[hook].alone and form.startswith("wrapper"))]
    for number, form in enumerate(forms):
        for kind in IN_FORMS:
            add(kind, "isolate", names[number % len(names)], form)
        for policy in POLICIES[1:]:
            add("raise-ValueError", policy, names[number % len(names)], form)
    for policy in () if HOOKS[hook].alone else POLICIES:
        add("wrong-none", policy, names[0], "wrapper-none")
        add("wrong-twice", policy, names[0], "wrapper-twice")
    for number, kind in enumerate(IN_BACKGROUND if HOOKS[hook].background else ()):
        add(kind, "isolate", names[number % len(names)], "background")
    scene = scene_of(hook)
    return [case for case in found if scene.strict or case.policy != "strict"]


FOUND = {
    ("on_step_end", "raise-hollow", "isolate"),
    ("apt_transform_model", "raise-hollow", "strict"),
    ("apt_register_config", "raise-StopTraining", "isolate"),
    ("apt_costs", "raise-StopTraining", "isolate"),
    ("apt_configure", "raise-StopTraining-odd", "isolate"),
    ("apt_param_groups", "raise-MemoryError", "strict"),
    ("on_provider_fallback", "raise-ValueError", "required"),
    ("on_provider_fallback", "raise-StopTraining", "isolate"),
    ("apt_register_providers", "state-matmul", "strict"),
    ("apt_configure", "state-environment-rank", "isolate"),
    ("apt_configure", "state-logging-config", "isolate"),
    ("on_step_end", "state-stdout-detached", "isolate"),
    ("on_step_end", "state-stdout-none", "isolate"),
    ("on_step_end", "state-sdp-flash", "isolate"),
    ("on_metrics", "mutate", "isolate"),
    ("on_evaluation_end", "mutate", "isolate"),
}
"""Hook, kind and policy of cases that were not as expected once: the small part has them."""


ONE_OF = 16
"""Of so many kinds of raising, and of global state, the small part has one."""


def few(cases: Sequence[Case]) -> list[Case]:
    """A small part of the matrix, always the same: every hook, policy, form and position at least
    once, what each hook that looks at its results refuses, and a share of the kinds of raising and
    of global state."""
    chosen: dict[Case, None] = {}
    hooks: Counter[str] = Counter()
    missing = {feature for case in cases for feature in _features(case)}
    for group in ("raise-", "state-"):
        kinds = dict.fromkeys(case.kind for case in cases if case.kind.startswith(group))
        missing -= {kind for number, kind in enumerate(kinds) if number % ONE_OF}
    for case in cases:
        if (case.hook, case.kind, case.policy) in FOUND and case.form == "plain":
            chosen[case] = None
            missing -= _features(case)
    # Each time the one that brings most of what is missing; of equals one of a hook seldom tried.
    while missing:
        best = max(cases, key=lambda case: (len(missing & _features(case)), -hooks[case.hook]))
        chosen[best] = None
        hooks[best.hook] += 1
        missing -= _features(best)
    return list(chosen)


def _features(case: Case) -> set[str]:
    group, _, _ = case.kind.partition("-")
    kind = f"{case.hook} {group}" if group in ("return", "later") else case.kind
    if group == "return" and HOOKS[case.hook].returns is ignored:
        kind = group  # what no hook looks at is the same in each
    return {case.hook, kind, f"as {case.form}", f"at {case.position}", f"{group} {case.policy}"}
