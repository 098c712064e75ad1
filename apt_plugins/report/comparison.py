"""The page on several runs: their figures, curves, settings and samples side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from apt_core.files import write_atomically
from apt_core.metric_names import CROSS_ENTROPY
from apt_core.secrets import SecretValues, named_secrets, redact
from apt_plugins.report.axes import Axis
from apt_plugins.report.charts import Chart, Curve, Frame, for_any_width, line_chart, step_axis
from apt_plugins.report.header import Header, header
from apt_plugins.report.metrics import Series, by_extent, training_loss
from apt_plugins.report.page import SAMPLE_CHARACTERS, numbered, render
from apt_plugins.report.panels import ALL_BUCKETS, FROM_ZERO, OPTIMISATION, SPEED, TITLES, Group
from apt_plugins.report.run_data import MAX_RUNS, Run, read_run
from apt_plugins.report.thinning import smoothed
from apt_plugins.report.wording import cut, plain

MAX_CHARTS = 60
MAX_SETTINGS = 200
FIRST = ("val_bpb", *OPTIMISATION, *SPEED)
"""Metrics that are drawn first, in this order."""
SHOWN_ABOVE = ("tokens", "loss", CROSS_ENTROPY, "val_loss", "val_tokens")

Draw = Callable[[Frame], Chart | None]


@dataclass(frozen=True)
class Side:
    """One of the runs that are compared, with its ``color`` in every chart."""

    name: str
    color: int
    run: Run
    head: Header

    @property
    def figures(self) -> dict[str, str]:
        return {tile.label: tile.value for tile in self.head.tiles}

    @property
    def sample(self) -> str:
        """What the model wrote last."""
        last = self.run.manifest.get("sample")
        samples = [text for _, text in self.run.metrics.samples]
        text = last if isinstance(last, str) and last else (samples or [""])[-1]
        return cut(text, SAMPLE_CHARACTERS)

    @property
    def settings(self) -> dict[str, str]:
        """The resolved profile as dotted keys with their values in words, without secrets."""
        secrets = SecretValues()
        secrets.add(named_secrets(self.run.settings))
        return {key: redact(value) for key, value in _flat(self.run.settings)}


def build_comparison(folders: Sequence[str | Path]) -> str:
    """The page on the runs in ``folders``, as HTML. Raises OSError where one cannot be read."""
    paths = [Path(folder) for folder in folders]
    runs = [read_run(path) for path in paths]
    names = _names(paths)
    sides = [Side(names[n], n % MAX_RUNS, run, header(run)) for n, run in enumerate(runs)]
    loss, groups = _charts(sides)
    charts = [*loss, *(chart for group in groups for chart in group.charts)]
    return render(
        "comparison.html.j2",
        {
            "sides": sides,
            "figures": list(dict.fromkeys(label for side in sides for label in side.figures)),
            "best": _best(sides),
            "loss": loss,
            "groups": groups,
            "settings": _differing(sides),
            "notes": [f"{side.name}: {note}" for side in sides for note in side.run.notes],
            **numbered(charts),
        },
    )


def write_comparison(folders: Sequence[str | Path], output: str | Path) -> Path:
    """Write the page on several runs to ``output``, atomically; return its path."""
    write_atomically(Path(output), build_comparison(folders))
    return Path(output)


def _names(paths: Sequence[Path]) -> list[str]:
    """The name of each folder, with as many of the folders above it as tell it from the others."""
    parts = [path.absolute().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return [cut(name, 60) for name in names]


def _charts(sides: Sequence[Side]) -> tuple[list[Chart], list[Group]]:
    """The wide charts of the losses, and the small ones of what else was measured."""
    last = max(side.run.metrics.last_step for side in sides)
    steps = step_axis(last)
    names = dict.fromkeys(name for side in sides for name in side.run.series)
    others = [name for name in names if name not in (*SHOWN_ABOVE, *FIRST)]
    small = [name for name in FIRST if name in names] + [
        name
        for name in others
        if not name.startswith("time/") and sum(name in side.run.series for side in sides) > 1
    ]
    buckets = max(20, min(350, ALL_BUCKETS // (len(sides) * (len(small) + 6))))
    trained = {side.name: training_loss(side.run.series) for side in sides}
    held_out = {side.name: _comparable(side.run.series, "val_loss") for side in sides}
    loss = [
        *_wide("Training loss, running mean", _curves(sides, trained, smooth=True), steps, buckets),
        *_wide("Held-out loss", _curves(sides, held_out), steps, buckets),
    ]
    if by_tokens := _over_tokens(sides, held_out):
        most = max(float(curve.series.x[-1]) for curve in by_tokens)
        loss += _wide(
            "Held-out loss over tokens", by_tokens, step_axis(most), buckets, unit="tokens"
        )
    drawn = [
        line_chart(
            TITLES.get(name, name),
            _curves(sides, {side.name: _comparable(side.run.series, name) for side in sides}),
            steps,
            buckets=buckets,
            log=False if name == "lr" or name in FROM_ZERO else None,
            zero=name in FROM_ZERO,
        )
        for name in small[:MAX_CHARTS]
    ]
    charts = [chart for chart in drawn if chart is not None]
    return loss, [Group("What else was measured", charts)] if charts else []


def _wide(
    title: str, curves: Sequence[Curve], steps: Axis, buckets: int, unit: str = "step"
) -> list[Chart]:
    draw = partial(_with_unit, title, curves, steps, buckets, unit)
    chart = for_any_width(draw)
    return [] if chart is None else [chart]


def _with_unit(
    title: str, curves: Sequence[Curve], steps: Axis, buckets: int, unit: str, frame: Frame
) -> Chart | None:
    chart = line_chart(title, curves, steps, buckets=buckets, frame=frame)
    if chart is not None:
        chart.data["unit"] = unit
    return chart


def _curves(
    sides: Sequence[Side], series: Mapping[str, Series | None], *, smooth: bool = False
) -> list[Curve]:
    """One curve a run that has the series, in the run's colour."""
    return [
        Curve(smoothed(found) if smooth else found, side.name, side.color)
        for side in sides
        if (found := series[side.name]) is not None and found.x.size
    ]


def _comparable(series: Mapping[str, Series], name: str) -> Series | None:
    """The series ``name``; of scores of held-out text those on as much of it as most evaluations
    have scored."""
    found = series.get(name)
    if found is None or not name.startswith("val_"):
        return found
    return by_extent(found, series.get("val_tokens"))[0][0]


def _over_tokens(sides: Sequence[Side], series: Mapping[str, Series | None]) -> list[Curve]:
    """The curves over the tokens that were seen; none where that is the same as over steps."""
    curves, rates = [], set()
    for curve in _curves(sides, series):
        side = next(side for side in sides if side.name == curve.label)
        seen = side.run.series.get("tokens")
        if seen is None or seen.finite.x.size < 2 or not seen.finite.x[-1]:
            continue
        known = seen.finite
        rates.add(round(known.y[-1] / known.x[-1], 1))
        at = np.interp(curve.series.x, np.append(0.0, known.x), np.append(0.0, known.y))
        curves.append(Curve(Series("tokens", at, curve.series.raw), curve.label, curve.color))
    return curves if len(rates) > 1 else []


def _best(sides: Sequence[Side]) -> dict[str, str]:
    """The lowest of the figures of which lower is better, as it is shown."""
    best = {}
    for label in ("held-out loss", "bits per byte", "perplexity"):
        shown = [side.figures[label] for side in sides if label in side.figures]
        finite = [value for value in shown if value not in ("nan", "inf", "-inf")]
        if len(shown) > 1 and finite:
            best[label] = min(finite, key=lambda value: float(value.replace(",", "")))
    return best


def _differing(sides: Sequence[Side]) -> list[tuple[str, list[str]]]:
    """The keys whose values are not the same in all runs, with those of each."""
    settings = [side.settings for side in sides]
    keys = dict.fromkeys(key for each in settings for key in each)
    rows = [(key, [cut(each.get(key, "–"), 120) for each in settings]) for key in keys]
    return [row for row in rows if len(set(row[1])) > 1][:MAX_SETTINGS]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, dict) and value and prefix.count(".") < 8:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", "null" if value is None else plain(value)
