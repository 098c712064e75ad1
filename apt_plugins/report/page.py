"""Renders the page of a run and writes it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from apt_core.files import write_atomically
from apt_plugins.report.charts import NARROW, WIDE, Chart, Frame, Mark, step_axis
from apt_plugins.report.header import header
from apt_plugins.report.panels import panels
from apt_plugins.report.run_data import Run, mappings, read_run
from apt_plugins.report.timeline import MAX_FAILURES, WORDS, Event, events_of, lanes_of
from apt_plugins.report.wording import cut, number, plain, size, visible

CHANGES = ("enabled", "disabled", "quarantined", WORDS["switched"], "resumed", "changed")
"""Kinds of events that change a run: each is a line on the charts of the loss."""

MAX_EVENTS = 200
MAX_LANES = 40
MAX_SAMPLES = 12
SAMPLE_CHARACTERS = 4_000
MAX_ROWS = 200
"""Rows of a table; without a limit, a broken file could make a page that no browser opens."""


def build_report(folder: str | Path) -> str:
    """The page on the run in ``folder``, as HTML.

    The page leaves out what is missing from the folder or cut off, and says so. Raises OSError
    where the folder cannot be read.
    """
    return render("report.html.j2", _context(read_run(Path(folder))))


def render(template: str, context: Mapping[str, Any]) -> str:
    """A page of this template, with its style and its script in it."""
    css, script = _asset("report.css"), _asset("report.js")
    return (
        templates("apt_plugins.report")
        .get_template(template)
        .render(
            context,
            css=Markup(css),  # noqa: S704, our own file
            script=Markup(script),  # noqa: S704, our own file
            css_hash=_hash(css),
            script_hash=_hash(script),
        )
    )


def write_report(folder: str | Path, output: str | Path | None = None) -> Path:
    """Write the page to ``output``, by default ``report.html`` in the folder; return its path.

    The write is atomic: a reader sees the old page or the new one. Raises OSError.
    """
    path = Path(folder) / "report.html" if output is None else Path(output)
    write_atomically(path, build_report(folder))
    return path


@cache
def templates(package: str) -> Environment:
    """The templates in the folder of ``package``, for pages as the report's."""
    environment = Environment(
        loader=PackageLoader(package, ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters |= {"number": number, "size": size, "cut": cut, "plain": plain}
    return environment


@cache
def _asset(name: str) -> str:
    return files("apt_plugins.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """The digest by which a Content-Security-Policy allows a script or style."""
    return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _context(run: Run) -> dict[str, Any]:
    events = events_of(run)
    drawn = panels(run.metrics, run.series, _marks(run, events))
    listed = [event for event in events if event.kind != "checkpoint"]
    notes = list(run.notes)
    if drawn.left_out:
        notes.append(f"{drawn.left_out:,} more metrics are in metrics.jsonl and not drawn")
    return {
        "header": header(run),
        "panels": drawn,
        **numbered(drawn.charts),
        "timelines": [_timeline(run, events, frame) for frame in (WIDE, NARROW)],
        "events": listed[:MAX_EVENTS],
        "more_events": max(0, len(listed) - MAX_EVENTS),
        "samples": _samples(run),
        "prompt": cut(str(run.setting("evaluation", "sample_prompt") or ""), 400),
        "providers": run.rows("providers")[:MAX_ROWS],
        "plugins": run.rows("plugins")[:MAX_ROWS],
        "failures_of": lambda plugin: mappings(plugin.get("failures"))[:MAX_FAILURES],
        "inactive": run.rows("inactive_keys")[:MAX_ROWS],
        "checkpoints": run.checkpoints[-MAX_ROWS:],
        "failed_checkpoints": _texts(run.manifest.get("failed_checkpoints")),
        "versions": run.entries("versions"),
        "data": run.entries("data"),
        "profile": run.profile,
        "folder": str(run.folder.absolute()),
        "notes": notes,
    }


def numbered(charts: Sequence[Chart]) -> dict[str, Any]:
    """What the template needs to give each chart its values: ``chart_number`` of a chart in
    ``chart_data``. A chart for a phone has its own scales, and the values of the wide one."""
    numbers = {id(chart): index for index, chart in enumerate(charts)}
    data = [chart.data for chart in charts]
    for index, chart in enumerate(charts):
        if chart.narrow is not None:
            numbers[id(chart.narrow)] = len(data)
            data.append(chart.narrow.data | {"series": index})
    return {"chart_number": lambda chart: numbers[id(chart)], "chart_data": data}


def _marks(run: Run, events: Iterable[Event]) -> list[Mark]:
    """The vertical lines of the loss charts: epochs, and events that change the run."""
    epochs = [Mark(step, f"epoch {epoch}", faint=True) for epoch, step in run.metrics.epochs[1:]]
    events = list(events)
    switched = {(event.step, event.plugin) for event in events if event.kind == WORDS["switched"]}
    changes = [
        Mark(event.step, cut(f"{event.plugin} {event.kind}".strip(), 40))
        for event in events
        if event.kind in CHANGES
        # A plugin that transforms the model does so where it is enabled.
        and not (event.kind == "enabled" and (event.step, event.plugin) in switched)
    ]
    return [*(epochs if len(epochs) <= 30 else []), *changes[:40]]


def _timeline(run: Run, events: list[Event], frame: Frame) -> dict[str, Any]:
    """The lanes of the timeline in pixels: spans in which a plugin was enabled, and its events."""
    axis = step_axis(run.metrics.last_step)
    wide = frame is WIDE
    left, right = 150 if wide else 92, frame.width - frame.right

    def x(step: float) -> float:
        share = min(1.0, (step - axis.low) / (axis.high - axis.low))
        return round(left + share * (right - left), 1)

    def points(own: list[Event]) -> list[tuple[float, str, str]]:
        every = max(1, len(own) // 200)
        return [
            (
                x(e.step),
                _sign(e.kind),
                cut(f"{e.kind} at step {e.step:,}: {e.text}".rstrip(": "), 200),
            )
            for e in own[::every]
            if e.kind not in ("enabled", "disabled")
        ]

    lanes = [
        ("run", [(x(0), x(run.metrics.last_step))], points([e for e in events if not e.plugin]))
    ]
    all_lanes = lanes_of(run, events)
    for lane in all_lanes[:MAX_LANES]:
        spans = [(x(start), x(end)) for start, end in lane.spans]
        lanes.append((_short(lane.name, 20 if wide else 13), spans, points(lane.events)))
    return {
        "lanes": lanes,
        "more": max(0, len(all_lanes) - MAX_LANES),
        "ticks": [
            (round(left + s * (right - left), 1), text) for s, text in axis.ticks(8 if wide else 4)
        ],
        "epochs": [(x(step), epoch) for epoch, step in run.metrics.epochs][: 60 if wide else 20],
        "left": left,
        "right": right,
        "width": frame.width,
    }


def _short(name: str, limit: int) -> str:
    return name if len(name) <= limit else f"{name[: limit - 1]}…"


def _sign(kind: str) -> str:
    return {"failed": "cross", "checkpoint": "tick"}.get(kind, "diamond")


def _samples(run: Run) -> list[tuple[str, str]]:
    """Title and text of the newest samples, the newest first."""
    found = [(f"step {step:,}", text) for step, text in run.metrics.samples]
    last = run.manifest.get("sample")
    if isinstance(last, str) and last:
        found.append(("at the end", last))
    return [(title, cut(text, SAMPLE_CHARACTERS)) for title, text in found[: -MAX_SAMPLES - 1 : -1]]


def _texts(value: Any) -> list[str]:
    return [cut(str(item), 500) for item in value[:MAX_ROWS]] if isinstance(value, list) else []
