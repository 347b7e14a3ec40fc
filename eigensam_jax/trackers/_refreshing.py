"""Trackers that solve for the eigenvector now and then, and keep it in between."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

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
        """Whether there may be a positive eigenvalue within the residual of λ."""
        return self.eigenvalue + self.residual >= 0


def power_iteration(
    num_matvecs: int = 5, update_interval: int = 100, seed: int = 0
) -> Tracker:
    """The paper's tracker: a few power iterations now and then.

    Every `update_interval` steps, the first of them at step 0, v ← Hv/‖Hv‖ is repeated
    `num_matvecs` times on the current batch, from the v of the last refresh, the first
    time from a random one: see `eigen.power_iteration`.

    Power iteration finds the eigenvalue that is largest in magnitude. Some eigenvalue
    lies within the residual r of λ: where λ + r < 0 it is certainly negative, and
    `eigen_sam` leaves v out until the next refresh. A refresh that is not finite, or of
    a Hessian that is zero, leaves the state unchanged. Until one has succeeded, v is 0
    and the step is that of `sam`.

    Cost: `num_matvecs` Hessian-vector products every `update_interval` steps, and one
    vector as large as the parameters.

    Differences from the paper's code: see `eigensam_jax.eigen_sam`.

    Args:
      num_matvecs: products per refresh, at least 1.
      update_interval: steps from one refresh to the next, at least 1.
      seed: seed of the random start.

    Returns:
      A `Tracker` whose state is an `EigenpairState`.

    Raises:
      ValueError: if `num_matvecs` or `update_interval` is less than 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from eigensam_jax import trackers
      >>> tracker = trackers.power_iteration(num_matvecs=20)
      >>> state = tracker.init(jnp.zeros(3))
      >>> spectrum = jnp.array([1.0, 2.0, 8.0])
      >>> state = tracker.refresh(state, lambda v: spectrum * v)
      >>> float(state.eigenvalue), jnp.abs(state.eigenvector).round(5)
      (8.0, Array([0., 0., 1.], dtype=float32))
    """
    return _refreshing(eigen.power_iteration, num_matvecs, update_interval, seed)


def lanczos(num_matvecs: int = 5, update_interval: int = 100, seed: int = 0) -> Tracker:
    """A warm-started Lanczos iteration now and then: the top of indefinite spectra too.

    As `power_iteration`, with `eigen.lanczos` in its place: for the same number of
    products, the vector of the largest Rayleigh quotient in the whole Krylov space of
    the last v. It finds the algebraically largest eigenvalue, so that negative
    curvature, however strong, does not lead it astray.

    Cost: as `power_iteration`, and `num_matvecs` + 3 vectors during a refresh.

    Args:
      num_matvecs, update_interval, seed: as in `power_iteration`.

    Returns:
      A `Tracker` whose state is an `EigenpairState`.

    Raises:
      ValueError: as `power_iteration`.

    Example:
      >>> import jax.numpy as jnp
      >>> from eigensam_jax import trackers
      >>> tracker = trackers.lanczos(num_matvecs=3)
      >>> spectrum = jnp.array([-5.0, 1.0, 2.0])  # power iteration would find -5
      >>> state = tracker.init(spectrum)
      >>> state = tracker.refresh(state, lambda v: spectrum * v)
      >>> print(f"{state.eigenvalue:.4f}", jnp.abs(state.eigenvector).round(3))
      2.0000 [0. 0. 1.]
    """
    return _refreshing(eigen.lanczos, num_matvecs, update_interval, seed)


def _refreshing(
    solve: Callable[..., eigen.Eigenpair],
    num_matvecs: int,
    update_interval: int,
    seed: int,
) -> Tracker:
    """A tracker that does `solve(matvec, v, num_matvecs)` every `update_interval`."""
    between = "steps from one refresh to the next"
    arguments.check_positive_int("num_matvecs", num_matvecs, "products per refresh")
    arguments.check_positive_int("update_interval", update_interval, between)

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
        # Of a Hessian that is zero there is no top eigenvector.
        found = (new.eigenvalue != 0) | (new.residual > 0)
        found &= jnp.isfinite(new.eigenvalue) & jnp.isfinite(new.residual)
        return tree_math.where(found, new, state)

    return Tracker(init, refresh, unchanged, update_interval, None)
