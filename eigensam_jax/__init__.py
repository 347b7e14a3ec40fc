"""Sharpness-aware minimization for optax that follows the top Hessian eigenvector.

>>> import optax, eigensam_jax
>>> tx = optax.chain(eigensam_jax.eigen_sam(rho=0.05, alpha=0.2), optax.sgd(0.1))
"""

from importlib.metadata import version as _version

from eigensam_jax import (
    diagnostics,
    eigen,
    hessian,
    perturbation,
    sde,
    trackers,
    tree_math,
)
from eigensam_jax.diagnostics import sharpness
from eigensam_jax.transform import asam, eigen_sam, sam

__version__ = _version("eigensam_jax")

__all__ = [
    "asam",
    "diagnostics",
    "eigen",
    "eigen_sam",
    "hessian",
    "perturbation",
    "sam",
    "sde",
    "sharpness",
    "trackers",
    "tree_math",
]
