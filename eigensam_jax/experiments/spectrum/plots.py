"""The plot of what `eigensam spectrum` found."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from eigensam_jax import eigen, plotting
from eigensam_jax.experiments.records import images


def spectrum(document: Mapping[str, Any], title: str, path: Path) -> None:
    """Draws the spectral density of a results file, and its top eigenvalues."""
    (run,) = document["runs"]
    nodes, weights = (jnp.asarray(run[key]) for key in ("nodes", "weights"))
    figure, ((axes,),) = images.panels(1, 1, 4.5, title)
    plotting.spectral_density(
        eigen.SpectralDensity(nodes, weights),
        axes,
        eigenvalues=run["eigenvalues"],
        num_params=run["parameters"],
    )
    axes.set(xlabel="eigenvalue λ of the Hessian of the training loss")
    images.save(figure, path)
