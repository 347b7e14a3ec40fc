"""Sharpness-aware minimization for optax that follows the top Hessian eigenvector.

>>> import optax, eigensam_jax
>>> tx = optax.chain(eigensam_jax.eigen_sam(rho=0.05, alpha=0.5), optax.sgd(0.1))
"""

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from types import ModuleType as _ModuleType

from eigensam_jax import (
    diagnostics,
    eigen,
    hessian,
    perturbation,
    sde,
    trackers,
    tree_math,
)
from eigensam_jax._info import info
from eigensam_jax._periodic import periodic
from eigensam_jax.diagnostics import sharpness
from eigensam_jax.transform import asam, eigen_sam, sam

__version__ = _version("eigensam_jax")

__all__ = [
    "asam",
    "diagnostics",
    "eigen",
    "eigen_sam",
    "hessian",
    "info",
    "periodic",
    "perturbation",
    "sam",
    "sde",
    "sharpness",
    "trackers",
    "tree_math",
]


def __getattr__(name: str) -> _ModuleType:
    """Imports `linen`, `nnx` and `plotting`, for Flax and matplotlib, on first use."""
    if name in ("linen", "nnx", "plotting"):
        return _import_module(f"eigensam_jax.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
