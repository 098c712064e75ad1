"""The timeline of a run: plugins enabled and disabled, failures, resumes, checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from apt_core.runs import events
from apt_core.runs.layout import step_of
from apt_core.runs.rows import is_step
from apt_plugins.report.run_data import Run, mappings

MAX_FAILURES = 30
"""Most failures of a plugin that are shown."""

SHOWN_ELSEWHERE = ("started", "epoch_ended", "saved", "deleted")
"""Kinds of events that the page shows outside of the timeline: in its head, as epochs and as
checkpoints."""

WORDS = {"switched": "transformed the model"}
"""Kinds of events that the page calls by another name."""


@dataclass(frozen=True)
class Event:
    """An event at a step; ``plugin`` is empty where it concerns the whole run."""

    step: int
    kind: str
    plugin: str = ""
    text: str = ""
    epoch: int | None = None


@dataclass(frozen=True)
class Lane:
    """A plugin in the timeline: the spans of steps in which it was enabled, and its events."""

    name: str
    spans: list[tuple[int, int]]
    events: list[Event]


def events_of(run: Run) -> list[Event]:
    """All events of a run by step, from its ``events.jsonl`` and from its manifest.

    Only the manifest has the events from before a resume in another folder, and those of a run
    without ``events.jsonl``.
    """
    recorded = [_recorded(event) for event in run.events if event.kind not in SHOWN_ELSEWHERE]
    known = {(event.step, event.kind, event.plugin) for event in recorded}
    told = [e for e in _of_manifest(run) if (e.step, e.kind, e.plugin) not in known]
    saved = [Event(step_of(c.path), "checkpoint", text=c.path.name) for c in run.checkpoints]
    both = sorted([*told, *recorded], key=lambda event: event.step)
    return sorted([*_without_repeats(both), *saved], key=lambda event: event.step)


def _recorded(event: events.Event) -> Event:
    """An event as the page shows it."""
    data, text = event.data, event.message
    if event.kind in ("enabled", "disabled"):
        text = ""
    elif event.kind == "resumed":
        text = f"from {data.get('checkpoint', '')}"
    elif event.kind == "switched":
        text = _losses(data)
    elif event.kind == "failed":
        text = _failure(data)
    kind = WORDS.get(event.kind, event.kind.replace("_", " "))
    return Event(event.step, kind, event.plugin, text, _epoch(data))


def _of_manifest(run: Run) -> list[Event]:
    found = []
    for row in run.rows("timeline"):
        if (step := _step(row)) is not None:
            known = {"step", "epoch", "event", "plugin"}
            text = ", ".join(f"{key}: {value}" for key, value in row.items() if key not in known)
            kind, of = str(row.get("event", "event")), str(row.get("plugin") or "")
            found.append(Event(step, kind, of, text, _epoch(row)))
    for row in run.rows("switches"):
        if (step := _step(row)) is not None:
            found.append(Event(step, WORDS["switched"], str(row.get("plugin", "")), _losses(row)))
    for plugin in run.rows("plugins"):
        for failure in mappings(plugin.get("failures"))[:MAX_FAILURES]:
            if (step := _step(failure)) is not None:
                name = str(plugin.get("name", ""))
                found.append(Event(step, "failed", name, _failure(failure)))
    return found


def lanes_of(run: Run, events: Iterable[Event]) -> list[Lane]:
    """One lane per plugin, in the order of the manifest, then of the events.

    A plugin without events of enabling was enabled all the time if it is active, and until its last
    failure if it is quarantined.
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
    failed = [event.step for event in events if event.kind in ("failed", "quarantined")]
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


def _step(row: Mapping[str, Any]) -> int | None:
    step = row.get("step")
    return step if is_step(step) else None


def _epoch(row: Mapping[str, Any]) -> int | None:
    epoch = row.get("epoch")
    return epoch if type(epoch) is int else None


def _failure(row: Mapping[str, Any]) -> str:
    return f"in {row.get('hook', '')}: {row.get('error', '')}"


def _losses(row: Mapping[str, Any]) -> str:
    losses = (row.get(name) for name in ("loss_before", "loss_after"))
    shown = [f"{value:.6g}" if isinstance(value, int | float) else "?" for value in losses]
    return f"loss {shown[0]} before, {shown[1]} after"


def _without_repeats(events: Iterable[Event]) -> list[Event]:
    """Drop events that enable or disable a plugin again, as a resume does."""
    kept: list[Event] = []
    state: dict[str, str] = {}
    for event in events:
        if event.kind in ("enabled", "disabled"):
            if state.get(event.plugin) == event.kind:
                continue
            state[event.plugin] = event.kind
        kept.append(event)
    return kept
