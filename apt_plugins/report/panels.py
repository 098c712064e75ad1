"""Which charts a run has: those of the loop by name, those of plugins by prefix."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from apt_plugins.report.axes import Axis
from apt_plugins.report.charts import (
    SMALL,
    WIDE,
    Chart,
    Curve,
    Mark,
    area_chart,
    is_noisy,
    line_chart,
    step_axis,
)
from apt_plugins.report.metrics import Array, Metrics, Series
from apt_plugins.report.thinning import means

TITLES = {
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
PREFIXES = {"loss": "Terms of the loss", "schedule": "Scheduled parameters"}

PART = re.compile(r"time/(?!step_ms$|total_ms$)([^/]+)_ms")
HOOKS = re.compile(r"time/hooks/(.+)_ms")
QUANTILE = re.compile(r"(.+)_(?:min|p\d\d?|max)")

MAX_CHARTS = 120
ALL_BUCKETS = 14_000
"""Buckets of points on the whole page: a bound on its size that no number of metrics lifts."""


@dataclass(frozen=True)
class Group:
    """Charts under one heading."""

    title: str
    charts: list[Chart]


@dataclass(frozen=True)
class Share:
    """Mean milliseconds a step of one part, and its share of the whole, 0 to 1."""

    label: str
    color: int
    ms: float
    share: float


@dataclass(frozen=True)
class TimeSplit:
    """Where a step's time goes: parts of the step, and of the hooks' part each plugin."""

    chart: Chart
    parts: list[Share]
    plugins: list[Share]


@dataclass
class Panels:
    """All charts; ``left_out`` counts the metrics beyond the most that are shown."""

    loss: list[Chart]
    groups: list[Group] = field(default_factory=list)
    time: TimeSplit | None = None
    left_out: int = 0

    @property
    def charts(self) -> list[Chart]:
        """In the order in which the page numbers them."""
        split = [self.time.chart] if self.time else []
        return [*self.loss, *(c for group in self.groups for c in group.charts), *split]


def panels(metrics: Metrics, marks: Sequence[Mark]) -> Panels:
    """The charts of a run, with ``marks`` on those of the loss."""
    series = metrics.series
    steps = step_axis(metrics.last_step)
    split = [name for name in series if PART.fullmatch(name) or HOOKS.fullmatch(name)]
    shown = ("tokens", "loss", "val_loss", "val_tokens", *split)
    single = [name for name in series if name not in shown]
    left_out = max(0, len(single) - MAX_CHARTS)
    named = _grouped(single[:MAX_CHARTS])
    buckets = min(350, ALL_BUCKETS // (len(single) + 6))
    groups = []
    for title, names in named.items():
        charts = [
            _chart([series[name] for name in together], title, steps, buckets)
            for together in _together(names)
        ]
        groups.append(Group(title, [chart for chart in charts if chart is not None]))
    return Panels(
        loss=_loss_charts(metrics, marks, buckets),
        groups=[group for group in groups if group.charts],
        time=_time_split(series, steps, buckets),
        left_out=left_out,
    )


def _grouped(names: Sequence[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {"Optimisation": [], "Speed and memory": [], "Held-out text": []}
    for title, known in (("Optimisation", OPTIMISATION), ("Speed and memory", SPEED)):
        groups[title] = [name for name in known if name in names]
    for name in names:
        prefix, slash, _ = name.partition("/")
        if name in OPTIMISATION or name in SPEED:
            continue
        if slash:
            title = PREFIXES.get(prefix, f"Metrics of {prefix}")
        else:
            title = "Held-out text" if name.startswith("val_") else "Other metrics"
        groups.setdefault(title, []).append(name)
    return groups


def _together(names: Sequence[str]) -> list[list[str]]:
    """Names by chart: the quantiles of one figure share theirs, every other name has its own."""
    charts: dict[str, list[str]] = {}
    for name in names:
        quantile = QUANTILE.fullmatch(name)
        charts.setdefault(f"{quantile[1]}_*" if quantile else name, []).append(name)
    return list(charts.values())


def _chart(series: Sequence[Series], group: str, steps: Axis, buckets: int) -> Chart | None:
    """One chart of one series, or of the quantiles of one figure."""
    name = series[0].name
    quantile = QUANTILE.fullmatch(name) if len(series) > 1 else None
    label = quantile[1] if quantile else name
    label = label.partition("/")[2] if group.startswith("Metrics of") else label
    if quantile:
        curves = [Curve(s, s.name.rpartition("_")[2], i) for i, s in enumerate(series)]
    else:
        color = int(name.startswith("val_"))
        curves = [Curve(series[0], label, color, noisy=is_noisy(series[0]))]
    return line_chart(
        TITLES.get(name, f"{label}, quantiles" if quantile else label),
        curves,
        steps,
        buckets=buckets // len(series),
        frame=SMALL,
        log=False if name in ("lr", *FROM_ZERO) else None,
        zero=name in FROM_ZERO,
    )


def _loss_charts(metrics: Metrics, marks: Sequence[Mark], buckets: int) -> list[Chart]:
    """Training and held-out loss over linear and over logarithmic steps."""
    curves = [
        Curve(series, label, color, noisy=is_noisy(series))
        for color, (name, label) in enumerate((("loss", "training"), ("val_loss", "held out")))
        if (series := metrics.series.get(name)) is not None
    ]
    charts = [
        line_chart(
            "Loss in nats per token" + (", log scale of steps" if log else ""),
            curves,
            step_axis(metrics.last_step, log=log),
            buckets=buckets,
            frame=WIDE,
            marks=marks,
        )
        for log in (False, True)
    ]
    return [chart for chart in charts if chart is not None]


def _time_split(series: dict[str, Series], steps: Axis, buckets: int) -> TimeSplit | None:
    parts = {m[1]: s for name, s in series.items() if (m := PART.fullmatch(name))}
    if not parts:
        return None
    x, values = _table(list(parts.values()))
    labels = [label.replace("_", " ") for label in parts]
    mean = values.mean(axis=0)
    whole = float(mean.sum()) or 1.0
    plugins = {m[1]: s for name, s in series.items() if (m := HOOKS.fullmatch(name))}
    costs = _table(list(plugins.values()))[1].mean(axis=0) if plugins else np.zeros(0)
    thin_x, thin_values = means(x, values, min(buckets, 250))
    return TimeSplit(
        area_chart("Milliseconds a step", thin_x, thin_values, labels, steps, "ms a step"),
        _shares(labels, mean, whole),
        sorted(_shares(list(plugins), costs, whole), key=lambda share: -share.ms),
    )


def _table(columns: Sequence[Series]) -> tuple[Array, Array]:
    """Series as one table [N, K] over the steps of all; 0 where one has no finite value."""
    x = np.unique(np.concatenate([column.x for column in columns]))
    values = np.zeros((x.size, len(columns)))
    for index, column in enumerate(columns):
        values[np.searchsorted(x, column.x), index] = np.maximum(np.nan_to_num(column.y), 0.0)
    return x, values


def _shares(labels: Sequence[str], means_: Array, whole: float) -> list[Share]:
    return [
        Share(label, index % 8, float(ms), float(ms) / whole)
        for index, (label, ms) in enumerate(zip(labels, means_, strict=True))
    ]


def extreme(series: Series | None, *, lowest: bool = False) -> float | None:
    """The last finite value of a series, or its lowest; None where there is none."""
    if series is None or not (points := series.finite).y.size:
        return None
    return float(points.y.min() if lowest else points.y[-1])


def typical(series: Series | None) -> float | None:
    """The median of the finite values of a series; None where there is none."""
    if series is None or not (points := series.finite).y.size:
        return None
    return float(np.median(points.y))
