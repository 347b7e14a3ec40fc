"""Gradients expanded along a perturbation: contractions of higher derivatives.

Each is the gradient of a directional derivative, ∇(D_a D_b f): forward mode nested in
reverse mode, so that no tensor is formed.
"""

from collections.abc import Callable
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp

from eigensam_jax import hessian, tree_math
from eigensam_jax._update import arguments
from eigensam_jax.tree_math import PyTree, ValueFn

Order = Literal[1, 2, 3]
BatchValueFn = Callable[[PyTree, PyTree], jax.Array]
Result = TypeVar("Result")


def expanded_gradient(
    value_fn: ValueFn, params: PyTree, epsilon: PyTree, order: Order
) -> PyTree:
    """Taylor polynomial of ∇f(w + ε) in ε, with derivatives of f up to `order`.

        1: ∇f     2: ∇f + Hε     3: ∇f + Hε + ½∇³f[ε, ε]

    Args:
      value_fn: f, a function of the parameters alone that returns a real scalar.
      params: w, a tree of real arrays.
      epsilon: ε, a tree like `params`, cast to their dtypes and held fixed.
      order: 1, 2 or 3.

    Example:
      >>> import eigensam_jax, jax.numpy as jnp
      >>> f, w, step = (lambda w: w**3), jnp.array(1.0), jnp.array(0.5)
      >>> [float(eigensam_jax.sde.expanded_gradient(f, w, step, k)) for k in (1, 2, 3)]
      [3.0, 6.0, 6.75]
    """
    check_order(order)
    tangent = jax.lax.stop_gradient(tree_math.cast_like(epsilon, params))

    def first(p: PyTree) -> tuple[jax.Array, jax.Array]:
        return jax.jvp(value_fn, (p,), (tangent,))

    def polynomial(p: PyTree) -> jax.Array:
        if order == 1:
            return value_fn(p)
        if order == 2:
            return jnp.add(*first(p))
        (value, slope), (_, curvature) = jax.jvp(first, (p,), (tangent,))
        return jnp.add(value + slope, curvature / 2)

    return tree_math.widen(jax.grad(polynomial)(params))


def third_derivative(value_fn: ValueFn, params: PyTree, a: PyTree, b: PyTree) -> PyTree:
    """Contraction ∇³f(w)[a, b], the tree with ⟨∇³f[a, b], c⟩ = D_a D_b D_c f.

    Args:
      value_fn: f, a function of the parameters alone that returns a real scalar.
      params: w, a tree of real arrays.
      a, b: trees like `params`, cast to their dtypes, in either order.

    Example:
      >>> import eigensam_jax, jax.numpy as jnp
      >>> f, w, (x, y) = (lambda w: w[0] ** 2 * w[1]), jnp.array([1.0, 5.0]), jnp.eye(2)
      >>> eigensam_jax.sde.third_derivative(f, w, x, y)
      Array([2., 0.], dtype=float32)
    """
    along_both = directional(directional(value_fn, a), b)
    return tree_math.widen(jax.grad(along_both)(params))


def directional(value_fn: ValueFn, direction: PyTree) -> ValueFn:
    """The derivative w ↦ D_a f(w) of f along a fixed direction a."""

    def derivative(params: PyTree) -> jax.Array:
        tangent = tree_math.cast_like(direction, params)
        slope: jax.Array = jax.jvp(value_fn, (params,), (tangent,))[1]
        return slope

    return derivative


def check_order(order: Order) -> None:
    """Refuses an unknown order."""
    remedy = ": the highest derivative of the loss in the drift, where 1 is SGD"
    arguments.require(order in (1, 2, 3), "order", order, "1, 2 or 3", remedy)


def batch_mean(function: Callable[[PyTree], Result], batches: PyTree) -> Result:
    """Mean of `function` over the batches, by a scan, in float32 or wider."""
    count = hessian.num_batches(batches)
    first = jax.eval_shape(lambda b: function(jax.tree.map(lambda x: x[0], b)), batches)

    def add(total: Result, batch: PyTree) -> tuple[Result, None]:
        return tree_math.add_scaled(total, 1, function(batch)), None

    total, _ = jax.lax.scan(add, tree_math.zeros_like(first), batches)
    mean: Result = jax.tree.map(lambda x: x / count, total)
    return mean
