"""What keeps the estimate of the top eigenvector up to date between steps.

A `Tracker` is three pure functions around a state, called by `eigen_sam` in this order:

    state = tracker.init(params)                                # once
    state = tracker.refresh(state, matvec, count, due)          # before ε is made
    state = tracker.observe(state, perturbation, gradient_change, count)    # after

`observe` on every `tracker.observe_interval` steps.

A state is a NamedTuple of arrays with the fields `eigenvector`, `eigenvalue` and
`residual` of an `eigensam_jax.eigen.Eigenpair`, and whatever else the tracker carries;
its structure, shapes and dtypes never change. `eigen_sam` adds nothing along the
eigenvector while `eigenvalue` is negative.
"""

from eigensam_jax.trackers.averaging import SecantState, secant
from eigensam_jax.trackers.plane import RitzState, ritz
from eigensam_jax.trackers.refreshing import lanczos, power_iteration
from eigensam_jax.trackers.tracker import Tracker, TrackerState

__all__ = [
    "RitzState",
    "SecantState",
    "Tracker",
    "TrackerState",
    "lanczos",
    "power_iteration",
    "ritz",
    "secant",
]
