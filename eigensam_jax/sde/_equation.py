"""The two coefficients of the equation: the drift b and the noise."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from eigensam_jax import eigen, hessian, perturbation, tree_math
from eigensam_jax._update import arguments, functions, rounding
from eigensam_jax.eigen import Eigenpair
from eigensam_jax.perturbation import Perturbation
from eigensam_jax.sde import _expansion
from eigensam_jax.sde._expansion import BatchValueFn, Order
from eigensam_jax.tree_math import PyTree, ValueFn

TOLERANCE = 1e-5


class Coefficients(NamedTuple):
    """Both coefficients at a point, and the loss.

    Attributes:
      value: E[f_γ].
      drift: b, a tree like the parameters.
      noise: Bξ with BBᵀ = Σ, a tree like the parameters.
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
    """Drift b of the equation in `eigensam_jax.sde`, in one pass over the batches.

    Order 2 is exact for a quadratic loss, order 3 for a cubic one. Each batch costs one
    gradient at order 1, and a few at the others.

    Args:
      value_fn: (params, batch) -> f_γ(w), a real scalar.
      params: w, a tree of real arrays.
      batches: a tree of arrays with a leading axis over the batches.
      rho: ρ, the radius; no effect at order 1.
      order: 1, 2 or 3, the highest derivative of the loss.
      alpha: α of Eigen-SAM; 0 for SAM.
      eigenvector: v, a tree like `params` of norm 1 and either sign; by default found
        by `eigen.top_eigenpairs`, with some 20 Hessian-vector products of all batches.
      tol: tolerance of that eigenvector's residual, relative to λ₁.

    Example:
      >>> import eigensam_jax, jax.numpy as jnp
      >>> cubic, w, x = (lambda w, x: x * w**3), jnp.array(1.0), jnp.array([0.5, 1.5])
      >>> print(f"{eigensam_jax.sde.drift(cubic, w, x, rho=0.1, order=3):.2f}")
      -3.63
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
    """Product B·ξ with a root of the covariance, BBᵀ = Σ, with one column per batch.

        B·ξ = N^(−½) Σ_γ ξ_γ (g_γ − E[g]),    g_γ = ∇f_γ(w + ε_γ), at order 1 ∇f_γ(w)

    For independent standard normal ξ its covariance is exactly Σ, without forming a
    matrix. B is not Σ^½, but the law of the equation depends on BBᵀ alone.

    Args:
      value_fn, params, batches, rho: as in `drift`.
      increments: ξ, shape (N,).
      order: 1 for SGD's noise; 2 and 3 both have SAM's.
      alpha, eigenvector, tol: as in `drift`.

    Example:
      >>> import eigensam_jax, jax.numpy as jnp
      >>> f, w, x = (lambda w, x: x * w), jnp.array(1.0), jnp.array([0.0, 2.0])
      >>> root = [eigensam_jax.sde.diffusion(f, w, x, 0.1, xi) for xi in jnp.eye(2)]
      >>> print(f"{root[0] ** 2 + root[1] ** 2:.4f}")  # the variance of 0 and 2
      1.0000
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
    """The `Coefficients`, or what `select` takes of them, in one pass, unchecked."""
    # One pass: Σ ξ_γ (g_γ − E[g]) = Σ (ξ_γ − mean ξ) g_γ.
    weights = (increments - increments.mean()) * hessian.num_batches(batches) ** 0.5

    def at(pair: tuple[PyTree, jax.Array]) -> Any:
        batch, weight = pair
        f, value, grads, step = at_batch(
            value_fn, params, batch, rho, alpha, eigenvector
        )
        expanded = noisy = grads
        if order != 1:
            expanded = _expansion.expanded_gradient(f, params, step.epsilon, order)
            noisy = perturbed_gradient(f, params, step)
        drift, noise = tree_math.scale(-1, expanded), tree_math.scale(weight, noisy)
        return select(Coefficients(value, drift, noise))

    return _expansion.batch_mean(at, (batches, weights))


def at_batch(
    value_fn: BatchValueFn,
    params: PyTree,
    batch: PyTree,
    rho: ArrayLike,
    alpha: ArrayLike,
    eigenvector: PyTree | None,
) -> tuple[ValueFn, jax.Array, PyTree, Perturbation]:
    """f_γ of a batch, its value and gradient, and ε_γ; SAM's without an eigenvector."""
    f = functions.differentiable("value_fn", value_fn, (), batch)
    value, grads = jax.value_and_grad(f)(params)
    grads = tree_math.widen(grads)
    if eigenvector is None:
        return f, value, grads, perturbation.sam(grads, rho)
    step = perturbation.eigen_sam(grads, eigenvector, rho, alpha)
    return f, value, grads, step


def perturbed_gradient(value_fn: ValueFn, params: PyTree, step: Perturbation) -> PyTree:
    """∇f(w + ε), in float32 or wider."""
    perturbed = rounding.add(params, step.epsilon)
    return tree_math.widen(jax.grad(value_fn)(perturbed))


def top_eigenpair(
    value_fn: BatchValueFn,
    params: PyTree,
    batches: PyTree,
    tol: ArrayLike,
) -> Eigenpair:
    """The top eigenpair of the Hessian of E[f_γ]."""
    matvec = hessian.mean_matvec(value_fn, params, batches)
    pairs = eigen.top_eigenpairs(matvec, params, 1, tol=tol)
    return Eigenpair(*jax.tree.map(lambda x: x[0], pairs))


def is_sam(alpha: ArrayLike) -> bool:
    """Whether α is known to be 0, so that no eigenvector is needed."""
    return not isinstance(alpha, jax.core.Tracer) and bool(np.asarray(alpha) == 0)


def check(
    params: PyTree, batches: PyTree, rho: ArrayLike, order: Order, alpha: ArrayLike
) -> int:
    """Refuses invalid arguments and returns the number of batches."""
    arguments.check_params(params)
    check_method(rho, order, alpha)
    return hessian.num_batches(batches)


def check_method(rho: ArrayLike, order: Order, alpha: ArrayLike) -> None:
    """Refuses an invalid `rho`, `alpha` or `order`."""
    arguments.check_scalar("rho", rho, schedule=False)
    arguments.check_scalar("alpha", alpha, schedule=False)
    _expansion.check_order(order)


def _eigenvector(
    value_fn: BatchValueFn,
    params: PyTree,
    batches: PyTree,
    order: Order,
    alpha: ArrayLike,
    eigenvector: PyTree | None,
    tol: ArrayLike,
) -> PyTree | None:
    if order == 1 or is_sam(alpha):
        return None
    if eigenvector is None:
        return top_eigenpair(value_fn, params, batches, tol).eigenvector
    return arguments.like_params(
        "eigenvector", eigenvector, params, "Give a unit tree, as sharpness returns."
    )
