"""What is measured of a network while it trains, always on the unperturbed weights."""

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
_CHUNK = 2_000  # examples per call when a whole set is evaluated
CHUNK = 250  # and when it is differentiated twice

# The last argument of both, which may be left out: running statistics of batch
# normalisation, None or empty where there are none.
Means = Callable[..., tuple[float, float]]
MatvecAt = Callable[..., Matvec]


class Measurement(NamedTuple):
    """One look at a network.

    Attributes:
      train_loss: the mean over the training set.
      test_loss: of the test set.
      test_accuracy: fraction of the test set that is classified correctly; None for
        forecasts.
      held_loss: of what the data set holds out to choose by; None where it does not.
      lambda_max: λ_max of the Hessian of the training loss, on the first training
        images.
      lambda_max_residual: ‖Hv − λv‖ of that eigenpair.
      alignment: |cos| between the perturbation and that eigenvector, the mean over
        `ALIGNMENT_BATCHES` training batches; for plain SGD, of the gradient.
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

    A chunk at a time: on a CPU, convolutions of a few hundred images take half as long
    for each as those of a few thousand.
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
    """The top eigenpair of a Hessian, by products that the host asks for one by one.

    On a CPU, convolutions inside a compiled loop would be many times slower.

    Args:
      matvec: the product with the Hessian.
      params: a tree with the shapes of its vectors.
      start: where to begin, for example the eigenvector found some steps ago; None for
        a random vector.
      tol: of the residual, relative to the eigenvalue.

    Raises:
      FloatingPointError: if the Hessian is zero or not finite.
    """
    found = eigen.top_eigenpairs(matvec, params, 1, tol=tol, v0=start, host_loop=True)
    top = Eigenpair(*jax.tree.map(lambda x: x[0], found))
    if not (jnp.isfinite(top.residual) and top.eigenvalue):
        raise FloatingPointError(
            "λ_max is not found: the Hessian is zero or not finite"
        )
    return top


def make_means(model: nn.Module) -> Means:
    """Builds (params, images, labels, batch_stats) -> mean loss and accuracy.

    Of forecasts there is no accuracy: it is 0.
    """

    @jax.jit
    def totals(
        params: PyTree, images: jax.Array, labels: jax.Array, batch_stats: PyTree
    ) -> tuple[jax.Array, jax.Array]:
        """The summed loss and the number of correct answers."""
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
    """Builds what looks at a network: -> (`Measurement`, top eigenvector).

    Its arguments are (setup, state, start): `start` is where the search for the top
    eigenvector begins, None for anywhere. Loss, accuracy and Hessian are those of
    evaluation, by the running statistics where the network has any; the perturbation is
    that of training, but on images that are not augmented. A training loss that is not
    finite raises FloatingPointError.

    Args:
      model: the network.
      dataset: what it is trained on.
      batch_size: of its training.
      examples: the Hessian is that of the first so many training images.
      matvec_at: as `make_matvec` builds it, to be shared.
      tolerance: of λ_max's residual, relative to it.
      loss_examples: the training loss is that of the first so many; None for all.
      batches: for the alignment, the first ones of the order in which the state has the
        training images; 0 to leave it out, which makes it NaN.
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
        """|cos| between `top` and the perturbation from a batch."""
        setup = structure._replace(alpha=alpha)
        direction = methods.epsilon(setup, *batch_and_state)
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
    """The first `count` batches of an epoch, or all: indices, a row a batch."""
    used = len(order) // batch_size * batch_size
    return order[:used].reshape(-1, batch_size)[:count]
