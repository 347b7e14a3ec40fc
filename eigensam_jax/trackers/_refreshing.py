"""Trackers that solve for the eigenvector at intervals and keep it in between."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eigensam_jax import eigen, tree_math
from eigensam_jax._update import arguments, rounding
from eigensam_jax.hessian import Matvec
from eigensam_jax.trackers._tracker import Tracker, unchanged
from eigensam_jax.tree_math import PyTree


class EigenpairState(NamedTuple):
    """State of `power_iteration` and `lanczos`, all zero before the first refresh.

    Attributes:
      eigenvector: v, a unit vector.
      eigenvalue: λ, a Rayleigh quotient.
      residual: ‖Hv − λv‖.
    """

    eigenvector: PyTree
    eigenvalue: jax.Array
    residual: jax.Array

    @property
    def usable(self) -> jax.Array:
        """Whether a non-negative eigenvalue can lie within the residual of λ."""
        return self.eigenvalue + self.residual >= 0


def power_iteration(
    num_matvecs: int = 5, update_interval: int = 100, seed: int = 0
) -> Tracker:
    """The paper's tracker: a few power iterations at intervals.

    At step 0 and every `update_interval` steps, v ← Hv/‖Hv‖ is repeated `num_matvecs`
    times on the current batch. It starts from the last v, the first time from a random
    one. It finds the eigenvalue of largest magnitude. If that is certainly negative,
    λ + residual < 0, `eigen_sam` leaves v out until the next refresh. A refresh that is
    non-finite, or of a zero Hessian, leaves the state unchanged. v is 0 until one
    succeeds. The state is an `EigenpairState`, with one vector like the parameters.

    Args:
      num_matvecs: Hessian-vector products per refresh, at least 1.
      update_interval: steps from one refresh to the next, at least 1.
      seed: seed of the random start.

    Example:
      >>> import eigensam_jax, jax.numpy as jnp
      >>> tracker = eigensam_jax.trackers.power_iteration(num_matvecs=20)
      >>> spectrum = jnp.array([1.0, 2.0, 8.0])
      >>> state = tracker.refresh(tracker.init(spectrum), lambda v: spectrum * v)
      >>> float(state.eigenvalue), jnp.abs(state.eigenvector).round(5)
      (8.0, Array([0., 0., 1.], dtype=float32))
    """
    return _refreshing(eigen.power_iteration, num_matvecs, update_interval, seed)


def lanczos(num_matvecs: int = 5, update_interval: int = 100, seed: int = 0) -> Tracker:
    """A warm-started Lanczos iteration at intervals, also for indefinite Hessians.

    As `power_iteration`, with `eigen.lanczos` in its place. It takes the best vector of
    the Krylov space of the last v, for the same number of products. It finds the
    algebraically largest eigenvalue, also beside strong negative curvature. A refresh
    needs `num_matvecs` + 3 vectors.

    Args:
      num_matvecs, update_interval, seed: as in `power_iteration`.

    Example:
      >>> import eigensam_jax, jax.numpy as jnp
      >>> tracker = eigensam_jax.trackers.lanczos(num_matvecs=3)
      >>> spectrum = jnp.array([-5.0, 1.0, 2.0])  # power iteration would find -5
      >>> state = tracker.refresh(tracker.init(spectrum), lambda v: spectrum * v)
      >>> print(f"{state.eigenvalue:.4f}")
      2.0000
    """
    return _refreshing(eigen.lanczos, num_matvecs, update_interval, seed)


def _refreshing(
    solve: Callable[..., eigen.Eigenpair],
    num_matvecs: int,
    update_interval: int,
    seed: int,
) -> Tracker:
    between = "steps from one refresh to the next"
    arguments.check_positive_int("num_matvecs", num_matvecs, "products per refresh")
    arguments.check_positive_int("update_interval", update_interval, between)
    is_int = isinstance(seed, int | np.integer) and -(2**31) <= seed < 2**31
    arguments.require(is_int, "seed", seed, "an integer of 32 bits", ": give 0")

    def init(params: PyTree) -> EigenpairState:
        zeros = [jnp.zeros((), tree_math.accumulation_dtype(params)) for _ in range(2)]
        return EigenpairState(tree_math.zeros_like(params), *zeros)

    def refresh(state: EigenpairState, matvec: Matvec) -> EigenpairState:
        v = state.eigenvector
        is_first = (state.eigenvalue == 0) & (state.residual == 0)
        spread = rounding.spread_like(v, seed + (~is_first).astype(jnp.int32))
        start = tree_math.where(is_first, spread, v)
        is_traced = isinstance(state.eigenvalue, jax.core.Tracer)
        unroll = getattr(matvec, "unroll", False) or not is_traced
        new = EigenpairState(*solve(matvec, start, num_matvecs, unroll=unroll))
        # A zero Hessian has no top eigenvector.
        found = (new.eigenvalue != 0) | (new.residual > 0)
        found &= jnp.isfinite(new.eigenvalue) & jnp.isfinite(new.residual)
        return tree_math.where(found, new, state)

    return Tracker(init, refresh, unchanged, update_interval, None)
