"""What to look at beside training: sharpness, alignment, a check of the gradient."""

from eigensam_jax.diagnostics._gradient import alignment, check_gradient
from eigensam_jax.diagnostics._sharpness import sharpness

__all__ = ["alignment", "check_gradient", "sharpness"]
