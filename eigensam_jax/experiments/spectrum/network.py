"""The network whose Hessian `eigensam spectrum` looks at, trained."""

from collections.abc import Callable
from pathlib import Path
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


class Config(NamedTuple):
    """The options of the command; see `eigensam spectrum --help`."""

    dataset: str
    data_dir: Path | None
    model: str
    optimizer: str
    seed: int
    epochs: int
    batch_size: int
    learning_rate: float
    rho: float
    alpha: float
    augment: bool
    k: int
    num_matvecs: int
    num_samples: int
    examples: int | None
    base_optimizer: str
    weight_decay: float
    out: Path


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
    config: Config,
    dataset: Dataset,
    saved: dict[str, Any] | None = None,
    keep: Callable[[int, dict[str, Any]], None] = lambda step, what: None,
) -> Trained:
    """The network at the end of training.

    Args:
      config: how it is trained.
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
    steps = loop.num_steps(dataset, config.batch_size, config.epochs)
    settings = loop.Settings(
        *(steps, config.batch_size, config.learning_rate),
        looks=loop.evaluation_steps(steps, CHECKPOINTS + 1)[1:],
        augment=registry.augmentation(config.dataset, config.augment),
        base=config.base_optimizer,
        weight_decay=config.weight_decay,
    )
    model = registry.model(config.model, dataset.num_classes)
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

    method = methods.named(config.optimizer, config.rho, config.alpha)
    run = loop.make_run(model, dataset, measure, settings)
    for point in run(method, config.seed, saved.get("progress")):
        if point.step < steps:
            progress = serialization.to_state_dict(point.progress)
            keep(point.step, {"progress": progress})
    trained = cast(Trained, point.measurement)
    keep(steps, {"trained": trained._asdict()})
    return trained
