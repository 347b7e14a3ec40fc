"""Trackers: how the estimate of the top eigenvector is kept up to date between steps.

`eigen_sam` calls the three pure functions of a `Tracker` in this order:

    state = tracker.init(params)                                        # once
    state = tracker.refresh(state, matvec)                              # before ε
    state = tracker.observe(state, gradient_change, projection, radius)  # after it

The functions below return a `Tracker` and raise a ValueError for an invalid argument.
"""

from eigensam_jax.trackers._refreshing import EigenpairState, lanczos, power_iteration
from eigensam_jax.trackers._ritz import RitzState, ritz
from eigensam_jax.trackers._secant import SecantState, secant
from eigensam_jax.trackers._tracker import Tracker, TrackerState

__all__ = [
    "EigenpairState",
    "RitzState",
    "SecantState",
    "Tracker",
    "TrackerState",
    "lanczos",
    "power_iteration",
    "ritz",
    "secant",
]
