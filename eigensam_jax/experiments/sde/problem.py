"""The problem of `eigensam sde`: a small smooth network on a few batches."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from eigensam_jax.eigen import Eigenpair
from eigensam_jax.experiments.data.load import Dataset
from eigensam_jax.experiments.models.small import MLP
from eigensam_jax.experiments.training import losses
from eigensam_jax.sde import _equation
from eigensam_jax.tree_math import PyTree

NUM_BATCHES = 16
BATCH_SIZE = 64
WIDTH = 32
TOLERANCE = 1e-4  # of λ_max's residual, relative to it


class Problem(NamedTuple):
    """The functions and data of a problem.

    Attributes:
      init: seed -> parameters.
      value_fn: (params, batch) -> the batch's mean cross-entropy.
      batches: images and labels, with a leading axis over `NUM_BATCHES` batches.
      whole: images and labels of all batches.
      top_eigenpair: params -> the top eigenpair over all batches.
    """

    init: Callable[[int], PyTree]
    value_fn: Callable[[PyTree, PyTree], jax.Array]
    batches: PyTree
    whole: tuple[jax.Array, jax.Array]
    top_eigenpair: Callable[[PyTree], Eigenpair]


def make_problem(dataset: Dataset) -> Problem:
    """A tanh network on the first `NUM_BATCHES` · `BATCH_SIZE` training images.

    Third derivatives of a ReLU network would ignore its kinks.
    """
    few = slice(NUM_BATCHES * BATCH_SIZE)
    whole = dataset.train_images[few], dataset.train_labels[few]
    model = MLP(dataset.num_classes, WIDTH, jnp.tanh)
    loss = losses.evaluation_loss(model)
    batches = jax.tree.map(
        lambda x: x.reshape(NUM_BATCHES, BATCH_SIZE, *x.shape[1:]), whole
    )

    def init(seed: int) -> PyTree:
        return model.init(jax.random.key(seed), whole[0][:1])["params"]

    def value_fn(params: PyTree, batch: PyTree) -> jax.Array:
        return loss(params, *batch)

    @jax.jit
    def top_eigenpair(params: PyTree) -> Eigenpair:
        return _equation.top_eigenpair(value_fn, params, batches, TOLERANCE)

    return Problem(init, value_fn, batches, whole, top_eigenpair)
