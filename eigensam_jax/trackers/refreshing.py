"""Trackers that solve for the eigenvector now and then, and keep it in between."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from eigensam_jax import arguments, eigen, tree_math
from eigensam_jax.hessian import Matvec
from eigensam_jax.trackers.tracker import Tracker, TrackerState
from eigensam_jax.tree_math import PyTree


def power_iteration(
    num_iters: int = 5, update_interval: int = 100, seed: int = 0
) -> Tracker:
    """The paper's tracker: a few power iterations now and then.

    Every `update_interval` steps, the first of them at step 0, v ← Hv/‖Hv‖ is repeated
    `num_iters` times on the current batch, from the v of the last refresh; in between v
    is kept. λ = ⟨v′, Hv′⟩ and the residual ‖Hv′ − λv′‖ belong to v′, the input of the
    last product, so that they cost no product of their own. Before the first refresh v
    is a random unit vector, and λ and the residual are 0: let the first step refresh.

    Power iteration finds the eigenvalue that is largest in magnitude. Where that is
    negative, λ < 0 says so, and `eigen_sam` leaves v alone until the next refresh. A
    refresh that is not finite leaves v, λ and the residual as they were.

    Cost: `num_iters` Hessian-vector products every `update_interval` steps, and one
    vector as large as the parameters. With `due` None the refresh is a branch of
    `jax.lax.cond` that loops; with True it is written out straight, which is longer to
    compile, and on XLA's CPU backend many times faster for convolutions.

    Differences from the paper's code: the interval is counted over all of training,
    from step 0, and not within the epoch; λ is known; and v is in the state, so that a
    checkpoint keeps it.

    Args:
      num_iters: products per refresh, at least 1.
      update_interval: steps from one refresh to the next, at least 1.
      seed: seed of the random start.

    Returns:
      A `Tracker` whose state is an `eigen.Eigenpair`.

    Raises:
      ValueError: if `num_iters` or `update_interval` is less than 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from eigensam_jax import trackers
      >>> tracker = trackers.power_iteration(num_iters=20)
      >>> state = tracker.init(jnp.zeros(3))
      >>> spectrum = jnp.array([1.0, 2.0, 8.0])
      >>> state = tracker.refresh(state, lambda v: spectrum * v, jnp.int32(0), None)
      >>> float(state.eigenvalue), jnp.abs(state.eigenvector).round(5)
      (8.0, Array([0., 0., 1.], dtype=float32))
    """
    arguments.check_positive_int("num_iters", num_iters, "products per refresh")
    return _refreshing(eigen.power_iteration, num_iters, update_interval, seed)


def lanczos(num_matvecs: int = 5, update_interval: int = 100, seed: int = 0) -> Tracker:
    """A warm-started Lanczos iteration now and then: the top of indefinite spectra too.

    As `power_iteration`, with `eigen.lanczos` in its place: for the same number of
    products, the vector of the largest Rayleigh quotient in the whole Krylov space of
    the last v, and one free step beyond it. It finds the algebraically largest
    eigenvalue, so that negative curvature, however strong, does not lead it astray.
    λ and the residual belong to the maximiser before that free step.

    Cost: `num_matvecs` Hessian-vector products every `update_interval` steps, one
    vector as large as the parameters in the state, and `num_matvecs` + 3 of them during
    a refresh.

    Args:
      num_matvecs: products per refresh, at least 1.
      update_interval: steps from one refresh to the next, at least 1.
      seed: seed of the random start.

    Returns:
      A `Tracker` whose state is an `eigen.Eigenpair`.

    Raises:
      ValueError: if `num_matvecs` or `update_interval` is less than 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from eigensam_jax import trackers
      >>> tracker = trackers.lanczos(num_matvecs=3)
      >>> spectrum = jnp.array([-5.0, 1.0, 2.0])  # power iteration would find -5
      >>> state = tracker.init(spectrum)
      >>> state = tracker.refresh(state, lambda v: spectrum * v, jnp.int32(0), None)
      >>> print(f"{state.eigenvalue:.4f}", jnp.abs(state.eigenvector).round(3))
      2.0000 [0. 0. 1.]
    """
    arguments.check_positive_int("num_matvecs", num_matvecs, "products per refresh")
    return _refreshing(eigen.lanczos, num_matvecs, update_interval, seed)


def _refreshing(
    solve: Callable[..., eigen.Eigenpair],
    num_matvecs: int,
    update_interval: int,
    seed: int,
) -> Tracker:
    """A tracker that does `solve(matvec, v, num_matvecs)` every `update_interval`."""
    arguments.check_positive_int(
        "update_interval", update_interval, "steps from one refresh to the next"
    )

    def init(params: PyTree) -> eigen.Eigenpair:
        zeros = [jnp.zeros((), tree_math.accumulation_dtype(params)) for _ in range(2)]
        return eigen.Eigenpair(_random_unit_vector(seed, params), *zeros)

    def refresh(
        state: eigen.Eigenpair, matvec: Matvec, count: jax.Array, due: bool | None
    ) -> eigen.Eigenpair:
        def solved(pair: eigen.Eigenpair) -> eigen.Eigenpair:
            new = solve(matvec, pair.eigenvector, num_matvecs, unroll=due is True)
            finite = jnp.isfinite(new.eigenvalue) & jnp.isfinite(new.residual)
            return tree_math.where(finite, new, pair)

        if not jax.tree.leaves(state.eigenvector):
            return state
        if due is None:
            is_due = count % update_interval == 0
            state = jax.lax.cond(is_due, solved, lambda pair: pair, state)
        elif due:
            state = solved(state)
        return state

    return Tracker(init, refresh, _observe_nothing)


def _observe_nothing(
    state: TrackerState, perturbation: PyTree, gradient_change: PyTree, count: jax.Array
) -> TrackerState:
    del perturbation, gradient_change, count
    return state


def _random_unit_vector(seed: int, like: PyTree) -> PyTree:
    leaves, treedef = jax.tree.flatten(like)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    normal = [
        jax.random.normal(key, jnp.shape(x), tree_math.accumulation_dtype(x))
        for key, x in zip(keys, leaves, strict=True)
    ]
    # Added to zeros, the numbers are sharded as these.
    zeros, vector = tree_math.zeros_like(like), jax.tree.unflatten(treedef, normal)
    vector = jax.tree.map(jnp.add, zeros, vector)
    return tree_math.scale(tree_math.safe_inverse(tree_math.norm(vector)), vector)
