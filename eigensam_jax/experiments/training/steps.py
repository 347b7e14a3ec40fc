"""The steps of training, pure functions of a state on the device."""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from eigensam_jax.experiments.training import methods
from eigensam_jax.experiments.training.losses import Loss, TrainingLoss
from eigensam_jax.tree_math import PyTree

Begin = jax.tree_util.Partial  # of variables to variables, with arrays of its own

_STEP_KEYS = 2  # what `step_key` folds into the key; `split` makes 0 and 1


class TrainState(NamedTuple):
    """Everything that a training step carries, on the device and donated.

    Attributes:
      params: the network's parameters.
      opt_state: the optimizer's state.
      key: data of the key for the order of the examples, and what is drawn in a step.
      order: the examples of this epoch, in the order in which they are used.
      step: steps so far.
      radius_sum: the sum of ‖ε‖ over the steps so far.
      batch_stats: running statistics of batch normalisation; empty where there is none.
    """

    params: PyTree
    opt_state: optax.OptState
    key: jax.Array
    order: jax.Array
    step: jax.Array
    radius_sum: jax.Array
    batch_stats: PyTree


def start(
    model: nn.Module,
    tx: optax.GradientTransformationExtraArgs,
    images: jax.Array,
    seed: int,
    begin: Begin | None = None,
) -> TrainState:
    """The state before the first step.

    Args:
      model: the network.
      tx: the optimizer.
      images: the training set, of which only shapes matter.
      seed: of the weights, the order of the examples and all that is drawn.
      begin: what the network's new variables are exchanged for; None to keep them.
    """
    init_key, key = jax.random.split(jax.random.key(seed))
    variables = _new_variables(model, init_key, images[:1], begin)
    params = variables["params"]
    order = jnp.arange(len(images))
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        params,
        tx.init(params),
        jax.random.key_data(key),
        order,
        zero,
        jnp.zeros(()),
        variables.get("batch_stats", {}),
    )


@partial(jax.jit, static_argnums=0)
def _new_variables(
    model: nn.Module, key: jax.Array, image: jax.Array, begin: Begin | None
) -> PyTree:
    """Compiled, so that what only gives shapes, or is exchanged, is never computed."""
    variables = model.init(key, image)
    return variables if begin is None else begin(variables)


def shuffled(key: jax.Array, order: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The key and the order of the examples at the start of an epoch."""
    key, order_key = jax.random.split(jax.random.wrap_key_data(key))
    return jax.random.key_data(key), jax.random.permutation(order_key, order)


def next_batch(state: TrainState, batch_size: int) -> jax.Array:
    """The examples of the next step: indices of shape (batch_size,)."""
    steps_per_epoch = len(state.order) // batch_size
    first = state.step % steps_per_epoch * batch_size
    return jax.lax.dynamic_slice_in_dim(state.order, first, batch_size)


def step_key(state: TrainState) -> jax.Array:
    """The key of what is drawn in the next step, none of those that `shuffled` has.

    It depends on the state alone, so that a run that goes on draws the same.
    """
    epoch_key = jax.random.wrap_key_data(state.key)
    return jax.random.fold_in(jax.random.fold_in(epoch_key, _STEP_KEYS), state.step)


def take_step(
    tx: optax.GradientTransformationExtraArgs,
    loss: TrainingLoss,
    state: TrainState,
    images: jax.Array,
    labels: jax.Array,
    refresh: bool,
    parts: int = 1,
    acts: bool = True,
    curvature: Loss | None = None,
) -> TrainState:
    """One step of `tx` on a batch; `refresh` fixes what a tracker does on it.

    Running statistics are those of the pass at the weights w; the ones of a pass at
    w + ε are dropped. With several `parts` of the batch, `tx` takes means over the axis
    `methods.PARTS`; their number divides the batch, and there are no statistics. Where
    `tx` does not act, which is to say perturb, its last ‖ε‖ is not counted. The Hessian
    of trackers that make products is that of `curvature` on the batch; of the training
    loss, where there is none.
    """

    def update(images: jax.Array, labels: jax.Array) -> Any:
        batch = state.batch_stats, images, labels
        value_fn = lambda params: loss(params, *batch)[0]
        curvature_fn = None
        if curvature is not None:
            curvature_fn = lambda p: curvature(p, images, labels, state.batch_stats)
        grads, batch_stats = jax.grad(loss, has_aux=True)(state.params, *batch)
        updates, opt_state = tx.update(
            *(grads, state.opt_state, state.params),
            value_fn=value_fn,
            curvature_fn=curvature_fn,
            refresh=refresh,
            perturb=acts,
        )
        return updates, opt_state, batch_stats

    if parts > 1:
        update = jax.vmap(update, out_axes=None, axis_name=methods.PARTS)
        images, labels = (x.reshape(parts, -1, *x.shape[1:]) for x in (images, labels))
    updates, opt_state, batch_stats = update(images, labels)
    radius = optax.tree.get(opt_state, "perturbation_norm", 0.0)
    return state._replace(
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
        step=state.step + 1,
        radius_sum=state.radius_sum + (radius if acts else 0.0),
        batch_stats=batch_stats,
    )
