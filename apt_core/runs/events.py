"""``events.jsonl``: everything that happened in a run, one JSON object a line.

The file is a history, which is only appended to. What a run does again after it was resumed is
there twice; :func:`read_events` tells what still holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from apt_core.error_text import text_of
from apt_core.json_files import row_of
from apt_core.runs.rows import is_step, read_rows
from apt_core.secrets import redact, without_secrets

EVENTS = "events.jsonl"

KINDS = {
    "started": "the run began, with `parameters` on `device` in `processes` and with `plugins`",
    "resumed": "the run went on from `checkpoint`; the rest as of `started`",
    "rewound": "the steps after this one, up to `from_step`, are taken again",
    "changed": "a resume was told to change `key` from `before` to `after`",
    "fell_back": "of kind `provider`, `used` runs in the place of `asked`: `reason`",
    "enabled": "`plugin` was enabled by its schedule, for this step of `epoch` and on",
    "disabled": "`plugin` was disabled by its schedule, for this step of `epoch` and on",
    "switched": "`plugin` changed the model, for this step of `epoch` and on: `parameters` and "
    "`parameters_before`; `loss_after` and `loss_before` on a fixed batch, nats per token",
    "frozen": "`parts` do not learn from this step on: so many `parameters`, by a stage of "
    "`plugin`, or by a plugin's own hand",
    "thawed": "`parts` learn from this step on; the rest as of `frozen`",
    "failed": "`plugin` failed in `hook`, at the line `where`, or left something changed: `error`; "
    "in `process`, if not the first",
    "dropped": "`plugin` has lost `count` calls of `hook` in the background: `reason`",
    "quarantined": "`plugin` is not called any more: `reason`",
    "skipped": "`count` steps since the last row, the first of them `steps`, were not finite and "
    "changed nothing; `total` so far",
    "epoch_ended": "`epoch` ended",
    "looked": "a run that began before its data was built found windows, from the next step on: "
    "`look`, the `number` of them before",
    "saved": "`checkpoint` is complete",
    "deleted": "`checkpoint` was deleted for newer ones",
    "set_aside": "`checkpoint`, of a step after the one that a resume went on from, is now `name`",
    "not_saved": "no checkpoint of this step: `error`",
    "stopping": "the run is to end before its last step: `reason`",
    "ended": "`status` is finished, stopped, interrupted or failed, for this `reason` or by this "
    "`error`",
}
"""The kinds of events, with their fields beside ``time``, ``step``, ``kind`` and ``message``."""

GOES_BACK = ("started", "resumed", "rewound")
"""Kinds after which earlier events of later steps are no part of the run; one that starts has no
past."""

MAX_TEXT = 4000
"""The most characters of a text in an event: an error of a plugin may be of any length."""

MAX_ITEMS = 100
"""The most items of a list or mapping in an event."""

MAX_LINE = 2**20
"""The most bytes of an event that is read."""

MAX_READ = 2**24
"""The most bytes that :meth:`EventTail.new` reads at a time."""

MAX_EVENTS = 200_000
"""The most events of a run that are read."""


@dataclass(frozen=True)
class Event:
    """What happened at ``step``. ``kind`` is one of :data:`KINDS`, or another that a later version
    has written; ``data`` is what the row has beside the other fields, of any form."""

    step: int
    kind: str
    time: str = ""
    message: str = ""
    plugin: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class History:
    """The ``events`` of a run in their order. Those of steps that a resume has taken again are
    ``lost``; ``notes`` say what could not be read."""

    events: list[Event] = field(default_factory=list)
    lost: list[Event] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def as_row(event: Mapping[str, Any]) -> dict[str, Any]:
    """``event`` as its row is written: of bounded size and without secrets."""
    row = without_secrets(dict(event))
    return {name: _bounded(value) for name, value in row.items()}


def _bounded(value: Any, depth: int = 0) -> Any:
    if isinstance(value, str):
        text = redact(value)
        return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}…"
    if value is None or isinstance(value, bool | int | float):
        return value
    if depth < 4 and isinstance(value, Mapping):
        items = list(value.items())[:MAX_ITEMS]
        return {_bounded(str(key)): _bounded(item, depth + 1) for key, item in items}
    if depth < 4 and isinstance(value, list | tuple):
        return [_bounded(item, depth + 1) for item in value[:MAX_ITEMS]]
    return _bounded(text_of(value))


def read_events(folder: Path) -> History:
    """Read the events of the run in ``folder``, whatever state its file is in; never raises."""
    history = History()
    events: list[Event] = []
    for row in read_rows(folder / EVENTS, history.notes, MAX_LINE):
        if len(events) == MAX_EVENTS:
            history.notes.append(
                f"{EVENTS} has more than {MAX_EVENTS:,} events: the rest is left out"
            )
            break
        events.append(_event(row))
    last = inf  # the last step that no later event has gone back behind
    for event in reversed(events):
        (history.events if event.step <= last else history.lost).append(event)
        if event.kind in GOES_BACK:
            last = min(last, -1 if event.kind == "started" else event.step)
    history.events.reverse()
    history.lost.reverse()
    return history


def _event(row: dict[str, Any]) -> Event:
    texts = {name: _text(row.pop(name, "")) for name in ("kind", "time", "message", "plugin")}
    return Event(step=row.pop("step"), **texts, data=row)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


class EventTail:
    """The events of a run that goes on, as they come: those of its present part alone."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / EVENTS
        self._offset = 0
        self._begun = False

    def new(self) -> list[Event]:
        """The events since the last call. Raises OSError where the file cannot be read."""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            lines = file.read(MAX_READ).splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        self._offset += sum(map(len, whole))
        rows = (row_of(line) for line in whole if len(line) <= MAX_LINE)
        events = [_event(row) for row in rows if row is not None and is_step(row.get("step"))]
        if not self._begun:
            starts = [n for n, event in enumerate(events) if event.kind in ("started", "resumed")]
            events = events[starts[-1] if starts else 0 :]
            self._begun = True
        return events
