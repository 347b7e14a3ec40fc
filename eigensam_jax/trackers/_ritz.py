"""A tracker that solves for the eigenvector within a plane, by few exact products."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eigensam_jax import tree_math
from eigensam_jax._update import arguments, scalars
from eigensam_jax.eigen import _krylov
from eigensam_jax.hessian import Matvec
from eigensam_jax.trackers._tracker import Tracker
from eigensam_jax.tree_math import PyTree


class RitzState(NamedTuple):
    """State of `ritz`.

    Attributes:
      eigenvector: v, a unit vector; zero before the first observation.
      eigenvalue: λ = ⟨v, Hv⟩ in the averaged Hessian; 0 before the first product.
      residual: ‖Hv − ⟨v, Hv⟩v‖ at the last product with v, of one batch.
      companion: p, a unit vector orthogonal to v; zero until there is one.
      scatter: averaged second moment of the unit differences in (v, p), 2 × 2.
      curvature: averaged Hessian in (v, p), 2 × 2.
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
        """Whether a non-negative eigenvalue can lie within the residual of λ."""
        return self.eigenvalue + self.residual >= 0


def ritz(update_interval: int = 20, decay: float = 0.98, gain: float = 0.2) -> Tracker:
    """Rayleigh–Ritz in a plane that follows the gradients; this project's own tracker.

    The plane is spanned by the two top principal components of
    d = ∇L(w + ε) − ∇L(w) ≈ Hε, averaged over the steps. They lie among the top
    eigenvectors, but their order also depends on how gradients scatter. So every
    `update_interval` steps the Hessian is multiplied by one of the two, in turns. The
    products are averaged into a 2 × 2 matrix, the Hessian within the plane. Its top
    eigenvector is v; before the first product, v is the top component. The state is a
    `RitzState`.

    The first step is plain SAM. Non-finite values leave the state unchanged. A product
    counts for at most three times the curvature known, so that a strong batch is soon
    forgotten, and a lasting rise is followed by a factor of 1.4 a product. Two
    negative eigenvalues, each larger in magnitude than every positive one, can fill the
    plane. Then λ + residual < 0 and `eigen_sam` leaves v out. Derivatives do not pass
    through axes whose eigenvalues agree up to rounding.

    Cost: a Hessian-vector product every `update_interval` steps (that of step 0 is
    wasted, as there is no v yet), two vectors like the parameters, and eleven more
    passes over them per step than `secant`. Under `jax.vmap` both sides of the branch
    run, so every step pays for a product: fix `refresh` there, or use `secant`.

    Args:
      update_interval: steps from one product to the next, at least 1.
      decay: the memory of the plane, in [0, 1).
      gain: the weight of a new product, in [0, 1); the first few are averaged.

    Example:
      >>> import eigensam_jax, jax, jax.numpy as jnp
      >>> tracker, spectrum = eigensam_jax.trackers.ritz(), jnp.array([-5.0, 1.0, 2.0])
      >>> def step(state, noise):
      ...     state = tracker.refresh(state, lambda v: spectrum * v)
      ...     change = spectrum * (noise + state.eigenvector)
      ...     return tracker.observe(state, change, projection=None, radius=None), None
      >>> noise = jax.random.normal(jax.random.key(0), (100, 3))
      >>> state, _ = jax.lax.scan(step, tracker.init(spectrum), noise)
      >>> bool(jnp.abs(state.eigenvector[2]) > 0.9)
      True

    References:
      Golub and Van Loan, "Matrix Computations", 4th edition, 2013, section 8.1.
    """
    between = "steps from one product to the next"
    arguments.check_positive_int("update_interval", update_interval, between)
    arguments.check_fraction("decay", decay)
    arguments.check_fraction("gain", gain)
    decay, gain = float(decay), float(gain)  # NumPy's numbers would widen the state

    def init(params: PyTree) -> RitzState:
        dtype = tree_math.accumulation_dtype(params)
        v, p = (tree_math.zeros_like(params) for _ in range(2))
        value, residual = (jnp.zeros((), dtype) for _ in range(2))
        scatter, curvature = (jnp.zeros((2, 2), dtype) for _ in range(2))
        count = jnp.zeros((), jnp.int32)
        return RitzState(v, value, residual, p, scatter, curvature, count)

    def refresh(state: RitzState, matvec: Matvec) -> RitzState:
        v, p = state.eigenvector, state.companion
        turns, turn = state.num_products >> 1, state.num_products & 1
        turn = jnp.where(tree_math.vdot(p, p) > 0, turn, 0)
        product = matvec(tree_math.where(turn == 0, v, p))
        unit, length = tree_math.unit(product)
        cosines = jnp.stack(tree_math.vdots((v, unit), (p, unit)))
        sine = scalars.safe_sqrt(1 - cosines[0] ** 2)
        usable = (length > 0) & jnp.isfinite(length)
        # The mean of the first products, then an exponential average.
        rate = jnp.maximum(gain, 1 / (1 + turns).astype(length.dtype))
        # By how much one batch counts. A rise of all curvature keeps the order of v and
        # p, as each has its own limit.
        known = jnp.abs(state.curvature)
        most = jnp.maximum(3 * known[turn].max(), 2 * known.max())
        length = jnp.where(most > 0, jnp.minimum(length, most), length)
        residual = jnp.where(turn == 0, length * sine, state.residual)
        curvature = _averaged(state.curvature, turn, length * cosines, rate)
        new = (curvature[0, 0], residual, curvature, state.num_products + 1)
        old = (state.eigenvalue, state.residual, state.curvature, state.num_products)
        value, residual, curvature, count = tree_math.where(usable, new, old)
        return RitzState(v, value, residual, p, state.scatter, curvature, count)

    def observe(
        state: RitzState,
        gradient_change: PyTree,
        projection: jax.Array,
        radius: jax.Array,
    ) -> RitzState:
        del projection, radius
        with jax.default_matmul_precision("highest"):
            return _turned(state, gradient_change, decay)

    return Tracker(init, refresh, observe, update_interval)


def _averaged(
    curvature: jax.Array, turn: jax.Array, column: jax.Array, rate: jax.Array
) -> jax.Array:
    """`curvature`, with row and column `turn` averaged towards `column` by `rate`."""
    is_turn = jnp.arange(2, dtype=turn.dtype) == turn
    seen = jnp.where(is_turn[None, :], column[:, None], column[None, :])
    known = is_turn[None, :] | is_turn[:, None]
    return jnp.where(known, curvature + rate * (seen - curvature), curvature)


def _turned(state: RitzState, difference: PyTree, decay: float) -> RitzState:
    """The state after `difference`, computed in (v, p, q) with q orthogonal to both."""
    v, p, x = state.eigenvector, state.companion, difference
    vv, vp, pp, vx, px, xx = tree_math.vdots(
        (v, v), (v, p), (p, p), (v, x), (p, x), (x, x)
    )
    # (v, p) times `basis` is orthonormal, so that rounding does not add up.
    scale_v, scale_x = scalars.safe_rsqrt(jnp.stack([vv, xx]))
    scale_p = scalars.safe_rsqrt(pp - (scale_v * vp) ** 2)
    entries = [scale_v, -scale_p * vp * scale_v**2, 0 * vp, scale_p]
    basis = jnp.stack(entries).reshape(2, 2)
    inside = scale_x * jnp.stack([vx, px]) @ basis
    outside = 1 - jnp.sum(inside**2)
    rounding = 10 * np.finfo(outside.dtype).eps
    outside = scalars.safe_sqrt(jnp.where(outside > rounding, outside, 0))

    coordinates = jnp.append(inside, outside)
    scatter = decay * jnp.pad(state.scatter, (0, 1))
    scatter += (1 - decay) * jnp.outer(coordinates, coordinates)
    usable = (scale_x > 0) & jnp.all(jnp.isfinite(scatter))
    plane = _krylov.eigh(jnp.where(usable, scatter, 0))[1][:, :0:-1]
    # Before the first product only the scatter ranks the directions.
    curvature = jnp.pad(state.curvature, (0, 1))
    ranked = jnp.where(state.num_products > 0, curvature, scatter)
    ranked = jnp.where(usable, plane.T @ ranked @ plane, 0)
    axes = plane @ _krylov.eigh(ranked)[1][:, ::-1]  # (v, p) in (v, p, q)
    # Eigenvectors have no sign of their own: keep the old one, or take x's.
    known = jnp.stack([scale_v, scale_p]) > 0
    kept = jnp.where(known, jnp.diagonal(axes), axes[2])
    axes = jnp.where(kept < 0, -axes, axes)

    on_x = axes[2] * tree_math.safe_inverse(outside)
    on_vp = basis @ (axes[:2] - jnp.outer(inside, on_x))
    # Row by row, the weights of v, p and x in the new v and the new p.
    weights = jnp.concatenate([on_vp, scale_x * on_x[None]]).T
    weights = jnp.where(usable, weights, jnp.eye(2, 3, dtype=weights.dtype))
    rows = scalars.once(*weights.ravel()).reshape(2, 3)

    def combined(row: jax.Array, old: PyTree) -> PyTree:
        return jax.tree.map(
            lambda o, *vectors: jnp.where(
                usable, sum(w * u for w, u in zip(row, vectors, strict=True)), o
            ),
            *(old, v, p, x),
        )

    # The curvature turns with the plane. Projecting it would shrink it on every step.
    turn = _nearest_rotation(axes[:2])
    curvature = turn.T @ state.curvature @ turn
    scatter = axes.T @ scatter @ axes
    small = tree_math.where(
        usable, (curvature, scatter), (state.curvature, state.scatter)
    )
    return state._replace(
        eigenvector=combined(rows[0], v),
        eigenvalue=small[0][0, 0],
        companion=combined(rows[1], p),
        scatter=small[1],
        curvature=small[0],
    )


def _nearest_rotation(matrix: jax.Array) -> jax.Array:
    """The orthogonal 2 × 2 matrix nearest to `matrix`; the identity for zero."""
    (a, b), (c, d) = matrix
    sign = jnp.where(a * d < b * c, -1, 1).astype(matrix.dtype)
    both = matrix + sign * jnp.stack([d, -c, -b, a]).reshape(2, 2)
    # Its columns are orthogonal and equally long.
    inverse = scalars.safe_rsqrt(jnp.sum(both[:, 0] ** 2))
    identity = jnp.eye(2, dtype=both.dtype)
    return jnp.where(inverse > 0, both * inverse, identity)
