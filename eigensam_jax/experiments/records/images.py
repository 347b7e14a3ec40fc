"""Plots as files, no larger than a page shows them, and what they share."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from PIL import Image

from eigensam_jax.experiments.records.tables import half_interval

WIDTH = 1200  # pixels
_INCHES = 9  # what is 10 points high is 18 pixels, and 9 at half the size
_COLOURS = 192  # of the palette

Look = Mapping[str, Any]  # label, color and marker


def panels(
    rows: int, columns: int, height: float, title: str, note: str = "", **shared: Any
) -> tuple[Figure, Any]:
    """A figure with panels, a title, and below it what its marks mean."""
    figure = Figure(figsize=(_INCHES, height), layout="constrained")
    text = "\n".join(filter(None, (title, note)))
    figure.suptitle(text, x=0.01, ha="left", fontsize="medium")
    grid = figure.subplots(rows, columns, squeeze=False, **shared)
    for axes in grid.flat:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    return figure, grid


def legend(figure: Figure, columns: int = 4) -> None:
    """Names below all panels what has a label in any, once, in so many columns."""
    named: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    lines = -(-len(named) // columns)
    figure.legend(
        *(named.values(), named.keys()),
        loc="outside lower center",
        ncols=-(-len(named) // lines),
        frameon=False,
    )


def by_decades(axes: Axes, name: str) -> None:
    """Makes "x" or "y" logarithmic where lines span a decade; its ticks are plain."""
    axis: Axis = getattr(axes, f"{name}axis")
    values = [getattr(line, f"get_{name}data")() for line in axes.lines]
    low, high = np.min(np.hstack(values)), np.max(np.hstack(values))
    if not 0 < 10 * low <= high:
        return
    axes.set(**{f"{name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def rows(axes: Axes, found: Sequence[tuple[np.ndarray, Look]]) -> None:
    """Draws a mean over seeds with its 95% interval a row, the first on top."""
    for place, (values, look) in enumerate(found):
        style = {"fmt": look["marker"], "color": look["color"], "capsize": 3}
        axes.errorbar(values.mean(), place, xerr=half_interval(values), **style)
    axes.set_yticks(range(len(found)), [look["label"] for _, look in found])
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.ticklabel_format(axis="x", style="plain", useOffset=False)


def band(
    axes: Axes, x: Sequence[float], middle: np.ndarray, half: Any, **line: Any
) -> None:
    """Draws a line, and a band of `half` on both sides: one, or below and above."""
    below, above = half if isinstance(half, tuple) else (half, half)
    axes.plot(x, middle, markersize=5, **line)
    axes.fill_between(
        *(x, middle - below, middle + above),
        color=line["color"],
        alpha=0.15,
        linewidth=0,
    )


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as a PNG of few colours; the same figure gives the same bytes."""
    for axes in figure.axes:
        axes.title.set_fontsize("medium")
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=WIDTH / figure.get_figwidth(), format="png")
    with Image.open(drawn) as image:
        few = image.convert("RGB").quantize(
            _COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
        )
    few.save(path, format="png", optimize=True)
