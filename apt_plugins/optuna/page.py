"""``report.html`` of a study: its history, which keys matter, every trial's values, on one page
that needs no network and no script."""

from __future__ import annotations

import base64
import hashlib
import warnings
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from markupsafe import Markup

from apt_core.files import write_atomically
from apt_plugins.optuna.progress import value_text
from apt_plugins.optuna.records import TrialRow, best_of
from apt_plugins.optuna.results import counted, table
from apt_plugins.optuna.study import Study
from apt_plugins.report.axes import Axis
from apt_plugins.report.charts import Frame
from apt_plugins.report.page import templates
from apt_plugins.report.wording import cut, number

PAGE = "report.html"
STYLE = ".trials td:nth-child(-n+4) { white-space: nowrap; }"
"""Beside the style of a run's page."""
WIDE = Frame(960, 330)
MAX_TRIALS = 1_000
"""Most trials that a chart draws: the newest."""
MAX_ROWS = 500
MAX_AXES = 12
LEAST_FOR_IMPORTANCE = 4
"""Of fewer trials that came to their end it cannot be told which keys matter."""


def write_page(study: Study, facts: Mapping[str, Any], output: Path | None = None) -> Path:
    """Write the page of a study to ``output``, by default into its folder. Raises OSError."""
    path = study.folder / PAGE if output is None else output
    write_atomically(path, build_page(study, facts))
    return path


def build_page(study: Study, facts: Mapping[str, Any]) -> str:
    """The page of a study, as HTML. ``facts`` is what the study records of itself."""
    rows = study.rows()
    css = files("apt_plugins.report").joinpath("report.css").read_text(encoding="utf-8") + STYLE
    columns, cells = table(rows, study.settings)
    best = best_of(rows, maximize=study.settings.maximize)
    own = next((row for row in rows if row.baseline and row.value is not None), None)
    drawn = rows[-MAX_TRIALS:]
    space = facts.get("space", {})
    return (
        templates("apt_plugins.optuna")
        .get_template("study.html.j2")
        .render(
            css=Markup(css),  # noqa: S704, our own file
            css_hash=base64.b64encode(hashlib.sha256(css.encode()).digest()).decode("ascii"),
            name=study.name,
            folder=str(study.folder.absolute()),
            settings=study.settings,
            counts=counted(rows),
            tiles=_tiles(rows, best, own, study.settings.metric),
            history=history(drawn, study.settings.metric, maximize=study.settings.maximize),
            curves=curves(drawn, best, study.settings.metric),
            importances=importances(study),
            parallel=parallel(drawn, space, best, study.settings),
            columns=columns,
            cells=cells[:MAX_ROWS],
            more=max(0, len(cells) - MAX_ROWS),
            space={key: _range(row) for key, row in space.items()},
        )
    )


def _tiles(
    rows: Sequence[TrialRow], best: TrialRow | None, own: TrialRow | None, metric: str
) -> list[tuple[str, str, str]]:
    """The label, the value and the detail of each figure at the top."""
    steps = sum(row.step for row in rows)
    whole = sum(row.total_steps or row.step for row in rows)
    tiles = []
    if best is not None and best.value is not None:
        tiles.append((f"best {metric}", number(best.value), f"trial {best.number}"))
    if own is not None and own.value is not None:
        detail = "complete" if own.state == "complete" else f"at step {own.step:,}"
        tiles.append(("the profile itself", number(own.value), f"trial {own.number}, {detail}"))
    tiles.append(("trials", f"{len(rows):,}", counted(rows)))
    if whole:
        tiles.append(("steps trained", f"{steps:,}", f"{steps / whole:.0%} of all whole trials"))
    return tiles


def history(rows: Sequence[TrialRow], metric: str, *, maximize: bool) -> dict[str, Any] | None:
    """The objective of each trial by its number, and the best of those that came to the end."""
    shown = [row for row in rows if row.value is not None]
    if not shown:
        return None
    x = np.array([float(row.number) for row in shown])
    y = np.array([float(row.value or 0.0) for row in shown])
    across, up = Axis(min(0.0, x.min()), max(float(x.max()), 1.0)), _fitting(y)
    sign = -1.0 if maximize else 1.0
    points: dict[str, list[str]] = {}
    line: list[str] = []
    best = np.inf
    for row, left, value in zip(
        shown, across.share(x), up.share(np.clip(y, up.low, up.high)), strict=True
    ):
        kind = row.state if row.state in ("complete", "pruned", "failed") else "under way"
        place = f"{WIDE.x(float(left)):g} {WIDE.y(float(value)):g}"
        points.setdefault(kind, []).append(f"M{place}h0")
        if row.state == "complete" and row.value is not None and sign * row.value < best:
            best = sign * row.value
            before = f"H{WIDE.x(float(left)):g}V" if line else f"M{WIDE.x(float(left)):g} "
            line.append(f"{before}{WIDE.y(float(value)):g}")
    if line:
        line.append(f"H{WIDE.width - WIDE.right}")
    colors = {"complete": 0, "pruned": 7, "failed": 1, "under way": 3}
    layers = [(colors[kind], kind, "".join(points[kind])) for kind in colors if kind in points]
    told = (
        f"{len(shown)} trials; {metric} from {number(float(y.min()))} to {number(float(y.max()))}"
    )
    return _chart(f"{metric} of each trial, and the best so far", told, across, up, layers) | {
        "line": "".join(line)
    }


def curves(rows: Sequence[TrialRow], best: TrialRow | None, metric: str) -> dict[str, Any] | None:
    """The objective of each trial over its steps."""
    shown = [row for row in rows if len(row.curve) > 1]
    if not shown:
        return None
    y = np.array([value for row in shown for _, value in row.curve if np.isfinite(value)])
    last = max(step for row in shown for step, _ in row.curve)
    across, up = Axis(0.0, float(max(last, 1))), _fitting(y)
    paths = []
    for row in sorted(shown, key=lambda row: (row is best, row.state == "complete")):
        x, values = (np.array(part, dtype=np.float64) for part in zip(*row.curve, strict=True))
        shares = zip(
            across.share(x).tolist(),
            up.share(np.clip(values, up.low, up.high)).tolist(),
            strict=True,
        )
        d = "L".join(f"{WIDE.x(left):g} {WIDE.y(height):g}" for left, height in shares)
        color = 1 if row is best else 0 if row.state == "complete" else 7
        paths.append((color, row is not best, f"M{d}", f"trial {row.number}"))
    told = f"{len(shown)} trials over up to {last:,} steps"
    return _chart(f"{metric} over the steps of each trial", told, across, up, []) | {"paths": paths}


def importances(study: Study) -> list[tuple[str, float]]:
    """The share of each key in how the objective varies among the trials that came to their end, by
    PED-ANOVA (Watanabe et al., 2023); empty where they are too few."""
    rows = [row for row in study.rows() if row.state == "complete" and row.value is not None]
    if len(rows) < LEAST_FOR_IMPORTANCE:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = optuna.importance.get_param_importances(study.optuna)
        except (ValueError, RuntimeError):  # all of them have the same value
            return []
    return [(key, float(share)) for key, share in found.items() if np.isfinite(share)]


def parallel(
    rows: Sequence[TrialRow], space: Mapping[str, Any], best: TrialRow | None, settings: Any
) -> dict[str, Any] | None:
    """Parallel coordinates: an axis for each key and for the objective, a line for each trial."""
    shown = [row for row in rows if row.value is not None and row.params]
    keys = [key for key in space if any(key in row.params for row in shown)][:MAX_AXES]
    if len(shown) < 2 or not keys:
        return None
    frame = Frame(960, 360, left=70, right=70, top=44, bottom=30)
    scales = [_Scale(space[key], [row.params.get(key) for row in shown]) for key in keys]
    values = np.array([float(row.value or 0.0) for row in shown])
    last = _fitting(values)
    places = [frame.x(i / len(keys)) for i in range(len(keys) + 1)]
    lines = []
    for row in sorted(shown, key=lambda row: (row is best, row.state == "complete")):
        value = np.clip(np.array([row.value]), last.low, last.high)
        shares = [scale.share(row.params.get(key)) for scale, key in zip(scales, keys, strict=True)]
        points = [
            (x, share)
            for x, share in zip(places, [*shares, float(last.share(value)[0])], strict=True)
            if share is not None  # the key is not searched with the others' values
        ]
        d = "L".join(f"{x:g} {frame.y(share):g}" for x, share in points)
        color = 1 if row is best else 0 if row.state == "complete" else 7
        lines.append((color, row is not best, f"M{d}", f"trial {row.number}"))
    axes = [
        (x, _short(key, len(keys)), [(frame.y(share), text) for share, text in scale.ticks])
        for x, key, scale in zip(places, keys, scales, strict=False)
    ]
    ticks = [(frame.y(share), text) for share, text in last.ticks(5)]
    axes.append((places[-1], settings.metric, ticks))
    return {
        "frame": frame,
        "axes": axes,
        "lines": lines,
        "told": f"{len(shown)} trials over {', '.join(keys)} and {settings.metric}; the table "
        "below lists them",
    }


class _Scale:
    """An axis of the values of one key: its range in the space, or its choices."""

    def __init__(self, row: Mapping[str, Any], values: Sequence[Any]) -> None:
        self._choices = [value_text(choice) for choice in row.get("choices", ())]
        if self._choices:
            count = max(1, len(self._choices) - 1)
            self.ticks = [(i / count, cut(text, 16)) for i, text in enumerate(self._choices)][:40]
            return
        numbers = [float(v) for v in values if isinstance(v, int | float)]
        low, high = min([row["low"], *numbers]), max([row["high"], *numbers])
        self._axis = Axis(float(low), float(high), bool(row.get("log")) and low > 0)
        self.ticks = self._axis.ticks(5)

    def share(self, value: Any) -> float | None:
        if value is None and not self._choices:
            return None
        if self._choices:
            text = value_text(value)
            if text not in self._choices:
                return None
            return self._choices.index(text) / max(1, len(self._choices) - 1)
        return float(self._axis.share(np.array([float(value)]))[0])


def _fitting(values: Any) -> Axis:
    """An axis around the values that leaves out what lies far from most of them, such as those of
    trials that diverge: they are drawn at its end."""
    low, middle, most = np.quantile(values, [0.0, 0.5, 0.9])
    high = min(float(values.max()), float(most + 3 * (most - low) + 1e-9))
    low = max(float(low), float(middle - 9 * (high - middle) - 1e-9))
    return Axis.around([np.clip(values, low, high)])


def _chart(
    title: str, told: str, across: Axis, up: Axis, layers: list[tuple[int, str, str]]
) -> dict[str, Any]:
    return {
        "title": title,
        "told": told,
        "frame": WIDE,
        "x_ticks": [(WIDE.x(share), text) for share, text in across.ticks(8)],
        "y_ticks": [(WIDE.y(share), text) for share, text in up.ticks(5)],
        "layers": layers,
    }


def _short(key: str, count: int) -> str:
    """The key as it fits beside ``count`` others."""
    limit = max(8, 130 // (count + 1))
    return key if len(key) <= limit else f"…{key[-limit + 1 :]}"


def _range(row: Mapping[str, Any]) -> str:
    from apt_plugins.optuna.space import Dimension

    made = Dimension(
        "",
        row["kind"],
        "",
        row.get("low", 0.0),
        row.get("high", 0.0),
        row.get("step"),
        bool(row.get("log")),
        tuple(row.get("choices", ())),
        {key: tuple(values) for key, values in row.get("when", {}).items()},
    )
    return made.in_words()
