"""What `eigensam track` measures: how well v follows the top eigenvector."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from eigensam_jax import hessian, tree_math
from eigensam_jax.experiments.data.load import Dataset
from eigensam_jax.experiments.training import losses, measures, methods
from eigensam_jax.experiments.training import steps as training_steps
from eigensam_jax.experiments.training.loop import Point
from eigensam_jax.experiments.training.methods import Setup
from eigensam_jax.experiments.training.steps import TrainState
from eigensam_jax.tree_math import PyTree

_UNSEEN = 0.15  # the share of steps before the first look
_MEASURED = ("train_loss", "test_accuracy", "lambda_max", "lambda_max_residual")

Look = dict[str, Any]
Measure = Callable[[Setup, TrainState, Any], tuple[Look, PyTree]]


def look_steps(steps: int, count: int) -> tuple[int, ...]:
    """The steps at which v is measured, from 15% of the run to the last step."""
    first, last = round(_UNSEEN * steps), steps - 1
    spread = np.linspace(min(first, last), last, count)
    return tuple(sorted({round(step) for step in spread}))


def make_tracked(
    model: nn.Module, dataset: Dataset, batch_size: int, steps: int
) -> Callable[[Setup, TrainState], Any]:
    """Builds (setup, state) -> the tracker's state that the next step perturbs by.

    If that step refreshes it, the refresh is made here too, on the same batch.
    """
    loss = losses.evaluation_loss(model)
    images, labels = dataset.train_images, dataset.train_labels
    per_epoch = len(labels) // batch_size

    @partial(jax.jit, static_argnums=(0, 1))
    def refreshed(
        structure: Setup,
        shuffle: bool,
        state: TrainState,
        images: jax.Array,
        labels: jax.Array,
    ) -> Any:
        if shuffle:
            _, order = training_steps.shuffled(state.key, state.order)
            state = state._replace(order=order)
        batch = training_steps.next_batch(state, batch_size)
        value_fn = lambda params: loss(params, images[batch], labels[batch])
        matvec = hessian.matvec(jax.grad(value_fn), state.params)
        link = state.opt_state[0]
        tracker = methods.make_tracker(structure)
        matvec.unroll = True  # type: ignore[attr-defined]
        return tracker.refresh(link.tracker, matvec)

    def tracked(setup: Setup, state: TrainState) -> Any:
        step = int(state.step)
        if setup.num_products and setup.refreshes(step, steps):
            shuffle = step % per_epoch == 0
            return refreshed(setup.structure, shuffle, state, images, labels)
        return state.opt_state[0].tracker

    return tracked


def make_measure(
    model: nn.Module, dataset: Dataset, batch_size: int, steps: int
) -> Measure:
    """Builds (setup, state, start) -> a look at a run, and the top eigenvector.

    A look has the `Measurement` before the next step, without alignment, with λ_max on
    the first `measures.CURVATURE_EXAMPLES` images. If the step perturbs by a v, it also
    has `ratio`, vᵀHv/λ_max; `cosine`, |cos| of v and the top eigenvector; and, from the
    tracker on batches, `tracked_eigenvalue` and `tracked_residual` (None if unknown).

    The eigenvector search begins at `start`. FloatingPointError is raised if the
    training loss is not finite or the search finds nothing.
    """
    matvec_at = measures.make_matvec(losses.evaluation_loss(model))
    few = slice(measures.CURVATURE_EXAMPLES)
    images, labels = dataset.train_images[few], dataset.train_labels[few]
    tracked_by = make_tracked(model, dataset, batch_size, steps)
    seen = measures.make_measure(
        *(model, dataset, batch_size, measures.CURVATURE_EXAMPLES),
        matvec_at=matvec_at,
        batches=0,
    )

    def measure(
        setup: Setup, state: TrainState, start: PyTree | None
    ) -> tuple[Look, PyTree]:
        found, top = seen(setup, state, start)
        look: Look = {name: getattr(found, name) for name in _MEASURED}
        if int(state.step) < steps and setup.tracker:
            tracked = tracked_by(setup, state)
            v = tracked.eigenvector
            product = matvec_at(state.params, images, labels)(v)
            look["ratio"] = float(tree_math.vdot(v, product)) / found.lambda_max
            look["cosine"] = float(jnp.abs(tree_math.vdot(v, top)))
            for key in ("eigenvalue", "residual"):
                known = float(getattr(tracked, key))
                look[f"tracked_{key}"] = known if np.isfinite(known) else None
        return look, top

    return measure


def summarise(points: list[Point[Look]]) -> dict[str, Any]:
    """The figures of a run for `results.json`: its end, means of its looks, a curve."""
    *looks, end = ({"radius": x.radius, **x.measurement} for x in points)
    if not looks:
        return end
    ratios = [look["ratio"] for look in looks]
    return {
        **end,
        "ratio": float(np.mean(ratios)),
        "worst_ratio": min(ratios),
        "cosine": float(np.mean([look["cosine"] for look in looks])),
        "curves": {"step": [point.step for point in points[:-1]], "ratio": ratios},
    }
