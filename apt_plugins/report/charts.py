"""Charts for the page's template: paths in pixels, ticks, and the values behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from apt_plugins.report.axes import Axis, wants_log
from apt_plugins.report.metrics import Array, Series
from apt_plugins.report.thinning import smoothed, thin
from apt_plugins.report.wording import cut, number

DOTS_UP_TO = 40
"""A curve of at most this many points shows a dot for each."""

SMOOTHED_FROM = 100
"""Noisy curves of at least this many points get a running mean."""


@dataclass(frozen=True)
class Frame:
    """Size of a chart and of the plot in it, in pixels."""

    width: int
    height: int
    left: int = 58
    right: int = 14
    top: int = 12
    bottom: int = 26

    @property
    def across(self) -> int:
        return self.width - self.left - self.right

    @property
    def down(self) -> int:
        return self.height - self.top - self.bottom

    def x(self, share: float) -> float:
        return round(self.left + share * self.across, 1)

    def y(self, share: float) -> float:
        return round(self.top + (1 - share) * self.down, 1)


SMALL = Frame(350, 190, left=52)
WIDE = Frame(960, 330)
NARROW = Frame(350, 260, left=44, right=10)
"""What a phone shows in place of a wide chart."""


@dataclass(frozen=True)
class Curve:
    """A series to draw; ``color`` is an index into the page's palette.

    A ``noisy`` curve is drawn faintly, with its running mean on top.
    """

    series: Series
    label: str
    color: int = 0
    noisy: bool = False


@dataclass(frozen=True)
class Mark:
    """A vertical line at a step."""

    step: float
    label: str
    faint: bool = False


@dataclass(frozen=True)
class Path:
    """A drawn curve or area; ``dots`` is the path of its points, or empty."""

    d: str
    color: int
    label: str
    faint: bool = False
    dots: str = ""


@dataclass(frozen=True)
class Chart:
    """What the template draws. The page's script shows ``data`` under the pointer."""

    title: str
    summary: str
    frame: Frame
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[Path] = field(default_factory=list)
    areas: list[Path] = field(default_factory=list)
    marks: list[tuple[float, str, bool]] = field(default_factory=list)
    gaps: list[tuple[float, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    narrow: Chart | None = None
    """The same chart for a phone, of a wide one."""

    @property
    def legend(self) -> list[Path]:
        named = [path for path in [*self.areas, *self.lines] if not path.faint]
        return named if len(named) > 1 else []


def step_axis(last: float, *, log: bool = False) -> Axis:
    """The axis of steps that every chart of a run shares."""
    return Axis(1.0, max(last, 2.0), True) if log else Axis(0.0, max(last, 1.0))


def for_any_width(draw: Callable[[Frame], Chart | None]) -> Chart | None:
    """The wide chart that ``draw`` makes, with the one for a phone."""
    chart = draw(WIDE)
    return None if chart is None else replace(chart, narrow=draw(NARROW))


def line_chart(
    title: str,
    curves: Sequence[Curve],
    steps: Axis,
    *,
    buckets: int,
    frame: Frame = SMALL,
    marks: Sequence[Mark] = (),
    log: bool | None = None,
    zero: bool = False,
) -> Chart | None:
    """Curves over steps, or None where no step has a value.

    Without ``log`` the values decide about a log scale. A value that is not finite makes a gap in
    the curve, with a cross below it; where no value is finite, there are only crosses.
    """
    given = [_within(curve, steps) for curve in curves]
    values = [v for curve in given if (v := curve.series.finite.y).size]
    if not any(curve.series.x.size for curve in given):
        return None
    if log is None:
        log = not zero and bool(values) and wants_log(np.concatenate(values))
    axis = Axis.around(values, log=log, zero=zero) if values else Axis(0.0, 1.0)
    lines, data = [], []
    for curve in given:
        x, y = _thinned(curve.series, steps, buckets)
        across, up = steps.share(x), axis.share(y)
        label = cut(curve.label, 60)
        few = np.isfinite(y).sum() <= DOTS_UP_TO
        dots = _dots(frame, across, up) if few else ""
        lines.append(Path(_path(frame, across, up), curve.color % 8, label, curve.noisy, dots))
        good = np.isfinite(y)
        if good.any():
            data.append(_values(curve.label, curve.color, x[good], y[good]))
        if curve.noisy:
            x, y = _thinned(smoothed(curve.series), steps, buckets // 2)
            d = _path(frame, steps.share(x), axis.share(y))
            lines.append(Path(d, curve.color % 8, f"{label}, running mean"))
    notes = ["log scale"] if log and values else []
    if len(given) == 1 and given[0].noisy:
        notes.append("with its running mean")
    missing = sum(int((~np.isfinite(c.series.y)).sum()) for c in given)
    if missing:
        notes.append(f"{missing:,} values are not finite (crosses)")
    return Chart(
        title=title,
        summary=_summary(given),
        frame=frame,
        x_ticks=[(frame.x(s), text) for s, text in steps.ticks(8 if frame is WIDE else 4)],
        y_ticks=[(frame.y(s), text) for s, text in axis.ticks(5 if frame is WIDE else 4) if values],
        lines=lines,
        marks=_marks(marks, steps, frame),
        gaps=_gaps(given, steps, frame, buckets),
        notes=notes,
        data=_scales(frame, steps, axis) | {"series": data},
    )


def area_chart(
    title: str,
    x: Array,
    values: Array,
    labels: Sequence[str],
    steps: Axis,
    unit: str,
    frame: Frame = WIDE,
) -> Chart:
    """The K parts ``values`` [N, K] of a whole, stacked, at steps ``x`` [N]."""
    tops = np.cumsum(values, axis=1)
    axis = Axis.around([tops], zero=True)
    across = steps.share(x)
    areas, data = [], []
    below = np.zeros(x.size)
    for index, label in enumerate(labels):
        upper = axis.share(tops[:, index])
        edge = np.concatenate((across, across[::-1]))
        d = _path(frame, edge, np.concatenate((upper, below[::-1]))) + "Z"
        areas.append(Path(d, index % 8, cut(label, 60)))
        data.append(_values(label, index, x, values[:, index]))
        below = upper
    means = ", ".join(
        f"{label} {number(float(v))}" for label, v in zip(labels, values.mean(0), strict=True)
    )
    return Chart(
        title=title,
        summary=f"mean {unit}: {means}",
        frame=frame,
        x_ticks=[(frame.x(s), text) for s, text in steps.ticks(8 if frame is WIDE else 4)],
        y_ticks=[(frame.y(s), text) for s, text in axis.ticks(5)],
        areas=areas,
        data=_scales(frame, steps, axis) | {"series": data, "stacked": True},
    )


def is_noisy(series: Series) -> bool:
    """Whether neighbouring values differ so much that a running mean shows more than they do."""
    y = series.finite.y
    if y.size < SMOOTHED_FROM:
        return False
    low, high = np.quantile(y, [0.02, 0.98])
    return bool(np.abs(np.diff(y)).mean() > 0.02 * (high - low) > 0)


def _within(curve: Curve, steps: Axis) -> Curve:
    x = curve.series.x
    inside = (x >= steps.low) & (x <= steps.high)
    return replace(curve, series=curve.series.where(inside))


def _thinned(series: Series, steps: Axis, buckets: int) -> tuple[Array, Array]:
    kept = thin(steps.share(series.x), series.y, buckets)
    return series.x[kept], series.y[kept]


def _gaps(
    curves: Sequence[Curve], steps: Axis, frame: Frame, buckets: int
) -> list[tuple[float, str]]:
    """Crosses as (x, label); values too close to be told apart share one."""
    gaps = []
    for curve in curves:
        odd = curve.series.where(~np.isfinite(curve.series.y))
        if not odd.x.size:
            continue
        shares = steps.share(odd.x)
        bucket = np.minimum(np.floor(shares * buckets), buckets - 1)
        starts = np.flatnonzero(np.diff(bucket, prepend=-1.0)).tolist()
        for start, end in zip(starts, [*starts[1:], odd.x.size], strict=True):
            label = f"step {odd.x[start]:,.0f}"
            if end - start > 1:
                label = f"{end - start:,} steps from {label} to {odd.x[end - 1]:,.0f}"
            kinds = dict.fromkeys(number(value) for value in odd.raw[start:end].tolist()[:50])
            label += f": {', '.join([*kinds][:3])}"
            label += f" ({cut(curve.label, 60)})" if len(curves) > 1 else ""
            gaps.append((frame.x(float(shares[start])), label))
    return gaps


def _path(frame: Frame, across: Array, up: Array) -> str:
    """An SVG path that NaN interrupts; a point without neighbours becomes a dot."""
    parts: list[str] = []
    finite = np.isfinite(up)
    xs = np.round(frame.left + across * frame.across, 1).tolist()
    ys = np.round(frame.top + (1 - up) * frame.down, 1).tolist()
    pen_down = False
    for x, y, drawn in zip(xs, ys, finite.tolist(), strict=True):
        if drawn:
            parts.append(f"L{x:g} {y:g}" if pen_down else f"M{x:g} {y:g}h0")
        pen_down = drawn
    return "".join(parts)


def _dots(frame: Frame, across: Array, up: Array) -> str:
    finite = np.isfinite(up)
    pairs = zip(across[finite].tolist(), up[finite].tolist(), strict=True)
    return "".join(f"M{frame.x(s):g} {frame.y(u):g}h0" for s, u in pairs)


def _marks(marks: Sequence[Mark], steps: Axis, frame: Frame) -> list[tuple[float, str, bool]]:
    shown = [mark for mark in marks if steps.low <= mark.step <= steps.high]
    shares = steps.share(np.array([mark.step for mark in shown], dtype=np.float64))
    return [(frame.x(float(s)), m.label, m.faint) for s, m in zip(shares, shown, strict=True)]


def _values(label: str, color: int, x: Array, y: Array) -> dict[str, Any]:
    return {
        "name": cut(label, 60),
        "color": color % 8,
        "x": x.astype(np.int64).tolist(),
        "y": [float(f"{value:.5g}") for value in y.tolist()],
    }


def _scales(frame: Frame, steps: Axis, axis: Axis) -> dict[str, Any]:
    return {
        "x": [steps.low, steps.high, steps.log, frame.left, frame.width - frame.right],
        "y": [axis.low, axis.high, axis.log, frame.height - frame.bottom, frame.top],
    }


def _summary(curves: Sequence[Curve]) -> str:
    """The last, lowest and highest values in words, for screen readers and print."""
    sentences = []
    for curve in curves:
        series, points = curve.series, curve.series.finite
        name = f"{cut(curve.label, 60)}: " if len(curves) > 1 else ""
        if not points.y.size:
            if series.x.size:
                sentences.append(
                    f"{name}never finite in {series.x.size:,} rows, "
                    f"last {number(float(series.raw[-1]))} at step {series.x[-1]:,.0f}"
                )
        else:
            low, high = int(points.y.argmin()), int(points.y.argmax())
            last = number(float(series.raw[-1]))
            if points.x[-1] != series.x[-1]:
                last += (
                    f" at step {series.x[-1]:,.0f} (finite last at step {points.x[-1]:,.0f}: "
                    f"{number(float(points.y[-1]))})"
                )
            sentences.append(
                f"{name}last {last}, "
                f"lowest {number(float(points.y[low]))} at step {points.x[low]:,.0f}, "
                f"highest {number(float(points.y[high]))} at step {points.x[high]:,.0f}"
            )
    return "; ".join(sentences)
