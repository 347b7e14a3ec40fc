"""Early stopping: the weights that are best on a validation set."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

from eigensam_jax.experiments.data.load import Dataset
from eigensam_jax.experiments.training.measures import Means, Measure, Measurement
from eigensam_jax.experiments.training.methods import Setup
from eigensam_jax.experiments.training.steps import TrainState


class HeldLoss(NamedTuple):
    """A look at a network on the way.

    Attributes:
      held_loss: the validation loss.
    """

    held_loss: float


def at_best(
    measure: Measure, means: Means, dataset: Dataset, steps: int
) -> Callable[..., tuple[Measurement | HeldLoss, dict[str, Any]]]:
    """`measure`, of the state with the lowest validation loss, at the last of `steps`.

    Each look finds the validation loss, those before the last that alone, so that
    there may be many. FloatingPointError is raised if it is not finite.
    """

    def measured(
        setup: Setup, state: TrainState, best: dict[str, Any] | None
    ) -> tuple[Measurement | HeldLoss, dict[str, Any]]:
        held = dataset.held_images, dataset.held_labels
        loss, _ = means(state.params, *held, state.batch_stats)
        if not np.isfinite(loss):
            raise FloatingPointError(f"the validation loss is {loss}")
        if best is None or loss < best["loss"]:
            best = {"loss": loss, "state": jax.tree.map(jnp.copy, state)}
        elif isinstance(best["state"], dict):  # from a checkpoint
            kept = serialization.from_state_dict(state, best["state"])
            best = {**best, "state": jax.tree.map(jnp.asarray, kept)}
        if int(state.step) < steps:
            return HeldLoss(loss), best
        found, _ = measure(setup, best["state"], None)
        return found._replace(held_loss=loss), best

    return measured
