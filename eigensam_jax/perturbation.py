"""The perturbation ε of SAM, ASAM and Eigen-SAM: pure functions of g, w and v.

Each takes the gradient g = ∇L(w) as a tree of real arrays and returns a `Perturbation`
whose leaves are in float32, or in the gradient's dtype where that is wider. Norms and
inner products run over the whole tree. Where the gradient is zero, or its norm is not
finite, there is no direction to perturb in: ε = 0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from eigensam_jax import tree_math
from eigensam_jax.tree_math import PyTree


class Perturbation(NamedTuple):
    """A perturbation and the scalars that were made on the way.

    Attributes:
      epsilon: ε, a tree like the gradient.
      norm: ‖ε‖, the radius.
      grad_norm: ‖g‖.
      alignment: |⟨ε, v⟩|/‖ε‖, between 0 and 1; 0 where ε = 0, None where there is no v.
    """

    epsilon: PyTree
    norm: jax.Array
    grad_norm: jax.Array
    alignment: jax.Array | None = None


def sam(grads: PyTree, rho: ArrayLike) -> Perturbation:
    """SAM's perturbation ε = ρ·g/‖g‖, the first-order worst case in a ball.

    Args:
      grads: g, a tree of real arrays.
      rho: ρ, the radius.

    Returns:
      A `Perturbation` with ‖ε‖ = ρ.

    Example:
      >>> import jax.numpy as jnp
      >>> from eigensam_jax import perturbation
      >>> perturbation.sam(jnp.array([3.0, 4.0]), rho=0.5).epsilon
      Array([0.3, 0.4], dtype=float32)

    References:
      Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware Minimization for Efficiently
      Improving Generalization", ICLR 2021.
    """
    grad_norm = tree_math.norm(grads)
    rho = jnp.asarray(rho, grad_norm.dtype)
    inverse = tree_math.safe_inverse(grad_norm)
    epsilon = tree_math.scale(rho * inverse, grads)
    return _where_usable(inverse, Perturbation(epsilon, rho, grad_norm))


def asam(grads: PyTree, params: PyTree, rho: ArrayLike, eta: ArrayLike) -> Perturbation:
    """ASAM's perturbation ε = ρ·T²g/‖Tg‖ with T = |w| + η, element-wise.

    The ball is measured relative to the size of each weight, so that rescaling the
    weights of a layer does not change it; η lets weights that are zero move too.

    Args:
      grads: g, a tree of real arrays.
      params: w, a tree of the same structure and shapes.
      rho: ρ, the radius in the scaled space, ‖T⁻¹ε‖ = ρ.
      eta: η, at least 0.

    Returns:
      A `Perturbation`; its `norm` is ‖ε‖, not ρ.

    Example:
      >>> import jax.numpy as jnp
      >>> from eigensam_jax import perturbation
      >>> g, w = jnp.array([3.0, 4.0]), jnp.array([1.0, -1.0])
      >>> perturbation.asam(g, w, rho=0.5, eta=1.0).epsilon
      Array([0.6, 0.8], dtype=float32)

    References:
      Kwon, Kim, Park, Choi, "ASAM: Adaptive Sharpness-Aware Minimization for
      Scale-Invariant Learning of Deep Neural Networks", ICML 2021.
    """
    grads = tree_math.widen(grads)
    weights = jax.tree.map(
        lambda w: jnp.abs(w) + jnp.asarray(eta, w.dtype), tree_math.widen(params)
    )
    scaled = jax.tree.map(jnp.multiply, weights, grads)
    direction = jax.tree.map(jnp.multiply, weights, scaled)
    grad_norm = tree_math.norm(grads)
    rho = jnp.asarray(rho, grad_norm.dtype)
    inverse = tree_math.safe_inverse(tree_math.norm(scaled))
    epsilon = tree_math.scale(rho * inverse, direction)
    norm = rho * inverse * tree_math.norm(direction)
    return _where_usable(inverse, Perturbation(epsilon, norm, grad_norm))


def eigen_sam(
    grads: PyTree, eigenvector: PyTree, rho: ArrayLike, alpha: ArrayLike
) -> Perturbation:
    """Eigen-SAM's perturbation ε = ρ·(u + α·sign⟨g,v⟩·v⊥).

    Here u = g/‖g‖ and v⊥ = v − ⟨u,v⟩u is the part of v across the gradient, not
    renormalised. With c = ⟨u,v⟩ it is the combination

        ε = ρ·((1 − α|c|)·u + α·sign(c)·v),   ‖ε‖ = ρ·√(1 + α²(1 − c²)),
        |⟨ε,v⟩| = ρ·(|c| + α(1 − c²)),

    so that one pass over g and v makes the inner products, and another makes ε. It does
    not change when v becomes −v. For α = 0, c = 0 or v = 0 it is SAM's.

    Args:
      grads: g, a tree of real arrays.
      eigenvector: v, a tree of the same structure and shapes, of norm 1, or 0 where
        there is no estimate yet.
      rho: ρ, the radius of SAM's part.
      alpha: α, the weight of the eigenvector's part.

    Returns:
      A `Perturbation` with `alignment`.

    Example:
      >>> import jax.numpy as jnp
      >>> from eigensam_jax import perturbation
      >>> g, v = jnp.array([1.0, 0.0]), jnp.array([0.6, -0.8])
      >>> perturbation.eigen_sam(g, v, rho=1.0, alpha=0.5).epsilon
      Array([ 1. , -0.4], dtype=float32)

    References:
      Luo, Truong, Pham, Harandi, Phung, Le, "Explicit Eigenvalue Regularization
      Improves Sharpness-Aware Minimization", NeurIPS 2024.
    """
    grad_norm = tree_math.norm(grads)
    rho, alpha = (jnp.asarray(x, grad_norm.dtype) for x in (rho, alpha))
    inverse = tree_math.safe_inverse(grad_norm)
    cosine = tree_math.safe_divide(tree_math.vdot(grads, eigenvector), grad_norm)
    sign = jnp.sign(cosine)
    cosine = jnp.minimum(jnp.abs(cosine), 1)
    added = alpha * jnp.abs(sign) * (1 - cosine) * (1 + cosine)  # α‖v⊥‖²
    length = jnp.sqrt(1 + alpha * added)
    # ρ/‖g‖ is the outer factor, as in `sam`, so that α = 0 rounds as `sam` does.
    direction = tree_math.add_scaled(
        tree_math.scale(1 - alpha * cosine, grads),
        alpha * sign * grad_norm,
        eigenvector,
    )
    epsilon = tree_math.scale(rho * inverse, direction)
    alignment = (cosine + added) / length
    return _where_usable(
        inverse, Perturbation(epsilon, rho * length, grad_norm, alignment)
    )


def _where_usable(inverse: jax.Array, perturbation: Perturbation) -> Perturbation:
    """Zeros in place of all but `grad_norm` where there is no direction (1/‖·‖ = 0)."""
    zeros = jax.tree.map(jnp.zeros_like, perturbation)
    kept: Perturbation = tree_math.where(inverse > 0, perturbation, zeros)
    return kept._replace(grad_norm=perturbation.grad_norm)
