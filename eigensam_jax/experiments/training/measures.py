"""Measurements of a network in training, always at the unperturbed weights."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from eigensam_jax import eigen, hessian, tree_math
from eigensam_jax.eigen import Eigenpair
from eigensam_jax.experiments.data.load import Dataset
from eigensam_jax.experiments.training import losses, methods
from eigensam_jax.experiments.training.losses import Loss
from eigensam_jax.experiments.training.methods import Setup
from eigensam_jax.experiments.training.steps import TrainState
from eigensam_jax.hessian import Matvec
from eigensam_jax.tree_math import PyTree

CURVATURE_EXAMPLES = 2_000
CURVATURE_TOLERANCE = 1e-3
ALIGNMENT_BATCHES = 8
_CHUNK = 2_000  # examples per call, in evaluation
CHUNK = 250  # and in Hessian-vector products

# The last argument of both is the optional `batch_stats` of `losses.Loss`.
Means = Callable[..., tuple[float, float]]
MatvecAt = Callable[..., Matvec]


class Measurement(NamedTuple):
    """One look at a network.

    Attributes:
      train_loss: the mean over the training set, or over its first images.
      test_loss: the mean over the test set.
      test_accuracy: the fraction classified correctly; None where an example has
        several labels.
      held_loss: on the data set's own held-out examples; None if it has none.
      lambda_max: of the training loss's Hessian on the first training images.
      lambda_max_residual: ‖Hv − λv‖ of that eigenpair, by the Lanczos recurrence: too
        small below 1e-5·λ.
      alignment: |cos| of v and the perturbation (for SGD, the gradient), the mean over
        `ALIGNMENT_BATCHES` training batches.
    """

    train_loss: float
    test_loss: float
    test_accuracy: float | None
    held_loss: float | None
    lambda_max: float
    lambda_max_residual: float
    alignment: float


Measure = Callable[..., tuple[Measurement, PyTree]]


def make_matvec(loss: Loss) -> MatvecAt:
    """Builds (params, images, labels, batch_stats) -> the product with ∇²loss.

    It works in chunks. On a CPU, convolutions take half the time per image for a few
    hundred images that they take for a few thousand.
    """

    @partial(jax.jit, donate_argnums=0)
    def add_chunk(
        total: PyTree,
        params: PyTree,
        images: jax.Array,
        labels: jax.Array,
        batch_stats: PyTree,
        share: jax.Array,
        vector: PyTree,
    ) -> PyTree:
        value_fn = lambda p: loss(p, images, labels, batch_stats)
        return tree_math.add_scaled(total, share, hessian.hvp(value_fn, params, vector))

    def at(
        params: PyTree, images: jax.Array, labels: jax.Array, batch_stats: PyTree = None
    ) -> Matvec:
        chunks = [
            (images[i : i + CHUNK], labels[i : i + CHUNK], batch_stats)
            for i in range(0, len(images), CHUNK)
        ]
        shares = [jnp.float32(len(chunk[0]) / len(images)) for chunk in chunks]

        def matvec(vector: PyTree) -> PyTree:
            total = tree_math.zeros_like(vector)
            for chunk, share in zip(chunks, shares, strict=True):
                total = add_chunk(total, params, *chunk, share, vector)
            return total

        return matvec

    return at


def top_eigenpair(matvec: Matvec, params: PyTree, start: Any, tol: float) -> Eigenpair:
    """The top eigenpair of a Hessian, by products in a loop on the host.

    On a CPU, convolutions in a compiled loop would be many times slower. `start` is the
    first vector, None for a random one; `tol` is that of the residual over the
    eigenvalue.

    Raises:
      FloatingPointError: if the Hessian is zero or not finite.
    """
    found = eigen.top_eigenpairs(matvec, params, 1, tol=tol, v0=start, host_loop=True)
    top: Eigenpair = _first(found)
    if not (jnp.isfinite(top.residual) and top.eigenvalue):
        raise FloatingPointError(
            "λ_max is not found: the Hessian is zero or not finite"
        )
    return top


@jax.jit
def _first(pairs: Eigenpair) -> Eigenpair:
    return Eigenpair(*jax.tree.map(lambda x: x[0], pairs))


def make_means(model: nn.Module) -> Means:
    """(params, images, labels, batch_stats) -> loss, accuracy (0: several labels)."""

    @jax.jit
    def totals(
        params: PyTree, images: jax.Array, labels: jax.Array, batch_stats: PyTree
    ) -> tuple[jax.Array, jax.Array]:
        logits: Any = model.apply(losses.variables(params, batch_stats), images)
        is_right = logits.argmax(-1) == labels if labels.ndim == 1 else jnp.zeros(())
        return losses.each(logits, labels).sum(), is_right.sum()

    def means(
        params: PyTree, x: jax.Array, y: jax.Array, batch_stats: PyTree = None
    ) -> tuple[float, float]:
        chunks = [
            totals(params, x[i : i + _CHUNK], y[i : i + _CHUNK], batch_stats)
            for i in range(0, len(x), _CHUNK)
        ]
        value, correct = np.sum(jax.device_get(chunks), axis=0)
        return float(value) / len(x), float(correct) / len(x)

    return means


def make_measure(
    model: nn.Module,
    dataset: Dataset,
    batch_size: int,
    examples: int,
    *,
    matvec_at: MatvecAt | None = None,
    tolerance: float = CURVATURE_TOLERANCE,
    loss_examples: int | None = None,
    batches: int = ALIGNMENT_BATCHES,
) -> Measure:
    """Builds (setup, state, start) -> a `Measurement` and the top eigenvector.

    `start` is where the eigenvector search begins, or None. Loss, accuracy and Hessian
    are those of evaluation mode; the perturbation is that of training mode, without
    augmentation. FloatingPointError is raised if the training loss is not finite.

    Args:
      model: the network.
      dataset: what it is trained on.
      batch_size: of its training.
      examples: the number of training images for the Hessian.
      matvec_at: a result of `make_matvec`, to share its programs.
      tolerance: of λ_max's residual, relative to λ_max.
      loss_examples: the number of training images for the loss; None for all.
      batches: the number of training batches for the alignment, which is NaN for 0.
    """
    loss, means = losses.training_loss(model), make_means(model)
    matvec_at = matvec_at or make_matvec(losses.evaluation_loss(model))
    images, labels = dataset.train_images, dataset.train_labels
    few = slice(examples)

    gradient = jax.jit(jax.grad(loss, has_aux=True))

    @partial(jax.jit, static_argnums=0)
    def cosine(
        structure: Setup, alpha: jax.Array, top: PyTree, *batch_and_state: PyTree
    ) -> jax.Array:
        setup = structure._replace(alpha=alpha)
        direction = methods.perturbation_direction(setup, *batch_and_state)
        along = jnp.abs(tree_math.vdot(direction, top))
        return along * tree_math.safe_inverse(tree_math.norm(direction))

    def measure(
        setup: Setup, state: TrainState, start: PyTree | None
    ) -> tuple[Measurement, PyTree]:
        params, stats = state.params, state.batch_stats
        seen = slice(loss_examples)
        train_loss, _ = means(params, images[seen], labels[seen], stats)
        if not np.isfinite(train_loss):
            raise FloatingPointError(f"the training loss is {train_loss}")
        matvec = matvec_at(params, images[few], labels[few], stats)
        top = top_eigenpair(matvec, params, start, tolerance)
        known = setup.structure, jnp.float32(setup.alpha), top.eigenvector
        cosines = [
            float(cosine(*known, grads, params, state.opt_state))
            for chosen in first_batches(state.order, batch_size, batches)
            for grads, _ in [gradient(params, stats, images[chosen], labels[chosen])]
        ]
        test_loss, accuracy = means(
            params, dataset.test_images, dataset.test_labels, stats
        )
        held_loss = None
        if dataset.held_images is not None:
            held_loss, _ = means(
                params, dataset.held_images, dataset.held_labels, stats
            )
        return Measurement(
            train_loss,
            test_loss,
            accuracy if labels.ndim == 1 else None,
            held_loss,
            float(top.eigenvalue),
            float(top.residual),
            float(np.mean(cosines)) if cosines else math.nan,
        ), top.eigenvector

    return measure


def first_batches(order: jax.Array, batch_size: int, count: int) -> jax.Array:
    """Indices of the first `count` batches of an epoch (or of all), one row each."""
    used = len(order) // batch_size * batch_size
    return order[:used].reshape(-1, batch_size)[:count]
