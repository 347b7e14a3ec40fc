"""The losses of a network, in training and in evaluation."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from eigensam_jax.tree_math import PyTree

# (params, images, labels, batch_stats): the last may be left out, running statistics of
# batch normalisation, None or empty where there are none.
Loss = Callable[..., jax.Array]
TrainingLoss = Callable[
    [PyTree, PyTree, jax.Array, jax.Array], tuple[jax.Array, PyTree]
]


def each(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """The loss of each example: cross-entropy, or of a forecast the squared error."""
    if jnp.issubdtype(labels.dtype, jnp.floating):
        return jnp.square(outputs - labels).mean(range(1, labels.ndim))
    found: jax.Array = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
    return found


def evaluation_loss(model: nn.Module) -> Loss:
    """(params, images, labels, batch_stats) -> the mean loss of the batch.

    In evaluation: batch normalisation, where there is any, is by `batch_stats`.
    """

    def loss(
        params: PyTree, images: jax.Array, labels: jax.Array, batch_stats: PyTree = None
    ) -> jax.Array:
        outputs: Any = model.apply(variables(params, batch_stats), images)
        return jnp.mean(each(outputs, labels))

    return loss


def training_loss(model: nn.Module) -> TrainingLoss:
    """(params, batch_stats, images, labels) -> the mean loss, new statistics.

    In training: batch normalisation is by the batch. Only of a pass at the weights of
    the network, not at perturbed ones, should the new running statistics be kept. A
    network without any has an empty `batch_stats`, and takes no argument `train`.
    """

    def loss(
        params: PyTree, batch_stats: PyTree, images: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, PyTree]:
        outputs: Any
        if batch_stats:
            outputs, moved = model.apply(
                variables(params, batch_stats),
                images,
                train=True,
                mutable=["batch_stats"],
            )
            batch_stats = moved["batch_stats"]
        else:
            outputs = model.apply({"params": params}, images)
        return jnp.mean(each(outputs, labels)), batch_stats

    return loss


def variables(params: PyTree, batch_stats: PyTree) -> dict[str, PyTree]:
    """What a network's `apply` takes first, with statistics where there are any."""
    statistics = {"batch_stats": batch_stats} if batch_stats else {}
    return {"params": params, **statistics}
