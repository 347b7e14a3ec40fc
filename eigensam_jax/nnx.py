"""Flax nnx: the loss of a model as a pure function of its parameters."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx

from eigensam_jax.hessian import ValueFn
from eigensam_jax.tree_math import PyTree

Model = TypeVar("Model", bound=nnx.Module)


def value_fn(
    model: Model,
    loss_fn: Callable[..., jax.Array],
    *args: Any,
    wrt: Any = nnx.Param,
) -> ValueFn:
    """Builds params -> `loss_fn` of a copy of `model` that has these parameters.

    What `nnx.Optimizer.update(model, grads, value_fn=...)` hands to the transformation.
    Give it what `nnx.grad(loss_fn)` is given, and make it before the clean pass: the
    copies then have the batch statistics and the counts of random numbers that this
    pass starts from, so that dropout draws the same masks in both. The live model and
    `nnx.Rngs` move by the clean pass alone. (What the loss reads and moves must be its
    argument: inside a gradient Flax refuses to move what a closure holds.)

    Where a `grad_fn` is wanted, it is `jax.grad` of this function, not `nnx.grad`.

    Args:
      model: the live model.
      loss_fn: from a model and `args` to a scalar, the loss on the current batch.
      *args: what else `loss_fn` takes, such as `nnx.Rngs` and the batch. Those of nnx
        are copied for each call, as the model is.
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
      >>> def loss_fn(model, rngs, x):
      ...     x = nnx.Dropout(0.1)(x, rngs=rngs)
      ...     return jnp.mean((model(x) - 1) ** 2)
      >>> @nnx.jit
      ... def train_step(model, optimizer, rngs, x):
      ...     at_clean_pass = value_fn(model, loss_fn, rngs, x)
      ...     loss, grads = nnx.value_and_grad(loss_fn)(model, rngs, x)
      ...     optimizer.update(model, grads, value_fn=at_clean_pass)
      ...     return loss
      >>> rngs, x = nnx.Rngs(1), jnp.ones((4, 2))
      >>> loss = train_step(model, optimizer, rngs, x)
      >>> bool(train_step(model, optimizer, rngs, x) < loss)
      True
    """
    parts: Any = nnx.split(model, wrt, ...)
    graphdef, _, rest = parts
    rest = jax.tree.map(lambda x: x, rest)  # its variables, not those of the model
    args = nnx.clone(args)

    def value(params: PyTree) -> jax.Array:
        return loss_fn(nnx.merge(graphdef, params, rest, copy=True), *nnx.clone(args))

    return value
