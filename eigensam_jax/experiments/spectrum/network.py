"""The network whose Hessian `eigensam spectrum` looks at, trained."""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

from eigensam_jax.experiments import registry
from eigensam_jax.experiments.data.load import Dataset
from eigensam_jax.experiments.training import loop, measures, methods
from eigensam_jax.experiments.training.methods import Setup
from eigensam_jax.experiments.training.steps import TrainState

CHECKPOINTS = 10  # of a training, beside the one at its end


def train(
    chosen: argparse.Namespace,
    dataset: Dataset,
    saved: dict[str, Any] | None = None,
    keep: Callable[[int, dict[str, Any]], None] = lambda step, what: None,
) -> dict[str, Any]:
    """The network at the end of training.

    Its `params` and `batch_stats`, the `train_loss`, which is the mean cross-entropy
    over the training set, and the `test_accuracy`.

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
        arrays = {key: saved["trained"][key] for key in ("params", "batch_stats")}
        return {**saved["trained"], **jax.tree.map(jnp.asarray, arrays)}
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

    def measure(setup: Setup, state: TrainState, top: Any) -> tuple[Any, None]:
        del setup, top
        if int(state.step) < steps:
            return None, None
        params, stats = jax.tree.map(jnp.copy, (state.params, state.batch_stats))
        train_loss, _ = means(params, dataset.train_images, dataset.train_labels, stats)
        if not np.isfinite(train_loss):
            raise FloatingPointError(f"the training loss is {train_loss}")
        _, accuracy = means(params, dataset.test_images, dataset.test_labels, stats)
        end = {"train_loss": train_loss, "test_accuracy": accuracy}
        return {"params": params, "batch_stats": stats, **end}, None

    method = methods.named(chosen.optimizer, chosen.rho, chosen.alpha)
    run = loop.make_run(model, dataset, measure, settings)
    for point in run(method, chosen.seed, saved.get("progress")):
        if point.step < steps:
            progress = serialization.to_state_dict(point.progress)
            keep(point.step, {"progress": progress})
    trained: dict[str, Any] = point.measurement
    keep(steps, {"trained": trained})
    return trained
