"""Eigen-solvers that need a matrix H only as products with vectors.

They raise a ValueError for an invalid argument.
"""

from eigensam_jax.eigen._density import (
    SpectralDensity,
    smooth_density,
    spectral_density,
)
from eigensam_jax.eigen._solvers import (
    Eigenpair,
    lanczos,
    power_iteration,
    top_eigenpairs,
)
from eigensam_jax.eigen._trace import Estimate, diagonal, trace

__all__ = [
    "Eigenpair",
    "Estimate",
    "SpectralDensity",
    "diagonal",
    "lanczos",
    "power_iteration",
    "smooth_density",
    "spectral_density",
    "top_eigenpairs",
    "trace",
]
