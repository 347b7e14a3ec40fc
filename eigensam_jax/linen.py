"""Flax linen: a `TrainState` that passes the loss on to the transformation."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.core
import jax
import optax
from flax import struct
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state

from eigensam_jax.tree_math import GradFn, PyTree, ValueFn


class TrainState(train_state.TrainState):  # type: ignore[no-untyped-call]
    """Flax's `TrainState` with batch statistics, and a loss for the transformation.

    Flax's own `apply_gradients` does not pass keyword arguments on. `create` is the
    same, and transformations that need no loss, such as `optax.sgd`, work as before.

    With batch normalisation, `value_fn` must not update the statistics, as below: those
    of the clean pass are kept. With dropout, draw the key once a step, outside the
    loss, so that both passes have the same mask. On an Auto mesh, put the whole state
    there, `jax.device_put(state, replicated)`, or the second step compiles again.
    Parameters that their "gradient" overwrites, such as fp8 scales, are treated as by
    Flax: the chain sees `params["params"]` alone, and the functions given here all of
    `params`, with the same scales in both passes.

    Attributes:
      batch_stats: statistics of batch normalisation or other state of the network, or
        None.

    Example:
      >>> import eigensam_jax, flax.linen as nn, jax, jax.numpy as jnp, optax
      >>> from eigensam_jax.linen import TrainState
      >>> model, x = nn.BatchNorm(use_running_average=False), jnp.arange(4.0)[:, None]
      >>> tx = optax.chain(eigensam_jax.eigen_sam(), optax.sgd(0.1))
      >>> variables = model.init(jax.random.key(0), x)
      >>> state = TrainState.create(apply_fn=model.apply, tx=tx, **variables)
      >>> @jax.jit
      ... def train_step(state, x):
      ...     def loss_fn(params):
      ...         variables = {"params": params, "batch_stats": state.batch_stats}
      ...         y, new = state.apply_fn(variables, x, mutable=["batch_stats"])
      ...         return jnp.mean((y - 1) ** 2), new["batch_stats"]
      ...     grads, stats = jax.grad(loss_fn, has_aux=True)(state.params)
      ...     value_fn = lambda p: loss_fn(p)[0]
      ...     return state.apply_gradients(
      ...         grads=grads, value_fn=value_fn, batch_stats=stats
      ...     )
      >>> int(train_step(state, x).step)
      1
    """

    # Keyword-only, without a class attribute: subclasses may add fields without
    # defaults or redeclare this one, as Flax's ImageNet example does.
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
          extra_args: other arguments of the transformation, such as
            `{"refresh": True}`, or `{"value": loss}` for `reduce_on_plateau`.
          **fields: fields of the state to replace, such as `batch_stats`.

        Raises:
          TypeError: for what is no field of the state.
        """
        for name in fields:
            if name not in {field.name for field in dataclasses.fields(self)}:
                raise TypeError(
                    f"apply_gradients got {name}, which is no field of the state: give "
                    f"arguments of the transformation as extra_args={{{name!r}: …}}."
                )
        given = {"value_fn": value_fn, "grad_fn": grad_fn, "curvature_fn": curvature_fn}
        functions = {
            name: _of_perturbed(function, self.params)
            for name, function in given.items()
            if function is not None
        }
        # Flax's own method gets a transformation with its arguments bound.
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
    """`function`, restricted to the part of `params` that a link sees."""
    if not _is_overwritten(params):
        return function
    perturbed = lambda x: x["params"] if _is_overwritten(x) else x
    return lambda part: jax.tree.map(
        perturbed, function({**params, "params": part}), is_leaf=_is_overwritten
    )


def _is_overwritten(tree: PyTree) -> bool:
    return isinstance(tree, Mapping) and OVERWRITE_WITH_GRADIENT in tree
