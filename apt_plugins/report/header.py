"""The head of the page: the status of the run, and its figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from apt_core.monitor import duration
from apt_core.runs.metrics import NOT_FINITE, as_float
from apt_plugins.report.metrics import Series, by_extent, training_loss
from apt_plugins.report.panels import last, lowest, median
from apt_plugins.report.run_data import Run
from apt_plugins.report.wording import cut, number, plain, size

TONES = {
    "finished": "good",
    "stopped": "fair",
    "interrupted": "fair",
    "failed": "bad",
    "running": "open",
}
"""The tone in which the page shows each status of a run."""


@dataclass(frozen=True)
class Tile:
    """One figure: its label, its value, and a line below."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Header:
    """What stands above the charts."""

    title: str
    status: str
    tone: str
    why: str
    facts: list[str]
    tiles: list[Tile]


def header(run: Run) -> Header:
    """Title, status and figures of a run; without a recorded end, those of its last row."""
    manifest = run.manifest
    status = str(manifest.get("status") or "unknown")
    why = str(manifest.get("error") or manifest.get("reason") or "")
    if status == "running":
        rows = f"the last row was written at {run.last_row_at}" if run.last_row_at else "no row yet"
        why = f"No end is recorded: it is running, or was killed; {rows}."
    facts = [
        f"{label} {plain(manifest[key])}"
        for key, label in (
            ("started", "started"),
            ("ended", "ended"),
            ("device", "on"),
            ("gpu", "GPU"),
        )
        if isinstance(manifest.get(key), str) and manifest[key]
    ]
    return Header(
        title=cut(str(manifest.get("profile") or run.folder.name or "run"), 80),
        status=cut(status, 30),
        tone=TONES.get(status, "open"),
        why=cut(why, 2_000),
        facts=facts,
        tiles=_tiles(run),
    )


def _tiles(run: Run) -> list[Tile]:
    series = run.series
    steps = max(_manifest_number(run, "step", run.metrics.last_step), run.metrics.last_step)

    def figure(name: str) -> float | None:
        value = _number(run.entries("figures").get(name))
        return value if value is not None else last(series.get(name))

    tiles = []
    for name, label in (
        ("val_loss", "held-out loss"),
        ("val_bpb", "bits per byte"),
        ("val_ppl", "perplexity"),
    ):
        if (value := figure(name)) is not None:
            detail = _detail(run, name, series.get(name), value, steps)
            tiles.append(Tile(label, number(round(value, 4)), detail))
    loss = training_loss(series)
    value = last(loss)
    if value is not None:
        detail = _detail(run, "loss", loss, value, steps)
        tiles.append(Tile("training loss", number(round(value, 4)), detail))
    tiles.append(Tile("steps", number(steps)))
    if (tokens := figure("tokens")) is not None:
        tiles.append(Tile("tokens", size(tokens), _exact(tokens)))
    if (seconds := figure("seconds")) is not None:
        part = figure("part_seconds")
        since = "" if part is None else f"{duration(part)} since the last resume"
        tiles.append(Tile("time", duration(seconds), since))
    if (speed := median(series.get("tokens_per_s"))) is not None:
        tiles.append(Tile("tokens per second", number(round(speed)), "median"))
    if (mfu := median(series.get("mfu"))) is not None:
        tiles.append(Tile("MFU", f"{mfu:.1%}", "median"))
    if parameters := _manifest_number(run, "parameters", 0):
        tiles.append(Tile("parameters", size(parameters), _exact(parameters)))
    return tiles


def _exact(count: float) -> str:
    """The count in full where :func:`size` rounds it, else empty."""
    return f"{count:,.0f}" if count >= 1e6 else ""


def _manifest_number(run: Run, key: str, default: float) -> float:
    """The number under ``key`` in the manifest, or ``default``."""
    value: Any = run.manifest.get(key)
    return as_float(value) if type(value) in (int, float) else default


def _number(value: Any) -> float | None:
    """A number as a run writes it, finite or not; None for anything else."""
    if type(value) in (int, float) or (type(value) is str and value in NOT_FINITE):
        return as_float(value)
    return None


def _detail(run: Run, name: str, series: Series | None, value: float, steps: float) -> str:
    """The step of ``value`` where that is not the last one, and the first or lowest value."""
    parts = []
    step = _number(run.entries("figures").get("val_step")) if name.startswith("val_") else None
    if step is None and series is not None:
        same = (series.raw == value) | (np.isnan(series.raw) & np.isnan(value))
        step = float(series.x[same][-1]) if same.any() else None
    if step not in (None, steps):
        parts.append(f"at step {step:,.0f}")
    start = _number(run.entries("figures").get(f"{name}_start"))
    if series is not None and series.x.size and name.startswith("val_"):
        parts_of_text = [part for part, _ in by_extent(series, run.series.get("val_tokens"))]
        series = max(parts_of_text, key=lambda part: part.x[-1])
    least = lowest(series)
    if start is not None:
        parts.append(f"{number(round(start, 4))} at the start")
    elif least is not None:
        parts.append(f"lowest {number(round(least, 4))}")
    return ", ".join(parts)
