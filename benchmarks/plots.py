"""Draw one plot of a result as an SVG that is the same wherever it is drawn and looked at."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, StrMethodFormatter

# Okabe and Ito's colours that show on white; told apart with every common colour blindness.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # one more, so that no pair comes back soon
DASHES = ("-", "--", ":")

STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 10,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#dddddd",
    "svg.fonttype": "path",
    "svg.hashsalt": "apt",
}

MARKED = 16
"""Series with more points are drawn as a line with a band, without markers."""


def draw(plot: Mapping[str, Any], path: Path, digest: str) -> None:
    """Write ``plot``, an entry of a result's ``raw["plots"]``, to ``path``; the file names
    ``digest`` in its metadata."""
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(7.2, 4.0), layout="constrained")
        axes = figure.add_subplot()
        axes.set_axisbelow(True)
        axes.set_title(plot["title"], loc="left")
        axes.set_xlabel(plot["x_label"])
        axes.set_ylabel(plot["y_label"])
        for index, series in enumerate(plot["series"]):
            _draw_series(axes, series, index)
        if plot["x_scale"] == "log":
            axes.set_xscale("log")
            _label_powers(axes.xaxis, {x for series in plot["series"] for x in series["x"]})
        if plot["y_scale"] == "log":
            axes.set_yscale("log")
            _label_powers(axes.yaxis, set())
        if len(plot["series"]) > 1:
            figure.legend(loc="outside right center", frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(
            path,
            format="svg",
            facecolor="white",
            metadata={"Date": None, "Title": plot["title"], "Description": f"Data: {digest}"},
        )


def _draw_series(axes: Axes, series: Mapping[str, Any], index: int) -> None:
    x, y, low, high = series["x"], series["y"], series["low"], series["high"]
    colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
    line = {"label": series["label"], "color": colour}
    if len(x) > MARKED:
        axes.plot(x, y, linestyle=DASHES[index // len(COLOURS) % len(DASHES)], **line)
        if low:
            axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        return
    if low:
        axes.vlines(x, low, high, color=colour, linewidth=1)
    axes.plot(x, y, marker=marker, markersize=5, **line)


def _label_powers(axis: Axis, values: set[float]) -> None:
    """Plain numbers on a logarithmic axis: at the ``values`` measured where these are few."""
    few = 0 < len(values) <= MARKED
    axis.set_major_locator(FixedLocator(sorted(values)) if few else LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())
