"""The losses of a network in training and in evaluation."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from eigensam_jax.tree_math import PyTree

# (params, images, labels[, batch_stats]); None or empty without batch normalisation.
Loss = Callable[..., jax.Array]
TrainingLoss = Callable[
    [PyTree, PyTree, jax.Array, jax.Array], tuple[jax.Array, PyTree]
]


def each(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """The loss of each example: cross-entropy, or the squared error of a forecast.

    Where an example has several labels, their mean.
    """
    if jnp.issubdtype(labels.dtype, jnp.floating):
        found: jax.Array = jnp.square(outputs - labels)
    else:
        found = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
    return found.mean(tuple(range(1, labels.ndim)))


def evaluation_loss(model: nn.Module) -> Loss:
    """(params, images, labels, batch_stats) -> the mean loss, in evaluation mode."""

    def loss(
        params: PyTree, images: jax.Array, labels: jax.Array, batch_stats: PyTree = None
    ) -> jax.Array:
        outputs: Any = model.apply(variables(params, batch_stats), images)
        return jnp.mean(each(outputs, labels))

    return loss


def training_loss(model: nn.Module) -> TrainingLoss:
    """(params, batch_stats, images, labels) -> the mean loss and new statistics.

    Batch normalisation uses the batch. Keep the new statistics of a pass at the
    network's weights, never at perturbed ones. A network without statistics has an
    empty `batch_stats` and no argument `train`.
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
    """The first argument of a network's `apply`, with statistics if there are any."""
    statistics = {"batch_stats": batch_stats} if batch_stats else {}
    return {"params": params, **statistics}
