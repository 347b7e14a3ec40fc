"""Flax nnx: the loss of a model as a pure function of its parameters."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx

from eigensam_jax._update import arguments
from eigensam_jax.tree_math import PyTree, ValueFn

Model = TypeVar("Model", bound=nnx.Module)


def value_fn(
    model: Model,
    loss_fn: Callable[..., jax.Array],
    *args: Any,
    wrt: Any = nnx.Param,
) -> ValueFn:
    """Builds params -> `loss_fn` of a copy of `model` with these parameters.

    For `nnx.Optimizer.update(model, grads, value_fn=...)`. Give it what
    `nnx.grad(loss_fn)` is given, and call it before the clean pass: the copies then
    start from the batch statistics and random counts of that pass, so dropout draws the
    same masks. The clean pass alone changes the live model and `nnx.Rngs`. State that
    the loss changes must be its argument, not in a closure, as Flax requires inside a
    gradient. The result takes `nnx.state(model, wrt)`, or parameters as the optimizer
    gives them. For a `grad_fn`, use `jax.grad` of it, not `nnx.grad`.

    Args:
      model: the live model.
      loss_fn: (model, *args) -> scalar, the loss on the current batch.
      *args: what else `loss_fn` takes, such as `nnx.Rngs` and the batch; nnx objects
        are copied for each call.
      wrt: which variables are parameters, as in `nnx.Optimizer`.

    Raises:
      ValueError: if `loss_fn` is not a function, or is a module.

    Example:
      >>> import eigensam_jax, jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> from eigensam_jax.nnx import value_fn
      >>> model, rngs = nnx.Linear(2, 1, rngs=nnx.Rngs(0)), nnx.Rngs(1)
      >>> tx = optax.chain(eigensam_jax.eigen_sam(), optax.sgd(0.1))
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> def loss_fn(model, rngs, x):
      ...     return jnp.mean((model(nnx.Dropout(0.1)(x, rngs=rngs)) - 1) ** 2)
      >>> @nnx.jit
      ... def train_step(model, optimizer, rngs, x):
      ...     at_clean_pass = value_fn(model, loss_fn, rngs, x)
      ...     grads = nnx.grad(loss_fn)(model, rngs, x)
      ...     optimizer.update(model, grads, value_fn=at_clean_pass)
      >>> train_step(model, optimizer, rngs, jnp.ones((4, 2)))
    """
    is_loss = callable(loss_fn) and not isinstance(loss_fn, nnx.Module)
    what, remedy = "a function of the model and *args", ": the model comes before it"
    arguments.require(is_loss, "loss_fn", loss_fn, what, remedy)
    parts: Any = nnx.split(model, wrt, ...)
    graphdef, _, rest = parts
    rest = jax.tree.map(lambda x: x, rest)  # copies of the model's variables
    args = nnx.clone(args)

    def value(params: PyTree) -> jax.Array:
        return loss_fn(nnx.merge(graphdef, params, rest, copy=True), *nnx.clone(args))

    return value
