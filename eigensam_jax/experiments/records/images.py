"""Plots as files, no larger than a page shows them."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

WIDTH = 1200  # pixels, at most
_DPI = 110
_COLOURS = 128  # of the palette


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as a PNG of few colours; the same figure gives the same bytes."""
    dpi = min(_DPI, WIDTH / figure.get_figwidth())
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=dpi, format="png")
    with Image.open(drawn) as image:
        few = image.convert("RGB").quantize(
            _COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE
        )
    few.save(path, format="png", optimize=True)


def band(
    axes: Axes, x: Sequence[float], values: np.ndarray, style: str, **line: Any
) -> None:
    """Draws the mean of the rows ± their standard deviation, of one row 0."""
    mean = values.mean(0)
    spread = values.std(0, ddof=1) if len(values) > 1 else 0 * mean
    low = mean - spread
    if axes.get_yscale() == "log":  # which has no place for what is below zero
        low = np.maximum(low, values.min(0))
    axes.plot(x, mean, style, **line)
    axes.fill_between(x, low, mean + spread, color=line["color"], alpha=0.15)
