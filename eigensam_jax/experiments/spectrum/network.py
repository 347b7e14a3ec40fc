"""The network whose Hessian `eigensam spectrum` looks at, trained."""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

from eigensam_jax.experiments import registry
from eigensam_jax.experiments.data.load import Dataset
from eigensam_jax.experiments.training import loop, measures, methods
from eigensam_jax.experiments.training.methods import Setup
from eigensam_jax.experiments.training.steps import TrainState
from eigensam_jax.tree_math import PyTree

CHECKPOINTS = 10  # of a training, beside the one at its end


class Trained(NamedTuple):
    """A network after training.

    Attributes:
      params: its parameters.
      train_loss: mean cross-entropy over the training set.
      test_accuracy: fraction of the test set that is classified correctly.
      batch_stats: running statistics of batch normalisation; empty where there is none.
    """

    params: PyTree
    train_loss: float
    test_accuracy: float
    batch_stats: PyTree


def train(
    chosen: argparse.Namespace,
    dataset: Dataset,
    saved: dict[str, Any] | None = None,
    keep: Callable[[int, dict[str, Any]], None] = lambda step, what: None,
) -> Trained:
    """The network at the end of training.

    Args:
      chosen: the options, see `eigensam spectrum --help`.
      dataset: what it is trained on.
      saved: what was kept of an interrupted training, to go on with.
      keep: called on the way and at the end, with the steps so far and what there is
        to go on with.

    Raises:
      DivergedError: if the loss is not finite.
    """
    saved = saved or {}
    if "trained" in saved:
        trained = Trained(**saved["trained"])
        arrays = jax.tree.map(jnp.asarray, (trained.params, trained.batch_stats))
        return trained._replace(params=arrays[0], batch_stats=arrays[1])
    steps = loop.num_steps(dataset, chosen.batch_size, chosen.epochs)
    settings = loop.Settings(
        *(steps, chosen.batch_size, chosen.learning_rate),
        looks=loop.evaluation_steps(steps, CHECKPOINTS + 1)[1:],
        augment=registry.augmentation(chosen.dataset, chosen.augment),
        base=chosen.base_optimizer,
        weight_decay=chosen.weight_decay,
    )
    model = registry.model(chosen.model, dataset.num_classes)
    means = measures.make_means(model)

    def measure(
        setup: Setup, state: TrainState, top: Any
    ) -> tuple[Trained | None, None]:
        del setup, top
        if int(state.step) < steps:
            return None, None
        params, stats = jax.tree.map(jnp.copy, (state.params, state.batch_stats))
        train_loss, _ = means(params, dataset.train_images, dataset.train_labels, stats)
        if not np.isfinite(train_loss):
            raise FloatingPointError(f"the training loss is {train_loss}")
        _, accuracy = means(params, dataset.test_images, dataset.test_labels, stats)
        return Trained(params, train_loss, accuracy, stats), None

    method = methods.named(chosen.optimizer, chosen.rho, chosen.alpha)
    run = loop.make_run(model, dataset, measure, settings)
    for point in run(method, chosen.seed, saved.get("progress")):
        if point.step < steps:
            progress = serialization.to_state_dict(point.progress)
            keep(point.step, {"progress": progress})
    trained = cast(Trained, point.measurement)
    keep(steps, {"trained": trained._asdict()})
    return trained
