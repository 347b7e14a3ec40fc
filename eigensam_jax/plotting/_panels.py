"""What all plots share: axes, ticks, and the numbers to draw."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from eigensam_jax._update import programs


def new(axes: Axes | None, height: float = 4.2) -> Axes:
    """`axes`, or those of a new figure, `height` inches high, for None."""
    if axes is None:
        axes = plt.figure(figsize=(6.4, height), layout="constrained").subplots()
    return axes


def plain(x: float, position: float | None = None) -> str:
    """A tick's number, with an exponent only where it is very large or small."""
    return f"{x:g}"


def spans_decades(values: np.ndarray) -> bool:
    """Whether to draw these on a logarithmic axis: two decades, none below zero."""
    known = values[np.isfinite(values) & (values != 0)]
    return bool(known.size and 0 < 100 * known.min() <= known.max())


def values(name: str, value: Any) -> np.ndarray:
    """`value` in float64, if it is known."""
    if programs.is_traced(value):
        raise ValueError(
            f"{name} must be known to be drawn, got traced arrays: plot outside jit, "
            "from what the jitted function returns."
        )
    return np.asarray(value, float)
