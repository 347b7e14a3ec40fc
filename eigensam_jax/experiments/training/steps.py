"""Training steps, as pure functions of a state on the device."""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from eigensam_jax.experiments.training import methods
from eigensam_jax.experiments.training.losses import Loss, TrainingLoss
from eigensam_jax.tree_math import PyTree

Begin = jax.tree_util.Partial  # maps variables to variables; holds arrays

_STEP_KEYS = 2  # folded into the key by `step_key`; `split` uses 0 and 1


class TrainState(NamedTuple):
    """Everything that a training step carries, on the device and donated.

    Attributes:
      params, opt_state: of the network and of the optimizer.
      key: data of the key for the order of examples and for draws in a step.
      order: the examples of this epoch, in the order of use.
      step: steps so far.
      radius_sum: the sum of ‖ε‖ over the steps so far.
      batch_stats: running statistics of batch normalisation, or empty.
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

    Only the shapes of `images` matter. `seed` fixes the weights, the order of the
    examples and all draws. `begin` maps the network's new variables to those to start
    from.
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
    """Compiled, so that values which `begin` replaces are never computed."""
    variables = model.init(key, image)
    return variables if begin is None else begin(variables)


def shuffled(key: jax.Array, order: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The key and the order of the examples at the start of an epoch."""
    key, order_key = jax.random.split(jax.random.wrap_key_data(key))
    return jax.random.key_data(key), jax.random.permutation(order_key, order)


def next_batch(state: TrainState, batch_size: int) -> jax.Array:
    """Indices of the examples of the next step, shape (batch_size,)."""
    steps_per_epoch = len(state.order) // batch_size
    first = state.step % steps_per_epoch * batch_size
    return jax.lax.dynamic_slice_in_dim(state.order, first, batch_size)


def step_key(state: TrainState) -> jax.Array:
    """The key for draws in the next step: from the state alone, to resume alike."""
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
    """One step of `tx` on a batch; `refresh` says whether its tracker refreshes.

    Running statistics come from the pass at w, not from the one at w + ε. With several
    `parts`, which must divide the batch, `tx` takes means over the axis
    `methods.PARTS`; there are no statistics then. ‖ε‖ is counted only if `tx` perturbs
    on this step (`acts`). Trackers take the Hessian of `curvature` on the batch, or of
    the training loss if it is None.
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
