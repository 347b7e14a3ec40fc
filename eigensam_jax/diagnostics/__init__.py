"""Diagnostics of a network: sharpness in its several senses, slices, checks."""

from eigensam_jax.diagnostics._balls import (
    WorstCase,
    average_sharpness,
    sam_sharpness,
    worst_case_sharpness,
)
from eigensam_jax.diagnostics._gradient import alignment, check_gradient
from eigensam_jax.diagnostics._report import Report, report
from eigensam_jax.diagnostics._sharpness import sharpness, sharpness_by_layer
from eigensam_jax.diagnostics._slice import LossSlice, filter_normalized, loss_slice

__all__ = [
    "LossSlice",
    "Report",
    "WorstCase",
    "alignment",
    "average_sharpness",
    "check_gradient",
    "filter_normalized",
    "loss_slice",
    "report",
    "sam_sharpness",
    "sharpness",
    "sharpness_by_layer",
    "worst_case_sharpness",
]
