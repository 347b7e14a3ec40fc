"""Plots as files, no larger than a page shows them."""

import io
from pathlib import Path

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
