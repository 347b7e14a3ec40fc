"""The loss on a line or in a plane."""

import numpy as np
from matplotlib import colors, ticker
from matplotlib.axes import Axes

from eigensam_jax._update import arguments
from eigensam_jax.diagnostics import LossSlice
from eigensam_jax.plotting import _panels as panels


def loss_slice(slice: LossSlice, axes: Axes | None = None) -> Axes:
    """Draws a loss along a line, or in a plane with the path of training.

    A plane is drawn as filled contours, with a colour bar, on a logarithmic scale where
    the loss spans two decades or more. w is at the origin. On a line, no path is drawn.

    Args:
      slice: what `diagnostics.loss_slice` returned.
      axes: where to draw; None for a new figure.

    Returns:
      The axes.

    Raises:
      ValueError: for values that are traced or nowhere finite, and for a single
        distance along a direction.

    Example:
      >>> import jax.numpy as jnp
      >>> from eigensam_jax import diagnostics, plotting
      >>> f, w = (lambda w: jnp.sum(w**2)), jnp.ones(3)
      >>> along = [jnp.linspace(-1, 1, 21)]
      >>> slice = diagnostics.loss_slice(f, w, [jnp.array([1.0, 0.0, 0.0])], along)
      >>> plotting.loss_slice(slice).get_ylabel()
      'loss'
    """
    distances = [panels.values("slice.distances", x) for x in slice.distances]
    values = panels.values("slice.values", slice.values)
    known = values[np.isfinite(values)]
    if not known.size:
        raise ValueError(
            "slice.values must be finite somewhere, got none that is: take a slice at "
            "smaller distances."
        )
    shape, remedy = values.shape, ": give diagnostics.loss_slice more distances"
    enough = min(shape) > 1
    arguments.require(enough, "the shape of slice.values", shape, "2 or more", remedy)
    axes = panels.new(axes)
    if len(distances) == 1:
        axes.plot(distances[0], values, marker="o" if values.size < 30 else "")
        axes.axvline(0, color="0.6", linestyle=":", linewidth=1)
        axes.set(xlabel="distance along the direction", ylabel="loss")
        return axes
    is_log = panels.spans_decades(known) and known.min() > 0
    ends = known.min(), known.max()
    space = np.geomspace if is_log else np.linspace
    shown = axes.contourf(
        *distances,
        np.ma.masked_invalid(values).T,
        levels=space(*ends, 25) if ends[0] < ends[1] else None,
        norm=colors.LogNorm() if is_log else None,
    )
    bar = axes.figure.colorbar(shown, ax=axes, label="loss", format=panels.plain)
    bar.locator = (
        ticker.LogLocator() if is_log else ticker.MaxNLocator(6, steps=[1, 2, 5, 10])
    )
    if slice.path is not None:
        x, y = panels.values("slice.path", slice.path).T
        axes.plot(x, y, color="white", linewidth=4)
        axes.plot(x, y, ".-", color="black", label="path of training")
        axes.plot(x[-1:], y[-1:], "*", color="black", markersize=12, label="its end")
        axes.legend()
    axes.set(
        xlabel="distance along the first direction",
        ylabel="distance along the second direction",
    )
    return axes
