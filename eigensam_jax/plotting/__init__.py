"""Plots of what the library returns, by matplotlib.

Each function draws on the axes that it is given, or on those of a new figure, and
returns them.
"""

try:
    import matplotlib.pyplot  # noqa: F401
except ImportError as error:
    raise ImportError(
        "eigensam_jax.plotting needs matplotlib: pip install matplotlib"
    ) from error

from eigensam_jax.plotting._slice import loss_slice
from eigensam_jax.plotting._spectra import sharpness_by_layer, spectral_density
from eigensam_jax.plotting._training import training

__all__ = ["loss_slice", "sharpness_by_layer", "spectral_density", "training"]
