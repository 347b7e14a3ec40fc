"""The two coefficients of the equation: its drift b, and what its noise is made of."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from eigensam_jax import eigen, hessian, perturbation, tree_math
from eigensam_jax._update import arguments
from eigensam_jax.eigen import Eigenpair
from eigensam_jax.perturbation import Perturbation
from eigensam_jax.sde import expansion
from eigensam_jax.sde.expansion import BatchValueFn, Order
from eigensam_jax.tree_math import PyTree

TOLERANCE = 1e-5


class Coefficients(NamedTuple):
    """Both coefficients at a point, and the loss.

    Attributes:
      value: E[f_γ].
      drift: b, a tree like the parameters.
      noise: Σ^½ times what was asked for, a tree like the parameters.
    """

    value: jax.Array
    drift: PyTree
    noise: PyTree


def drift(
    value_fn: BatchValueFn,
    params: PyTree,
    batches: PyTree,
    rho: ArrayLike,
    order: Order = 3,
    *,
    alpha: ArrayLike = 0.0,
    eigenvector: PyTree | None = None,
    tol: ArrayLike = TOLERANCE,
) -> PyTree:
    """Drift b of the equation in `eigensam_jax.sde`, by `order`:

        1: −E[∇f_γ]    2: −E[∇f_γ + H_γ ε_γ]    3: −E[∇f_γ + H_γ ε_γ + ½∇³f_γ[ε_γ, ε_γ]]

    Order 2 is exact for a quadratic loss, order 3 for a cubic one. Batches are
    processed one at a time, each for the operations of one gradient at order 1 and of a
    few at the others.

    Args:
      value_fn: (params, batch) -> f_γ(w), a real scalar.
      params: w, a tree of real arrays.
      batches: a tree of arrays with a leading axis over the batches.
      rho: ρ, the radius; without effect at order 1.
      order: 1, 2 or 3, the highest derivative of the loss.
      alpha: α of Eigen-SAM; 0 for SAM.
      eigenvector: v, a tree like `params` of norm 1; its sign does not matter. By
        default the top eigenvector of the Hessian of E[f_γ] at w, by
        `eigen.top_eigenpairs`, some 20 Hessian-vector products of all batches.
      tol: tolerance of that eigenvector's residual, relative to λ₁.

    Returns:
      b, a tree like `params`, in float32 or in the leaf's dtype where that is wider.

    Raises:
      ValueError: for an invalid `order`, `rho`, `alpha` or `tol`, batches without a
        common leading axis, parameters that are not real, a `value_fn` that returns no
        scalar, or an `eigenvector` unlike `params`.

    Example:
      >>> import jax.numpy as jnp
      >>> from eigensam_jax import sde
      >>> cubic = lambda w, x: x * w**3
      >>> w, x = jnp.array(1.0), jnp.array([0.5, 1.5])
      >>> [f"{sde.drift(cubic, w, x, rho=0.1, order=k):.2f}" for k in (1, 2, 3)]
      ['-3.00', '-3.60', '-3.63']

    References:
      Luo et al., as in `eigensam_jax.sde`.
    """
    count = check(params, batches, rho, order, alpha)
    v = _eigenvector(value_fn, params, batches, order, alpha, eigenvector, tol)
    still = jnp.zeros(count, tree_math.accumulation_dtype(params))
    return coefficients(
        value_fn, params, batches, rho, still, order, alpha, v, lambda c: c.drift
    )


def diffusion(
    value_fn: BatchValueFn,
    params: PyTree,
    batches: PyTree,
    rho: ArrayLike,
    increments: ArrayLike,
    order: Order = 3,
    *,
    alpha: ArrayLike = 0.0,
    eigenvector: PyTree | None = None,
    tol: ArrayLike = TOLERANCE,
) -> PyTree:
    """Product B·ξ with a root of the covariance, BBᵀ = Σ, with one column a batch.

        B·ξ = N^(−½) Σ_γ ξ_γ (g_γ − E[g]),    g_γ = ∇f_γ(w + ε_γ), at order 1 ∇f_γ(w)

    For independent standard normal ξ its covariance is exactly Σ, and no matrix is
    formed. (B is not Σ^½, but the law of the equation depends on BBᵀ alone.)

    Args:
      value_fn, params, batches, rho: as in `drift`.
      increments: ξ, shape (N,).
      order: 1 for SGD's noise; 2 and 3 have the same, SAM's.
      alpha, eigenvector, tol: as in `drift`.

    Returns:
      A tree like `params`, in float32 or in the leaf's dtype where that is wider.

    Raises:
      ValueError: as `drift`, and for `increments` of another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from eigensam_jax import sde
      >>> linear, w, x = (lambda w, x: x * w), jnp.array(1.0), jnp.array([0.0, 2.0])
      >>> root = [float(sde.diffusion(linear, w, x, 0.1, xi)) for xi in jnp.eye(2)]
      >>> f"{root[0] ** 2 + root[1] ** 2:.4f}"  # the variance of the gradients 0 and 2
      '1.0000'
    """
    count = check(params, batches, rho, order, alpha)
    if jnp.shape(increments) != (count,):
        raise ValueError(
            f"increments must have the shape {(count,)}, one for each batch, got "
            f"{jnp.shape(increments)}: draw jax.random.normal(key, {(count,)})."
        )
    v = _eigenvector(value_fn, params, batches, order, alpha, eigenvector, tol)
    xi = jnp.asarray(increments, tree_math.accumulation_dtype(params))
    return coefficients(
        value_fn, params, batches, rho, xi, order, alpha, v, lambda c: c.noise
    )


def coefficients(
    value_fn: BatchValueFn,
    params: PyTree,
    batches: PyTree,
    rho: ArrayLike,
    increments: jax.Array,
    order: Order,
    alpha: ArrayLike,
    eigenvector: PyTree | None,
    select: Callable[[Coefficients], Any] = lambda both: both,
) -> Any:
    """What `select` takes of the `Coefficients`, in one pass, without any checks.

    It takes it batch by batch, so that XLA leaves out the rest.
    """
    # Σ ξ_γ (g_γ − E[g]) = Σ (ξ_γ − mean ξ) g_γ: one pass does.
    weights = (increments - increments.mean()) * hessian.num_batches(batches) ** 0.5

    def at(pair: tuple[PyTree, jax.Array]) -> Any:
        batch, weight = pair
        f, value, grads, step = at_batch(
            value_fn, params, batch, rho, alpha, eigenvector
        )
        expanded = noisy = grads
        if order != 1:
            expanded = expansion.expanded_gradient(f, params, step.epsilon, order)
            noisy = perturbed_gradient(f, params, step)
        drift, noise = tree_math.scale(-1, expanded), tree_math.scale(weight, noisy)
        return select(Coefficients(value, drift, noise))

    return expansion.batch_mean(at, (batches, weights))


def at_batch(
    value_fn: BatchValueFn,
    params: PyTree,
    batch: PyTree,
    rho: ArrayLike,
    alpha: ArrayLike,
    eigenvector: PyTree | None,
) -> tuple[hessian.ValueFn, jax.Array, PyTree, Perturbation]:
    """f_γ of a batch, its value and gradient, and ε_γ; SAM's without an eigenvector."""
    f = arguments.scalar_valued("value_fn", lambda p: value_fn(p, batch))
    value, grads = jax.value_and_grad(f)(params)
    grads = tree_math.widen(grads)
    if eigenvector is None:
        return f, value, grads, perturbation.sam(grads, rho)
    step = perturbation.eigen_sam(grads, eigenvector, rho, alpha)
    return f, value, grads, step


def perturbed_gradient(
    value_fn: hessian.ValueFn, params: PyTree, step: Perturbation
) -> PyTree:
    """∇f(w + ε), what SAM descends on, in float32 or wider."""
    perturbed = tree_math.add_scaled(params, 1, step.epsilon)
    perturbed = tree_math.cast_like(perturbed, params)
    return tree_math.widen(jax.grad(value_fn)(perturbed))


def top_eigenpair(
    value_fn: BatchValueFn,
    params: PyTree,
    batches: PyTree,
    tol: ArrayLike,
    v0: PyTree | None = None,
) -> Eigenpair:
    """The top eigenpair of the Hessian of E[f_γ]."""
    matvec = hessian.mean_matvec(value_fn, params, batches)
    pairs = eigen.top_eigenpairs(matvec, params, 1, tol=tol, v0=v0)
    return Eigenpair(*jax.tree.map(lambda x: x[0], pairs))


def is_sam(alpha: ArrayLike) -> bool:
    """Whether α is known to be 0, so that there is no eigenvector to find."""
    return not isinstance(alpha, jax.core.Tracer) and bool(np.asarray(alpha) == 0)


def check(
    params: PyTree, batches: PyTree, rho: ArrayLike, order: Order, alpha: ArrayLike
) -> int:
    """Refuses invalid arguments, and returns the number of batches."""
    arguments.check_params(params)
    check_method(rho, order, alpha)
    return hessian.num_batches(batches)


def check_method(rho: ArrayLike, order: Order, alpha: ArrayLike) -> None:
    """Refuses an invalid `rho`, `alpha` or `order`."""
    arguments.check_scalar("rho", rho, schedule=False)
    arguments.check_scalar("alpha", alpha, schedule=False)
    expansion.check_order(order)


def _eigenvector(
    value_fn: BatchValueFn,
    params: PyTree,
    batches: PyTree,
    order: Order,
    alpha: ArrayLike,
    eigenvector: PyTree | None,
    tol: ArrayLike,
) -> PyTree | None:
    """The v of Eigen-SAM, given or found; None where it makes no difference."""
    if order == 1 or is_sam(alpha):
        return None
    if eigenvector is None:
        return top_eigenpair(value_fn, params, batches, tol).eigenvector
    return arguments.like_params(
        "eigenvector", eigenvector, params, "Give a unit tree, such as sharpness's."
    )
