"""What happened when: plugins switched on and off, failures, resumes, checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apt_core.files import read_lines
from apt_plugins.report.metrics import MAX_STEP

if TYPE_CHECKING:
    from apt_plugins.report.run_data import Run

LINE = re.compile(r"^\d{4}-\S+ \S+ [A-Z]+ apt\.(?:training|checkpoint): (.*)$")
SWITCHED = re.compile(r"(enabled|disabled) (\S+) \(epoch (\d{1,15}), step (\d{1,15})\)$")
RESUMED = re.compile(r"resumed from (.*) \(step (\d{1,15})\)$")
BUILT = re.compile(r"model built: ([\d,]{1,30}) parameters")

MAX_LINE = 1_000_000
"""Bytes of a line of the log that are read."""

MAX_FAILURES = 30
"""Failures of a plugin that are shown."""


@dataclass(frozen=True)
class Event:
    """Something that happened at a step; ``plugin`` is empty for what concerns the run."""

    step: int
    kind: str
    plugin: str = ""
    text: str = ""
    epoch: int | None = None


@dataclass
class LogFacts:
    """What only the log tells."""

    events: list[Event] = field(default_factory=list)
    resumes: list[Event] = field(default_factory=list)
    parameters: int | None = None


@dataclass(frozen=True)
class Lane:
    """A plugin in the timeline: the spans of steps in which it was enabled, and its events."""

    name: str
    spans: list[tuple[int, int]]
    events: list[Event]


def read_log(path: Path) -> LogFacts:
    """Read ``log.txt``; a missing one tells nothing."""
    facts = LogFacts()
    try:
        for raw in read_lines(path, MAX_LINE):
            found = LINE.match(raw.decode("utf-8", errors="replace"))
            if found is None:
                continue
            message = found[1]
            if switched := SWITCHED.match(message):
                kind, plugin, epoch, step = switched.groups()
                facts.events.append(Event(int(step), kind, plugin, epoch=int(epoch)))
            elif resumed := RESUMED.match(message):
                step_ = int(resumed[2])
                # What came after that step in the killed run is not part of this one.
                facts.events = [event for event in facts.events if event.step <= step_]
                facts.resumes = [event for event in facts.resumes if event.step <= step_]
                facts.resumes.append(Event(step_, "resumed", text=f"from {resumed[1]}"))
            elif built := BUILT.match(message):
                facts.parameters = int(built[1].replace(",", ""))
    except OSError:
        pass  # it has none, or what can be told of it is told
    return facts


def events_of(run: Run) -> list[Event]:
    """All events of a run by step.

    Of a run that goes on or was killed the manifest knows the switches up to its start, the log
    the later ones.
    """
    known = [_event(row) for row in run.rows("timeline") if _step(row) is not None]
    told = {(event.step, event.kind, event.plugin) for event in known}
    known += [e for e in run.log.events if (e.step, e.kind, e.plugin) not in told]
    events = _without_repeats(sorted(known, key=lambda event: event.step))
    if not any(event.kind == "resumed" for event in events):
        events += run.log.resumes
    for row in run.rows("switches"):
        if (step := _step(row)) is not None:
            losses = (_figure(row.get(name)) for name in ("loss_before", "loss_after"))
            text = "loss {} before, {} after".format(*losses)
            events.append(Event(step, "transformed the model", str(row.get("plugin", "")), text))
    for plugin in run.rows("plugins"):
        failures = plugin.get("failures")
        for row in failures[:MAX_FAILURES] if isinstance(failures, list) else ():
            if isinstance(row, dict) and (step := _step(row)) is not None:
                text = f"in {row.get('hook', '')}: {row.get('error', '')}"
                events.append(Event(step, "failed", str(plugin.get("name", "")), text))
    for checkpoint in run.checkpoints:
        digits = checkpoint.name.removeprefix("step-")
        if digits.isdecimal():
            events.append(Event(int(digits), "checkpoint", text=checkpoint.name))
    return sorted(events, key=lambda event: event.step)


def lanes_of(run: Run, events: Iterable[Event]) -> list[Lane]:
    """One lane a plugin, in the order of the manifest, then of the events.

    A plugin that is active and was never switched was enabled all the time; one in quarantine
    until its last failure.
    """
    by_plugin: dict[str, list[Event]] = {}
    states = {str(row.get("name", "")): str(row.get("state", "")) for row in run.rows("plugins")}
    for name in states:
        by_plugin[name] = []
    for event in events:
        if event.plugin:
            by_plugin.setdefault(event.plugin, []).append(event)
    last = run.metrics.last_step
    return [
        Lane(name, _spans(own, states.get(name, ""), last), own) for name, own in by_plugin.items()
    ]


def _spans(events: list[Event], state: str, last: int) -> list[tuple[int, int]]:
    switches = [event for event in events if event.kind in ("enabled", "disabled")]
    failed = [event.step for event in events if event.kind == "failed"]
    end = failed[-1] if state == "quarantined" and failed else last
    if switches:
        from_the_start = switches[0].kind == "disabled"
    else:
        from_the_start = state in ("active", "quarantined")
    start: int | None = 0 if from_the_start else None
    spans = []
    for event in switches:
        if event.kind == "enabled":
            start = event.step
        elif start is not None:
            spans.append((start, event.step))
            start = None
    if start is not None and start <= end:
        spans.append((start, end))
    return spans


def _step(row: dict[str, Any]) -> int | None:
    step = row.get("step")
    return step if type(step) is int and 0 <= step < MAX_STEP else None


def _figure(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, int | float) else "?"


def _event(row: dict[str, Any]) -> Event:
    step = _step(row)
    assert step is not None
    epoch = row.get("epoch")
    known = {"step", "epoch", "event", "plugin"}
    return Event(
        step=step,
        kind=str(row.get("event", "event")),
        plugin=str(row.get("plugin") or ""),
        text=", ".join(f"{key}: {value}" for key, value in row.items() if key not in known),
        epoch=epoch if isinstance(epoch, int) else None,
    )


def _without_repeats(events: Iterable[Event]) -> list[Event]:
    """A resume enables again what is enabled: only changes count."""
    kept: list[Event] = []
    state: dict[str, str] = {}
    for event in events:
        if event.kind in ("enabled", "disabled"):
            if state.get(event.plugin) == event.kind:
                continue
            state[event.plugin] = event.kind
        kept.append(event)
    return kept
