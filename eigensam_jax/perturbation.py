"""The perturbation ε of SAM, ASAM and Eigen-SAM: pure functions of g, w and v.

Each takes the gradient g = ∇L(w), a tree of real arrays, and returns a `Perturbation`
in float32 or the gradient's dtype if wider. Norms and inner products run over the whole
tree. ε = 0 where the gradient is zero or its norm non-finite. References are those of
`eigensam_jax.sam`, `asam` and `eigen_sam`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from eigensam_jax import tree_math
from eigensam_jax._update import scalars
from eigensam_jax.tree_math import PyTree


class Perturbation(NamedTuple):
    """A perturbation and the scalars computed on the way.

    Attributes:
      epsilon: ε, a tree like the gradient.
      norm: ‖ε‖, the radius.
      grad_norm: ‖g‖.
      projection: ⟨ε, v⟩, which has the sign of ⟨g, v⟩; None where there is no v.
    """

    epsilon: PyTree
    norm: jax.Array
    grad_norm: jax.Array
    projection: jax.Array | None = None

    @property
    def alignment(self) -> jax.Array | None:
        """|⟨ε, v⟩|/‖ε‖, between 0 and 1; 0 where ε = 0, None where there is no v."""
        if self.projection is None:
            return None
        cosine = tree_math.safe_divide(jnp.abs(self.projection), self.norm)
        return jnp.minimum(cosine, 1)


def sam(grads: PyTree, rho: ArrayLike) -> Perturbation:
    """SAM's perturbation ε = ρ·g/‖g‖, the first-order worst case in a ball.

    Args:
      grads: g, a tree of real arrays.
      rho: ρ, the radius.

    Example:
      >>> import eigensam_jax, jax.numpy as jnp
      >>> eigensam_jax.perturbation.sam(jnp.array([3.0, 4.0]), rho=0.5).epsilon
      Array([0.3, 0.4], dtype=float32)
    """
    grad_norm = tree_math.norm(grads)
    rho = jnp.asarray(rho, grad_norm.dtype)
    inverse = tree_math.safe_inverse(grad_norm)
    (factor,) = scalars.once(rho * inverse)
    epsilon = tree_math.scale(factor, grads)
    return _where_usable(inverse, Perturbation(epsilon, rho, grad_norm))


def asam(
    grads: PyTree,
    params: PyTree,
    rho: ArrayLike,
    eta: ArrayLike,
    *,
    scale_biases: bool = False,
) -> Perturbation:
    """ASAM's perturbation ε = ρ·T²g/‖Tg‖ with T = |w| + η, element-wise.

    The ball scales with each weight, so rescaling the weights of a layer does not
    change it. The result's `norm` is ‖ε‖, not ρ = ‖T⁻¹ε‖.

    Args:
      grads, params: g and w, trees of real arrays of the same structure and shapes.
      rho: ρ, the radius in the scaled space.
      eta, scale_biases: as in `eigensam_jax.asam`.

    Example:
      >>> import eigensam_jax, jax.numpy as jnp
      >>> g, w = jnp.array([[3.0, 4.0]]), jnp.array([[1.0, -1.0]])
      >>> eigensam_jax.perturbation.asam(g, w, rho=0.5, eta=1.0).epsilon
      Array([[0.6, 0.8]], dtype=float32)
    """
    unit, grad_norm = tree_math.unit(grads)
    inside = scaled(unit, params, eta, scale_biases=scale_biases)
    direction = scaled(inside, params, eta, scale_biases=scale_biases)
    squares = tree_math.vdots((inside, inside), (direction, direction))
    scaled_norm, direction_norm = map(scalars.safe_sqrt, squares)
    inverse = tree_math.safe_inverse(scaled_norm)
    (factor,) = scalars.once(jnp.asarray(rho, grad_norm.dtype) * inverse)
    epsilon = tree_math.scale(factor, direction)
    norm = factor * direction_norm
    return _where_usable(inverse, Perturbation(epsilon, norm, grad_norm))


def scaled(
    tree: PyTree, params: PyTree, eta: ArrayLike, *, scale_biases: bool = False
) -> PyTree:
    """Element-wise product T x, with the T = |w| + η of `asam`.

    Args:
      tree: x, a tree of real arrays.
      params: w, a tree of the same structure and shapes.
      eta, scale_biases: as in `asam`.

    Example:
      >>> import jax.numpy as jnp
      >>> from eigensam_jax import perturbation
      >>> perturbation.scaled(jnp.ones((1, 2)), jnp.array([[3.0, -4.0]]), eta=1.0)
      Array([[4., 5.]], dtype=float32)
    """
    return jax.tree.map(
        lambda x, w: (
            x * (jnp.abs(w) + jnp.asarray(eta, w.dtype)).astype(x.dtype)
            if scale_biases or jnp.ndim(w) > 1
            else x
        ),
        tree,
        tree_math.widen(params),
    )


def eigen_sam(
    grads: PyTree, eigenvector: PyTree, rho: ArrayLike, alpha: ArrayLike
) -> Perturbation:
    """Eigen-SAM's perturbation ε = ρ·(u + α·sign⟨g,v⟩·v⊥).

    Here u = g/‖g‖, and v⊥ = v − ⟨u,v⟩u is the part of v orthogonal to the gradient, not
    renormalised. With c = ⟨u,v⟩,

        ε = ρ·((1 − α|c|)·u + α·sign(c)·v),   ‖ε‖ = ρ·√(1 + α²(1 − c²)),
        |⟨ε,v⟩| = ρ·(|c| + α(1 − c²)).

    ε does not change when v becomes −v. For α = 0, c = 0 or v = 0 it is SAM's.

    Args:
      grads: g, a tree of real arrays.
      eigenvector: v, a tree like `grads`, of norm 1, or 0 if there is no estimate yet.
      rho, alpha: ρ, the radius of SAM's part, and α, the weight of the eigenvector's.

    Example:
      >>> import eigensam_jax, jax.numpy as jnp
      >>> g, v = jnp.array([1.0, 0.0]), jnp.array([0.6, -0.8])
      >>> eigensam_jax.perturbation.eigen_sam(g, v, rho=1.0, alpha=0.5).epsilon
      Array([ 1. , -0.4], dtype=float32)
    """
    grad_norm = tree_math.norm(grads)
    rho, alpha = (jnp.asarray(x, grad_norm.dtype) for x in (rho, alpha))
    inverse = tree_math.safe_inverse(grad_norm)
    cosine = tree_math.vdot(tree_math.scale(inverse, grads), eigenvector)
    sign, cosine = jnp.sign(cosine), jnp.abs(cosine)
    cosine = jnp.where(cosine > 1, 1, cosine)
    added = alpha * jnp.abs(sign) * (1 - cosine) * (1 + cosine)  # α‖v⊥‖²
    length = jnp.sqrt(1 + alpha * added)
    # ρ/‖g‖ first, as in `sam`, so that α = 0 rounds as `sam` does.
    on_g, on_v, norm, projection = scalars.once(
        (rho * inverse) * (1 - alpha * cosine),
        rho * alpha * sign,
        rho * length,
        rho * sign * (cosine + added),
    )
    epsilon = tree_math.add_scaled(tree_math.scale(on_g, grads), on_v, eigenvector)
    return _where_usable(inverse, Perturbation(epsilon, norm, grad_norm, projection))


def _where_usable(inverse: jax.Array, perturbation: Perturbation) -> Perturbation:
    """Zeros for all but `grad_norm` where `inverse` is 0, as there is no direction."""
    zeros = jax.tree.map(jnp.zeros_like, perturbation)
    kept: Perturbation = tree_math.where(inverse > 0, perturbation, zeros)
    return kept._replace(grad_norm=perturbation.grad_norm)
