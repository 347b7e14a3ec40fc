"""Flax linen: a `TrainState` that hands the loss on to the transformation."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.core
import jax
import optax
from flax import struct
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state

from eigensam_jax.hessian import GradFn, ValueFn
from eigensam_jax.tree_math import PyTree


class TrainState(train_state.TrainState):  # type: ignore[no-untyped-call]
    """Flax's `TrainState`, with batch statistics and a loss for the transformation.

    Flax's own `apply_gradients` keeps every keyword argument for itself. Made by the
    same `create`; `optax.sgd` and others that need no loss do not notice.

    In a network with batch normalisation, `value_fn` must leave the statistics alone,
    as below: those of the clean pass are kept, those of the perturbed one dropped. In
    one with dropout, draw the key once a step, outside the loss, so that both passes
    have the same mask. On a mesh, put the whole state there, `jax.device_put(state,
    replicated)`, or the second step compiles again, as with Flax's own.

    Parameters that their "gradient" overwrites, such as the scales of fp8 layers, are
    treated as by Flax's own: the link and the optimizer see `params["params"]` alone,
    and the clean gradient overwrites the rest. The functions given here get all of
    `params`, in both passes with the same scales.

    Attributes:
      batch_stats: running statistics of batch normalisation, or whatever else the
        network keeps beside its parameters; None where it has none.

    Example:
      >>> import eigensam_jax, flax.linen as nn, jax, jax.numpy as jnp, optax
      >>> from eigensam_jax.linen import TrainState
      >>> class Network(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         return nn.Dense(1)(nn.BatchNorm(use_running_average=False)(x))
      >>> model, x = Network(), jnp.arange(8.0).reshape(4, 2)
      >>> variables = model.init(jax.random.key(0), x)
      >>> tx = optax.chain(eigensam_jax.eigen_sam(), optax.sgd(0.1))
      >>> state = TrainState.create(apply_fn=model.apply, tx=tx, **variables)
      >>> @jax.jit
      ... def train_step(state, x):
      ...     def loss_fn(params):
      ...         variables = {"params": params, "batch_stats": state.batch_stats}
      ...         y, new = state.apply_fn(variables, x, mutable=["batch_stats"])
      ...         return jnp.mean((y - 1) ** 2), new["batch_stats"]
      ...
      ...     grads, stats = jax.grad(loss_fn, has_aux=True)(state.params)
      ...     return state.apply_gradients(
      ...         grads=grads, value_fn=lambda p: loss_fn(p)[0], batch_stats=stats
      ...     )
      >>> int(train_step(state, x).step)
      1
    """

    # By keyword and without a class attribute: subclasses may add fields without
    # defaults, and declare this one anew, as Flax's ImageNet example does.
    batch_stats: flax.core.FrozenDict[str, Any] | dict[str, Any] | None = struct.field(
        default_factory=lambda: None, kw_only=True
    )  # type: ignore[no-untyped-call]

    def apply_gradients(
        self,
        *,
        grads: PyTree,
        value_fn: ValueFn | None = None,
        grad_fn: GradFn | None = None,
        curvature_fn: ValueFn | None = None,
        extra_args: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> "TrainState":
        """The state after one update of the parameters.

        Args:
          grads: the gradient of `value_fn` at `self.params`.
          value_fn, grad_fn, curvature_fn: as in `update`, see `eigensam_jax.eigen_sam`.
          extra_args: further arguments of the transformation by name, for example
            `{"refresh": True}`, or `{"value": loss}` for `reduce_on_plateau`.
          **fields: fields of the state to replace, such as `batch_stats`.

        Returns:
          The new state, of which `step` is one more.

        Raises:
          ValueError: as the transformation does.
        """
        given = {"value_fn": value_fn, "grad_fn": grad_fn, "curvature_fn": curvature_fn}
        functions = {
            name: _of_perturbed(function, self.params)
            for name, function in given.items()
            if function is not None
        }
        # Flax's own takes what is left of a transformation that has its arguments.
        update = partial(
            optax.with_extra_args_support(self.tx).update,
            **functions,
            **(extra_args or {}),
        )
        with_loss = self.replace(tx=optax.GradientTransformation(self.tx.init, update))
        new: TrainState = super(TrainState, with_loss).apply_gradients(  # type: ignore[no-untyped-call]
            grads=grads, **{"tx": self.tx} | fields
        )
        return new


def _of_perturbed(function: Callable[..., Any], params: PyTree) -> Callable[..., Any]:
    """`function` of what a link sees of `params`; of gradients, the same part."""
    if not _is_overwritten(params):
        return function
    perturbed = lambda x: x["params"] if _is_overwritten(x) else x
    return lambda part: jax.tree.map(
        perturbed, function({**params, "params": part}), is_leaf=_is_overwritten
    )


def _is_overwritten(tree: PyTree) -> bool:
    """Whether a part of these parameters is overwritten by its gradient."""
    return isinstance(tree, Mapping) and OVERWRITE_WITH_GRADIENT in tree
