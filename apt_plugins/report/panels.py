"""Chooses the charts of a run: metrics of the loop by name, those of plugins by prefix."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from apt_core.metric_names import CROSS_ENTROPY
from apt_core.runs.metrics import Metrics
from apt_plugins.report.axes import Axis
from apt_plugins.report.charts import (
    SMALL,
    Chart,
    Curve,
    Frame,
    Mark,
    area_chart,
    for_any_width,
    is_noisy,
    line_chart,
    step_axis,
)
from apt_plugins.report.metrics import Array, Series, by_extent, training_loss
from apt_plugins.report.thinning import means

TITLES = {
    "loss": "Loss with all terms",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm, before clipping",
    "skipped_steps": "Steps skipped so far, not finite",
    "tokens_per_s": "Target tokens per second",
    "mfu": "MFU, share of the measured peak",
    "memory_mb": "Memory, MiB",
    "peak_memory_mb": "Peak memory, MiB",
    "val_bpb": "Bits per byte",
    "val_ppl": "Perplexity",
}
OPTIMISATION = ("lr", "grad_norm", "skipped_steps")
SPEED = ("tokens_per_s", "mfu", "memory_mb", "peak_memory_mb")
FROM_ZERO = (*SPEED, "skipped_steps")
PREFIXES = {
    "loss": "Terms of the loss",
    "lr": "Learning rates of groups",
    "schedule": "Scheduled parameters",
    "task": "Tasks",
}

PART = re.compile(r"time/(?!step_ms$|total_ms$)([^/]+)_ms")
WITHIN = {"hooks": ("hooks", "hooks of"), "loss_terms": ("forward_backward", "loss terms of")}
"""Times measured by plugin: the part of a step that contains them, and their label."""
OF_PLUGIN = re.compile(rf"time/({'|'.join(WITHIN)})/(.+)_ms")
QUANTILE = re.compile(r"(.+)_(?:min|p\d\d?|max)")

MAX_CHARTS = 120
MAX_PLUGINS = 40
"""Plugins listed in the split of a part of a step."""
ALL_BUCKETS = 14_000
"""Buckets of points on the whole page, which bound its size for any number of metrics."""


@dataclass(frozen=True)
class Group:
    """Charts under one heading."""

    title: str
    charts: list[Chart]


@dataclass(frozen=True)
class Share:
    """Mean milliseconds of one part of a step, and its share of the step, 0 to 1."""

    label: str
    color: int
    ms: float
    share: float


@dataclass(frozen=True)
class TimeSplit:
    """Where a step's time goes: its parts, and for each part the shares of plugins and of the
    rest, which add up to the part."""

    chart: Chart
    parts: list[tuple[Share, list[Share]]]


@dataclass
class Panels:
    """All charts. ``left_out`` counts the metrics beyond MAX_CHARTS; ``without_loss`` says why a
    run has no chart of the loss."""

    loss: list[Chart]
    groups: list[Group] = field(default_factory=list)
    time: TimeSplit | None = None
    left_out: int = 0
    without_loss: str = ""

    @property
    def charts(self) -> list[Chart]:
        """In the order in which the page numbers them."""
        split = [self.time.chart] if self.time else []
        return [*self.loss, *(c for group in self.groups for c in group.charts), *split]


def panels(metrics: Metrics, series: Mapping[str, Series], marks: Sequence[Mark]) -> Panels:
    """The charts of a run: ``series`` are those of its ``metrics``, ``marks`` the vertical lines of
    the loss charts."""
    steps = step_axis(metrics.last_step)
    split = [name for name in series if PART.fullmatch(name) or OF_PLUGIN.fullmatch(name)]
    shown = ["tokens", CROSS_ENTROPY, "val_loss", "val_tokens", *split]
    if not any(name.startswith("loss/") and name != CROSS_ENTROPY for name in series):
        shown.append("loss")
    single = [name for name in series if name not in shown]
    left_out = max(0, len(single) - MAX_CHARTS)
    named = _grouped(single[:MAX_CHARTS])
    buckets = min(350, ALL_BUCKETS // (len(single) + 6))
    groups = []
    for title, names in named.items():
        charts = [
            _chart([series[name] for name in together], title, steps, buckets, series)
            for together in _together(names)
        ]
        groups.append(Group(title, [chart for chart in charts if chart is not None]))
    return Panels(
        loss=_loss_charts(series, metrics.last_step, marks, buckets),
        groups=[group for group in groups if group.charts],
        time=_time_split(series, steps, buckets),
        left_out=left_out,
        without_loss=f"{metrics.rows:,} rows were logged, none of them with a loss."
        if metrics.rows
        else "No step was logged.",
    )


def _grouped(names: Sequence[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {"Optimisation": [], "Speed and memory": [], "Held-out text": []}
    for title, known in (("Optimisation", OPTIMISATION), ("Speed and memory", SPEED)):
        groups[title] = [name for name in known if name in names]
    for name in names:
        prefix, slash, _ = name.partition("/")
        if name in OPTIMISATION or name in SPEED:
            continue
        if slash or name in PREFIXES:
            title = PREFIXES.get(prefix, f"Metrics of {prefix}")
        else:
            title = "Held-out text" if name.startswith("val_") else "Other metrics"
        groups.setdefault(title, []).append(name)
    return groups


def _together(names: Sequence[str]) -> list[list[str]]:
    """Names by chart: quantiles of one figure share a chart, every other name has its own."""
    charts: dict[str, list[str]] = {}
    for name in names:
        quantile = QUANTILE.fullmatch(name)
        charts.setdefault(f"{quantile[1]}_*" if quantile else name, []).append(name)
    return list(charts.values())


def _chart(
    series: Sequence[Series], group: str, steps: Axis, buckets: int, all_of: Mapping[str, Series]
) -> Chart | None:
    """One chart of one series of ``all_of`` the run's, or of the quantiles of one figure."""
    name = series[0].name
    quantile = QUANTILE.fullmatch(name) if len(series) > 1 else None
    label = quantile[1] if quantile else name
    label = label.partition("/")[2] if group.startswith("Metrics of") else label
    if quantile:
        curves = [Curve(s, s.name.rpartition("_")[2], i) for i, s in enumerate(series)]
    elif name.startswith("val_"):
        curves = _held_out(all_of, name, label)
    else:
        curves = [Curve(series[0], label, noisy=is_noisy(series[0]))]
    return line_chart(
        TITLES.get(name, f"{label}, quantiles" if quantile else label),
        curves,
        steps,
        buckets=buckets // len(series),
        frame=SMALL,
        log=False if name in ("lr", *FROM_ZERO) or name.startswith("lr/") else None,
        zero=name in FROM_ZERO,
    )


def _loss_charts(
    series: Mapping[str, Series], last_step: int, marks: Sequence[Mark], buckets: int
) -> list[Chart]:
    """Training and held-out loss over linear and over logarithmic steps."""
    curves = []
    if (trained := training_loss(series)) is not None:
        curves.append(Curve(trained, "training", noisy=is_noisy(trained)))
    # Evaluations predict the same text each time: their differences are no noise.
    curves += _held_out(series, "val_loss", "held out")

    def draw(frame: Frame, log: bool) -> Chart | None:
        return line_chart(
            "Loss in nats per token" + (", log scale of steps" if log else ""),
            curves,
            step_axis(last_step, log=log),
            buckets=buckets,
            frame=frame,
            marks=marks,
        )

    charts = [for_any_width(partial(draw, log=log)) for log in (False, True)]
    return [chart for chart in charts if chart is not None]


def _held_out(series: Mapping[str, Series], name: str, label: str) -> list[Curve]:
    """A curve of the scores ``name`` for each amount of held-out text that was scored."""
    if (scores := series.get(name)) is None:
        return []
    return [
        Curve(part, f"{label}, {extent}" if extent else label, color)
        for color, (part, extent) in enumerate(by_extent(scores, series.get("val_tokens")), 1)
    ]


def _time_split(series: Mapping[str, Series], steps: Axis, buckets: int) -> TimeSplit | None:
    parts = {m[1]: s for name, s in series.items() if (m := PART.fullmatch(name))}
    if not parts:
        return None
    x = np.unique(np.concatenate([column.x for column in parts.values()]))
    values = _table(x, list(parts.values()))
    labels = [label.replace("_", " ") for label in parts]
    mean = values.mean(axis=0)
    whole = float(mean.sum()) or 1.0
    within: dict[str, dict[str, float]] = {name: {} for name in parts}
    for name, column in series.items():
        if (m := OF_PLUGIN.fullmatch(name)) and WITHIN[m[1]][0] in parts:
            part, of = WITHIN[m[1]]
            within[part][f"{of} {m[2]}"] = float(_table(x, [column]).mean())
    thin_x, thin_values = means(x, values, min(buckets, 250))
    shares = [
        Share(label, index % 8, float(ms), float(ms) / whole)
        for index, (label, ms) in enumerate(zip(labels, mean, strict=True))
    ]
    draw = partial(
        area_chart, "Milliseconds a step", thin_x, thin_values, labels, steps, "ms a step"
    )
    chart = for_any_width(draw)
    assert chart is not None
    return TimeSplit(
        chart,
        [(s, _split(s, within[name], whole)) for name, s in zip(parts, shares, strict=True)],
    )


def _split(part: Share, within: Mapping[str, float], whole: float) -> list[Share]:
    """The shares of plugins in ``part``, largest first, then the rest of it."""
    if not within:
        return []
    ordered = sorted(within.items(), key=lambda item: -item[1])
    shown, others = ordered[:MAX_PLUGINS], ordered[MAX_PLUGINS:]
    if others:
        shown.append((f"{len(others):,} more", sum(ms for _, ms in others)))
    shown.append((f"the rest of {part.label}", max(0.0, part.ms - sum(within.values()))))
    return [Share(label, 7, ms, ms / whole) for label, ms in shown]


def _table(x: Array, columns: Sequence[Series]) -> Array:
    """Series as one table [N, K] over steps ``x`` [N]; 0 where a series has no finite value."""
    values = np.zeros((x.size, len(columns)))
    for index, column in enumerate(columns):
        _, at, of = np.intersect1d(x, column.x, return_indices=True)
        values[at, index] = np.maximum(np.nan_to_num(column.y[of]), 0.0)
    return values


def lowest(series: Series | None) -> float | None:
    """The lowest finite value of a series; None where there is none."""
    if series is None or not (points := series.finite).y.size:
        return None
    return float(points.y.min())


def last(series: Series | None) -> float | None:
    """The last value of a series, finite or not; None where there is none."""
    return None if series is None or not series.x.size else float(series.raw[-1])


def median(series: Series | None) -> float | None:
    """The median of the finite values of a series; None where there is none."""
    if series is None or not (points := series.finite).y.size:
        return None
    return float(np.median(points.y))
