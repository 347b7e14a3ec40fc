"""The plot of what `eigensam spectrum` found."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from eigensam_jax import eigen
from eigensam_jax.experiments.records import images


def spectrum(document: Mapping[str, Any], title: str, path: Path) -> None:
    """Draws the spectral density of a results file, and its top eigenvalues below it.

    Each eigenvalue is 1/n of the density: a Gaussian of that height is the least that
    is drawn.
    """
    (run,) = document["runs"]
    nodes, weights = (np.asarray(run[key]) for key in ("nodes", "weights"))
    eigenvalues = run["eigenvalues"]
    low, high = nodes.min(), max(nodes.max(), eigenvalues[0])
    width = (high - low) / 200
    grid = np.linspace(low - 5 * width, high + 5 * width, 2000)
    density = eigen.SpectralDensity(jnp.asarray(nodes), jnp.asarray(weights))
    curve = np.asarray(eigen.smooth_density(density, grid, width))
    single = 1 / (run["parameters"] * width * np.sqrt(2 * np.pi))
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.fill_between(
        grid, single / 100, curve, color="#1f77b4", alpha=0.3, linewidth=0
    )
    axes.plot(grid, curve, color="#1f77b4", linewidth=1)
    axes.plot(
        eigenvalues,
        [single / 10] * len(eigenvalues),
        "|",
        color="#d62728",
        markersize=14,
        label=f"top {len(eigenvalues)} eigenvalues",
    )
    axes.axhline(
        single,
        color="#7f7f7f",
        linewidth=0.8,
        linestyle=":",
        label="height of a single eigenvalue",
    )
    axes.set(
        title=title,
        xlabel="eigenvalue λ of the Hessian of the training loss",
        ylabel="density",
        yscale="log",
        ylim=(single / 30, 3 * curve.max()),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    images.save(figure, path)
