"""A tracker that solves for the eigenvector within a plane, by few exact products."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eigensam_jax import arguments, tree_math
from eigensam_jax.hessian import Matvec
from eigensam_jax.trackers.tracker import Tracker
from eigensam_jax.tree_math import PyTree


class RitzState(NamedTuple):
    """State of `ritz`.

    Attributes:
      eigenvector: v, a unit vector; zero before the first observation.
      eigenvalue: λ = ⟨v, Hv⟩ in the averaged Hessian; 0 before the first product.
      residual: ‖Hv − ⟨v, Hv⟩v‖ of the last product with v, on its one batch.
      companion: p, a unit vector orthogonal to v; zero before there is one.
      scatter: the averaged second moment of the unit differences in the basis (v, p),
        shape (2, 2).
      curvature: the averaged Hessian in the same basis, shape (2, 2).
      num_products: products so far, int32.
    """

    eigenvector: PyTree
    eigenvalue: jax.Array
    residual: jax.Array
    companion: PyTree
    scatter: jax.Array
    curvature: jax.Array
    num_products: jax.Array

    @property
    def usable(self) -> jax.Array:
        """Whether there may be a positive eigenvalue within the residual of λ."""
        return self.eigenvalue + self.residual >= 0


def ritz(update_interval: int = 20, decay: float = 0.98, gain: float = 0.2) -> Tracker:
    """Rayleigh–Ritz in a plane that follows the gradients: a product now and then.

    Two vectors are kept. On every step the plane that they span is turned towards the
    difference d = ∇L(w + ε) − ∇L(w) = Hε + O(ρ²), as in `secant`, but to its two top
    principal components, averaged with `decay`. These lie among the top eigenvectors,
    in an order that says as much of how gradients scatter as of the Hessian. So every
    `update_interval` steps the exact product of the Hessian with one of the two
    vectors, in turns, shows what the Hessian is within the plane. There it is a matrix
    of 2 × 2, averaged over batches; its top eigenvector is v. The product is a further
    difference to the plane, and counts as `gain` of all that the plane remembers.

    The first step is plain SAM; before the first product v is the top principal
    component. λ is an average over batches; the residual is that of the last product
    with v, on one batch. What is not finite leaves the state as it was.

    Two negative eigenvalues, each larger in magnitude than any positive one, can fill
    the plane. Then λ < 0 says so.

    Cost: one Hessian-vector product every `update_interval` steps, the first of them
    on step 0 and for nothing, as there is no v yet; two vectors as large as the
    parameters; and on every step two passes over the parameters, with both vectors and
    both gradients, and the eigenvectors of two tiny matrices. Under `jax.vmap` both
    sides of the branch run, so that every step pays for a product: there, use `secant`
    or fix `refresh`.

    Args:
      update_interval: steps from one product to the next, at least 1.
      decay: the memory of the plane, at least 0 and less than 1.
      gain: the weight of a new product, at least 0 and less than 1.

    Returns:
      A `Tracker` whose state is a `RitzState`.

    Raises:
      ValueError: for an `update_interval` less than 1, and for a `decay` or a `gain`
        outside [0, 1).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from eigensam_jax import trackers
      >>> tracker = trackers.ritz(update_interval=4)
      >>> spectrum = jnp.array([-5.0, 1.0, 2.0])
      >>> state = tracker.init(spectrum)
      >>> def step(state, noise_and_count):
      ...     noise, count = noise_and_count
      ...     state = tracker.refresh(state, lambda v: spectrum * v, count, None)
      ...     epsilon = noise + state.eigenvector
      ...     return tracker.observe(state, epsilon, spectrum * epsilon, count), None
      >>> noise = jax.random.normal(jax.random.key(0), (100, 3))
      >>> steps = (noise, jnp.arange(100))
      >>> state, _ = jax.lax.scan(step, tracker.init(spectrum), steps)
      >>> bool(jnp.abs(state.eigenvector[2]) > 0.9)
      True

    References:
      This project's own. Rayleigh–Ritz: Golub and Van Loan, "Matrix Computations", 4th
      edition, section 8.1, 2013.
    """
    arguments.check_positive_int(
        "update_interval", update_interval, "steps from one product to the next"
    )
    arguments.check_fraction("decay", decay)
    arguments.check_fraction("gain", gain)
    decay, gain = float(decay), float(gain)  # NumPy's would widen the state

    def init(params: PyTree) -> RitzState:
        dtype = tree_math.accumulation_dtype(params)
        v, p = (tree_math.zeros_like(params) for _ in range(2))
        eigenvalue, residual = (jnp.zeros((), dtype) for _ in range(2))
        scatter, curvature = (jnp.zeros((2, 2), dtype) for _ in range(2))
        count = jnp.zeros((), jnp.int32)
        return RitzState(v, eigenvalue, residual, p, scatter, curvature, count)

    def refresh(state: RitzState, matvec: Matvec) -> RitzState:
        v, p = state.eigenvector, state.companion
        turns, turn = state.num_products >> 1, state.num_products & 1
        turn = jnp.where(tree_math.vdot(p, p) > 0, turn, 0)
        x = tree_math.where(turn == 0, v, p)
        product = tree_math.cast_like(matvec(x), x)
        length = tree_math.norm(product)
        unit = tree_math.scale(tree_math.safe_inverse(length), product)
        along = length * jnp.stack(tree_math.vdots((v, unit), (p, unit)))
        cosine = jnp.minimum(jnp.abs(tree_math.safe_divide(along[0], length)), 1)
        residual = length * tree_math.safe_sqrt(1 - cosine**2)
        # Of the first products the mean; then an average with a memory.
        rate = jnp.maximum(gain, 1 / (1 + turns).astype(length.dtype))
        new = state._replace(
            residual=jnp.where(turn == 0, residual, state.residual),
            curvature=_averaged(state.curvature, turn, along, rate),
            num_products=state.num_products + 1,
        )
        usable = (length > 0) & jnp.isfinite(length)
        return tree_math.where(usable, _turned(new, unit, 1.0, gain), state)

    def observe(
        state: RitzState,
        gradient_change: PyTree,
        projection: jax.Array,
        radius: jax.Array,
    ) -> RitzState:
        del projection, radius
        return _turned(state, gradient_change, decay, 1 - decay)

    return Tracker(init, refresh, observe, update_interval)


def _averaged(
    curvature: jax.Array, turn: jax.Array, column: jax.Array, rate: jax.Array
) -> jax.Array:
    """`curvature` with a part `rate` of row and column `turn` replaced by `column`."""
    is_turn = jnp.arange(2) == turn
    seen = jnp.where(is_turn[None, :], column[:, None], column[None, :])
    known = is_turn[None, :] | is_turn[:, None]
    return jnp.where(known, curvature + rate * (seen - curvature), curvature)


def _turned(
    state: RitzState, difference: PyTree, keep: float, weight: float
) -> RitzState:
    """The plane turned towards `difference`, and v to the top eigenvector in it.

    With q the unit vector of what `difference` has outside the plane, everything is a
    matrix of 3 × 3 in the basis (v, p, q). A difference that is zero or not finite
    changes nothing.
    """
    with jax.default_matmul_precision("highest"):
        return _turned_precisely(state, difference, keep, weight)


def _turned_precisely(
    state: RitzState, difference: PyTree, keep: float, weight: float
) -> RitzState:
    v, p, x = state.eigenvector, state.companion, difference
    vv, vp, pp, vx, px, xx = tree_math.vdots(
        (v, v), (v, p), (p, p), (v, x), (p, x), (x, x)
    )
    # (v, p) times `basis` is orthonormal: else rounding would add up over the steps.
    scale_v = tree_math.safe_inverse(jnp.sqrt(vv))
    scale_p = tree_math.safe_inverse(jnp.sqrt(pp - (scale_v * vp) ** 2))
    basis = jnp.array([[scale_v, -scale_p * vp * scale_v**2], [0, scale_p]])
    scale_x = tree_math.safe_inverse(jnp.sqrt(xx))
    inside = scale_x * basis.T @ jnp.stack([vx, px])
    outside = 1 - jnp.sum(inside**2)
    rounding = 10 * np.finfo(outside.dtype).eps
    is_outside = outside > rounding
    outside = jnp.where(is_outside, jnp.sqrt(jnp.where(is_outside, outside, 1)), 0)

    coordinates = jnp.append(inside, outside)
    scatter = keep * jnp.pad(state.scatter, (0, 1))
    scatter += weight * jnp.outer(coordinates, coordinates)
    curvature = jnp.pad(state.curvature, (0, 1))
    usable = (scale_x > 0) & jnp.all(jnp.isfinite(scatter))
    plane = jnp.linalg.eigh(jnp.where(usable, scatter, 0))[1][:, :0:-1]
    # Before the first product, nothing but the scatter ranks the directions.
    ranked = jnp.where(jnp.any(curvature != 0), curvature, scatter)
    ranked = jnp.where(usable, plane.T @ ranked @ plane, 0)
    axes = plane @ jnp.linalg.eigh(ranked)[1][:, ::-1]  # (v, p) in (v, p, q)
    # Eigenvectors have no sign of their own: they keep the one they had, or take x's.
    known = jnp.stack([scale_v, scale_p]) > 0
    kept = jnp.where(known, jnp.diagonal(axes), axes[2])
    axes = jnp.where(kept < 0, -axes, axes)

    on_x = axes[2] * tree_math.safe_inverse(outside)
    on_v, on_p = basis @ (axes[:2] - jnp.outer(inside, on_x))
    on_x *= scale_x
    new_v, new_p = (
        tree_math.add_scaled(
            tree_math.add_scaled(tree_math.scale(on_v[i], v), on_p[i], p), on_x[i], x
        )
        for i in range(2)
    )
    # What is known of the curvature turns with the plane, and is not projected: that
    # would shrink it a little on every step.
    turn = _nearest_rotation(axes[:2])
    curvature = turn.T @ state.curvature @ turn
    new = state._replace(
        eigenvector=new_v,
        eigenvalue=curvature[0, 0],
        companion=new_p,
        scatter=axes.T @ scatter @ axes,
        curvature=curvature,
    )
    return tree_math.where(usable, new, state)


def _nearest_rotation(matrix: jax.Array) -> jax.Array:
    """The orthogonal matrix nearest to one of 2 × 2; the identity for zero."""
    (a, b), (c, d) = matrix
    sign = jnp.where(a * d < b * c, -1, 1)
    both = matrix + sign * jnp.array([[d, -c], [-b, a]])
    length = jnp.sqrt(jnp.abs(jnp.linalg.det(both)))
    is_zero = length == 0
    return jnp.where(
        is_zero, jnp.eye(2, dtype=both.dtype), both / jnp.where(is_zero, 1, length)
    )
