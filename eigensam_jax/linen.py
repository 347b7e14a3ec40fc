"""Flax linen: a `TrainState` that hands the loss on to the transformation."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.core
import optax
from flax.training import train_state

from eigensam_jax.hessian import GradFn, ValueFn
from eigensam_jax.tree_math import PyTree


class TrainState(train_state.TrainState):  # type: ignore[no-untyped-call]
    """Flax's `TrainState`, with batch statistics and a loss for the transformation.

    Flax's own `apply_gradients` keeps every keyword argument for itself. Made by the
    same `create`; `optax.sgd` and others that need no loss do not notice.

    In a network with batch normalisation, `value_fn` must leave the statistics alone,
    as below: those of the clean pass are kept, those of the perturbed one dropped. In
    one with dropout, draw the key once a step, outside of the loss, so that both passes
    have the same mask.

    On a mesh, put the whole state there, `jax.device_put(state, replicated)`: as for
    Flax's own, the scalars that `create` makes are on no device in particular, and the
    second step would compile again.

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
      >>> state = TrainState.create(
      ...     apply_fn=model.apply,
      ...     params=variables["params"],
      ...     tx=optax.chain(eigensam_jax.eigen_sam(), optax.sgd(0.1)),
      ...     batch_stats=variables["batch_stats"],
      ... )
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

    batch_stats: flax.core.FrozenDict[str, Any] | dict[str, Any] | None = None

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
          value_fn: params -> loss on the same batch, for the transformation.
          grad_fn: params -> gradient, in place of `value_fn` or beside it; both as in
            `eigensam_jax.sam`.
          curvature_fn: params -> the loss whose Hessian is tracked, as in
            `eigensam_jax.eigen_sam`.
          extra_args: further arguments of the transformation by name, for example
            `{"refresh": True}`, or `{"value": loss}` for `reduce_on_plateau`.
          **fields: fields of the state to replace, such as `batch_stats`.

        Returns:
          The new state, of which `step` is one more.

        Raises:
          ValueError: as the transformation does.
        """
        functions: dict[str, Callable[..., Any] | None] = {
            "value_fn": value_fn,
            "grad_fn": grad_fn,
            "curvature_fn": curvature_fn,
        }
        given = {name: value for name, value in functions.items() if value is not None}
        if not (given or extra_args):
            return super().apply_gradients(grads=grads, **fields)  # type: ignore[no-any-return,no-untyped-call]
        tx = optax.with_extra_args_support(self.tx)
        updates, opt_state = tx.update(
            grads, self.opt_state, self.params, **given, **(extra_args or {})
        )
        params = optax.apply_updates(self.params, updates)
        new: TrainState = self.replace(
            step=self.step + 1, params=params, opt_state=opt_state, **fields
        )
        return new
