"""Hessian-vector products on pytrees, without ever forming the Hessian."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from eigensam_jax import tree_math
from eigensam_jax.tree_math import PyTree

ValueFn = Callable[[PyTree], jax.Array]
GradFn = Callable[[PyTree], PyTree]
Matvec = Callable[[PyTree], PyTree]


def hvp(value_fn: ValueFn, params: PyTree, vector: PyTree) -> PyTree:
    """Hessian-vector product ∇²f(w)·v by forward-over-reverse differentiation.

    The directional derivative of the gradient, ∂/∂t ∇f(w + t·v) at t = 0, by
    `jax.jvp` of `jax.grad`: a small multiple of a gradient's operations and memory.

    Args:
      value_fn: f, a function of the parameters alone that returns a real scalar.
      params: w, a tree of real arrays.
      vector: v, a tree of the same structure and shapes; it is cast to the dtypes of
        `params`, in which the product is made.

    Returns:
      The product, with the structure and shapes of `params`, in float32 or in the
      leaf's dtype where that is wider.

    Example:
      >>> import jax.numpy as jnp
      >>> from eigensam_jax import hessian
      >>> f = lambda w: w["x"] ** 2 * w["y"]
      >>> w = {"x": jnp.array(1.0), "y": jnp.array(3.0)}
      >>> v = {"x": jnp.array(1.0), "y": jnp.array(0.0)}
      >>> {name: float(x) for name, x in hessian.hvp(f, w, v).items()}
      {'x': 6.0, 'y': 2.0}

    References:
      Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 1994.
    """
    return matvec(jax.grad(value_fn), params)(vector)


def matvec(grad_fn: GradFn, params: PyTree) -> Matvec:
    """Builds v ↦ ∇²f(w)·v from the gradient function of f.

    What the solvers of `eigensam_jax.eigen` take. Each call differentiates anew and
    keeps nothing: a linearisation would hold all activations between products.

    Args:
      grad_fn: ∇f, a function of the parameters alone that returns their gradient, for
        example `jax.grad(value_fn)`; it must be differentiable in forward mode.
      params: w, a tree of real arrays.

    Returns:
      A function from a tree like `params` to a tree like `params`, as `hvp`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from eigensam_jax import hessian
      >>> gradient = jax.grad(lambda w: jnp.sum(w**3))
      >>> product = hessian.matvec(gradient, jnp.array([1.0, 2.0]))
      >>> product(jnp.array([1.0, 1.0]))
      Array([ 6., 12.], dtype=float32)
    """

    def product(vector: PyTree) -> PyTree:
        tangent = jax.tree.map(
            lambda w, v: jnp.asarray(v, jnp.result_type(w)), params, vector
        )
        return tree_math.widen(jax.jvp(grad_fn, (params,), (tangent,))[1])

    return product
