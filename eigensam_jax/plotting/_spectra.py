"""Spectral densities, and the sharpness of each layer."""

import math
from collections.abc import Mapping

import numpy as np
from jax.typing import ArrayLike
from matplotlib.axes import Axes

from eigensam_jax import eigen
from eigensam_jax._update import arguments
from eigensam_jax.eigen import Eigenpair, SpectralDensity
from eigensam_jax.plotting import _panels as panels

_DECADES = 6  # of a density, where the height of a single eigenvalue is not known


def spectral_density(
    density: SpectralDensity,
    axes: Axes | None = None,
    *,
    eigenvalues: ArrayLike | Eigenpair | None = None,
    num_params: int | None = None,
    width: float | None = None,
) -> Axes:
    """Draws a spectral density as a smooth curve on a logarithmic axis.

    Args:
      density: what `eigen.spectral_density` returned.
      axes: where to draw; None for a new figure.
      eigenvalues: the top eigenvalues, marked above the curve: an array, or what
        `eigen.top_eigenpairs` returned.
      num_params: n, the number of eigenvalues. A line then shows how high the curve is
        at a single eigenvalue, (1/n)/(width·√(2π)): a lower peak is an error of the
        estimate.
      width: the standard deviation of the Gaussians of `eigen.smooth_density`. By
        default, 1/200 of the range of the eigenvalues.

    Returns:
      The axes.

    Raises:
      ValueError: for values that are traced or not finite, and a `width` or
        `num_params` that is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from eigensam_jax import eigen, plotting
      >>> spectrum = jnp.array([-1.0, 1.0, 1.0, 5.0])
      >>> density = eigen.spectral_density(lambda v: spectrum * v, spectrum)
      >>> axes = plotting.spectral_density(density, eigenvalues=[5.0], num_params=4)
      >>> axes.get_yscale()
      'log'
    """
    if num_params is not None:
        arguments.check_positive_int("num_params", num_params, "eigenvalues")
    nodes, weights = (panels.values("density", x).ravel() for x in density)
    is_there = ~(weights <= 0)  # NaN too, to be refused
    nodes, weights = nodes[is_there], weights[is_there]
    marks = getattr(
        eigenvalues, "eigenvalue", () if eigenvalues is None else eigenvalues
    )
    tops = panels.values("eigenvalues", marks).ravel()
    ends = np.concatenate([nodes, tops])
    known = np.isfinite([*ends, *weights])
    if not (len(nodes) and known.all()):
        raise ValueError(
            "density and eigenvalues must be finite, got "
            f"{np.sum(~known)} values that are not: a product with the "
            "matrix was not finite. Look at the loss and the parameters."
        )
    if width is None:
        width = (np.ptp(ends) or abs(ends[0]) or 1) / 200
    width = float(panels.values("width", width))
    low, high = ends.min() - 5 * width, ends.max() + 5 * width
    grid = np.union1d(np.linspace(low, high, 2000), nodes)  # no peak is missed
    curve = np.asarray(eigen.smooth_density(density, grid, width), float)
    bottom = curve.max() / 10**_DECADES
    if num_params is not None:
        floor = 1 / (num_params * width * math.sqrt(2 * math.pi))
        bottom = min(floor, curve.max()) / 5
    axes = panels.new(axes)
    axes.fill_between(grid, bottom, np.maximum(curve, bottom), color="C0", alpha=0.25)
    axes.plot(grid, curve, color="C0", label="density")
    if num_params is not None:
        label = f"height of one eigenvalue in {num_params:,}"
        axes.axhline(floor, color="0.3", linestyle="--", linewidth=1, label=label)
    if tops.size:
        heights = np.maximum(np.interp(tops, grid, curve), bottom)
        label = "top eigenvalue" if tops.size == 1 else f"top {tops.size} eigenvalues"
        axes.plot(tops, 1.6 * heights, "v", color="black", markersize=5, label=label)
    axes.set(
        xlabel="eigenvalue λ",
        ylabel="density of eigenvalues",
        yscale="log",
        xlim=(low, high),
        ylim=(bottom, 4 * curve.max()),
    )
    axes.yaxis.set_major_formatter(panels.plain)
    if tops.size or num_params is not None:
        axes.legend()
    return axes


def sharpness_by_layer(
    layers: Mapping[str, ArrayLike | Eigenpair], axes: Axes | None = None
) -> Axes:
    """Draws λ_max of each layer's block of the Hessian as a bar, the first on top.

    Args:
      layers: λ_max by the name of the layer: a number, or what `sharpness` returned
        with a `mask`, whose residual is then drawn as an error bar.
      axes: where to draw; None for a new figure.

    Returns:
      The axes.

    Raises:
      ValueError: for no layers, and values that are traced or no scalars.

    Example:
      >>> from eigensam_jax import plotting
      >>> axes = plotting.sharpness_by_layer({"hidden": 12.5, "out": 3.0})
      >>> [float(bar.get_width()) for bar in axes.patches]
      [12.5, 3.0]
    """
    what = "a dict of one λ_max or more by the names of the layers"
    valid = isinstance(layers, Mapping) and len(layers) > 0
    arguments.require(valid, "layers", layers, what)
    known = {}
    for name, x in layers.items():
        pair = (x.eigenvalue, x.residual) if isinstance(x, Eigenpair) else (x, np.nan)
        shape, remedy = np.shape(pair[0]), ": give a number, or what sharpness returned"
        what = f"the shape of layers[{name!r}]"
        arguments.require(shape == (), what, shape, "()", remedy)
        known[name] = panels.values(f"layers[{name!r}]", pair)
    widths, residuals = np.transpose([*known.values()])
    axes = panels.new(axes, 1 + 0.4 * len(known))
    bars = axes.barh([*known], widths, xerr=residuals, color="C0", capsize=3)
    axes.bar_label(bars, [f"{x:.3g}" for x in widths], padding=4)
    axes.margins(x=0.2, y=0.02)
    axes.invert_yaxis()
    axes.set_xlabel(r"$\lambda_{\max}$ of the layer's block of the Hessian")
    return axes
