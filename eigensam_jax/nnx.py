"""Flax nnx: the loss of a model as a pure function of its parameters."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx

from eigensam_jax.hessian import ValueFn
from eigensam_jax.tree_math import PyTree

Model = TypeVar("Model", bound=nnx.Module)


def value_fn(
    model: Model, loss_fn: Callable[[Model], jax.Array], wrt: Any = nnx.Param
) -> ValueFn:
    """Builds params -> `loss_fn` of a copy of `model` that has these parameters.

    What `nnx.Optimizer.update(model, grads, value_fn=...)` hands to the transformation.
    Make it before the clean pass: the copy then has the batch statistics and the counts
    of random numbers that this pass starts from, so that dropout draws the same masks
    in both. The live model is never touched: its statistics and counts move by the
    clean pass alone. (A closure over the live model would move them again; inside a
    gradient Flax refuses that.)

    Where a `grad_fn` is wanted, it is `jax.grad` of this function, not `nnx.grad`. What
    `optax.tree.get(optimizer.opt_state, "alignment")` finds is one of Flax's variables:
    `float` makes a number of it.

    Args:
      model: the live model.
      loss_fn: from a model to a scalar, the loss on the current batch.
      wrt: which variables are parameters, as in `nnx.Optimizer`.

    Returns:
      A pure function of the parameters, which may be given as `nnx.state(model, wrt)`
      or as that optimizer gives them.

    Example:
      >>> import eigensam_jax, jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> from eigensam_jax.nnx import value_fn
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> tx = optax.chain(eigensam_jax.eigen_sam(), optax.sgd(0.1))
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> @nnx.jit
      ... def train_step(model, optimizer, x):
      ...     loss_fn = lambda model: jnp.mean((model(x) - 1) ** 2)
      ...     at_clean_pass = value_fn(model, loss_fn)
      ...     loss, grads = nnx.value_and_grad(loss_fn)(model)
      ...     optimizer.update(model, grads, value_fn=at_clean_pass)
      ...     return loss
      >>> x = jnp.ones((4, 2))
      >>> bool(train_step(model, optimizer, x) > train_step(model, optimizer, x))
      True
    """
    parts: Any = nnx.split(model, wrt, ...)
    graphdef, _, rest = parts
    rest = jax.tree.map(lambda x: x, rest)  # its variables, not those of the model

    def value(params: PyTree) -> jax.Array:
        return loss_fn(nnx.merge(graphdef, params, rest, copy=True))

    return value
