"""What to look at beside training: sharpness, alignment, slices, the gradient."""

from eigensam_jax.diagnostics._gradient import alignment, check_gradient
from eigensam_jax.diagnostics._sharpness import sharpness
from eigensam_jax.diagnostics._slice import LossSlice, filter_normalized, loss_slice

__all__ = [
    "LossSlice",
    "alignment",
    "check_gradient",
    "filter_normalized",
    "loss_slice",
    "sharpness",
]
