"""What is measured of a network while it trains, always on the unperturbed weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from scipy.sparse import linalg

from eigensam_jax import hessian, perturbation, tree_math
from eigensam_jax.eigen import Eigenpair
from eigensam_jax.experiments.data import Dataset
from eigensam_jax.tree_math import PyTree

CURVATURE_EXAMPLES = 2_000
CURVATURE_TOLERANCE = 1e-3
ALIGNMENT_BATCHES = 8
_CHUNK = 2_000  # examples per call when a whole set is evaluated
_CURVATURE_CHUNK = 250  # and when it is differentiated twice

# The last argument of each, which may be left out: running statistics of batch
# normalisation, None or empty where there are none.
Loss = Callable[..., jax.Array]
Means = Callable[..., tuple[float, float]]
Product = Callable[..., jax.Array]
TopEigenpair = Callable[..., Eigenpair]
TrainingLoss = Callable[
    [PyTree, PyTree, jax.Array, jax.Array], tuple[jax.Array, PyTree]
]


class Measurement(NamedTuple):
    """One look at a network.

    Attributes:
      train_loss: mean cross-entropy over the training set.
      test_accuracy: fraction of the test set that is classified correctly.
      lambda_max: λ_max of the Hessian of the training loss, on the first
        `CURVATURE_EXAMPLES` training images.
      lambda_max_residual: ‖Hv − λv‖ of that eigenpair.
      alignment: |cos| between the perturbation and that eigenvector, the mean over
        `ALIGNMENT_BATCHES` training batches; for plain SGD, of the gradient.
    """

    train_loss: float
    test_accuracy: float
    lambda_max: float
    lambda_max_residual: float
    alignment: float


Measure = Callable[..., tuple[Measurement, jax.Array]]  # the same


def cross_entropy(model: nn.Module) -> Loss:
    """(params, images, labels, batch_stats) -> the mean cross-entropy of the batch.

    In evaluation: batch normalisation, where there is any, is by `batch_stats`.
    """

    def loss(
        params: PyTree, images: jax.Array, labels: jax.Array, batch_stats: PyTree = None
    ) -> jax.Array:
        logits: Any = model.apply(_variables(params, batch_stats), images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(losses)

    return loss


def training_loss(model: nn.Module) -> TrainingLoss:
    """(params, batch_stats, images, labels) -> the mean cross-entropy, new statistics.

    In training: batch normalisation is by the batch. Only of a pass at the weights of
    the network, not at perturbed ones, should the new running statistics be kept. A
    network without any has an empty `batch_stats`, and takes no argument `train`.
    """

    def loss(
        params: PyTree, batch_stats: PyTree, images: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, PyTree]:
        logits: Any
        if batch_stats:
            logits, moved = model.apply(
                _variables(params, batch_stats),
                images,
                train=True,
                mutable=["batch_stats"],
            )
            batch_stats = moved["batch_stats"]
        else:
            logits = model.apply({"params": params}, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(losses), batch_stats

    return loss


def _variables(params: PyTree, batch_stats: PyTree) -> dict[str, PyTree]:
    statistics = {"batch_stats": batch_stats} if batch_stats else {}
    return {"params": params, **statistics}


def make_product(loss: Loss) -> Product:
    """Builds (params, images, labels, v, batch_stats) -> ∇²loss·v, flat as v is.

    A chunk at a time: on a CPU, convolutions of a few hundred images take half as long
    for each as those of a few thousand.
    """

    @jax.jit
    def chunk_product(
        params: PyTree,
        images: jax.Array,
        labels: jax.Array,
        vector: jax.Array,
        batch_stats: PyTree = None,
    ) -> jax.Array:
        unravel = ravel_pytree(params)[1]
        value_fn = lambda p: len(images) * loss(p, images, labels, batch_stats)
        return ravel_pytree(hessian.hvp(value_fn, params, unravel(vector)))[0]

    def product(
        params: PyTree,
        images: jax.Array,
        labels: jax.Array,
        vector: jax.Array,
        batch_stats: PyTree = None,
    ) -> jax.Array:
        chunks = [
            chunk_product(
                params,
                images[i : i + _CURVATURE_CHUNK],
                labels[i : i + _CURVATURE_CHUNK],
                vector,
                batch_stats,
            )
            for i in range(0, len(images), _CURVATURE_CHUNK)
        ]
        return jnp.asarray(sum(chunks)) / len(images)

    return product


def make_top_eigenpair(loss: Loss, num_vectors: int = 20) -> TopEigenpair:
    """Builds (params, images, labels, start, batch_stats) -> ∇²loss's top `Eigenpair`.

    ARPACK's restarted Lanczos iteration runs on the host and asks the device for one
    Hessian-vector product at a time: on a CPU, convolutions inside a compiled loop
    would be many times slower. `start` is where to begin, for example the eigenvector
    found some steps ago; None for a random vector. Eigenvectors are flat arrays
    over the raveled parameters; the residual is at most about `CURVATURE_TOLERANCE`
    times the eigenvalue. `num_vectors` are held at a time: fewer are fewer products
    where `start` is good or the eigenvalue stands apart, and more where not.
    """
    product = make_product(loss)

    def top_eigenpair(
        params: PyTree,
        images: jax.Array,
        labels: jax.Array,
        start: jax.Array | None = None,
        batch_stats: PyTree = None,
    ) -> Eigenpair:
        size = sum(x.size for x in jax.tree.leaves(params))
        v0 = np.random.default_rng(0).normal(size=size)
        if start is not None:
            v0 = np.asarray(start, np.float64)

        def matvec(vector: np.ndarray) -> np.ndarray:
            flat = jnp.asarray(vector.reshape(size), jnp.float32)
            found = product(params, images, labels, flat, batch_stats)
            return np.asarray(found, np.float64)

        operator = linalg.LinearOperator((size, size), matvec, dtype=np.float64)
        try:
            values, vectors = linalg.eigsh(
                operator,
                k=1,
                which="LA",
                v0=v0,
                ncv=num_vectors,
                tol=CURVATURE_TOLERANCE,
            )
        except linalg.ArpackError as error:  # a Hessian of zeros, for one
            raise FloatingPointError(f"λ_max is not found: {error}") from error
        vector = vectors[:, 0]
        residual = np.linalg.norm(matvec(vector) - values[0] * vector)
        return Eigenpair(*map(jnp.asarray, (vector, values[0], residual)))

    return top_eigenpair


def make_means(model: nn.Module) -> Means:
    """Builds (params, images, labels, batch_stats) -> mean loss and accuracy."""

    @jax.jit
    def totals(
        params: PyTree, images: jax.Array, labels: jax.Array, batch_stats: PyTree
    ) -> tuple[jax.Array, jax.Array]:
        """The summed loss and the number of correct answers."""
        logits: Any = model.apply(_variables(params, batch_stats), images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.sum(), (logits.argmax(-1) == labels).sum()

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
    model: nn.Module, dataset: Dataset, batch_size: int, alpha: float
) -> Measure:
    """Builds what looks at a network: -> (`Measurement`, top eigenvector).

    Its arguments are (params, opt_state, order, start, batch_stats).

    `order` is the order of the training examples whose first batches measure the
    alignment; `start` is where the search for the top eigenvector begins. `alpha` is
    that of Eigen-SAM, whose eigenvector is looked up in `opt_state`. Loss, accuracy and
    Hessian are those of evaluation, by the running statistics `batch_stats` where the
    network has any; the perturbation is that of training, but on images that are not
    augmented. A training loss that is not
    finite raises FloatingPointError.
    """
    loss, means = training_loss(model), make_means(model)
    top_eigenpair = make_top_eigenpair(cross_entropy(model))
    images, labels = dataset.train_images, dataset.train_labels

    @jax.jit
    def cosine(
        params: PyTree,
        opt_state: optax.OptState,
        images: jax.Array,
        labels: jax.Array,
        top: jax.Array,
        batch_stats: PyTree = None,
    ) -> jax.Array:
        """|cos| between `top` and the perturbation by the eigenvector in the state."""
        direction, _ = jax.grad(loss, has_aux=True)(params, batch_stats, images, labels)
        eigenvector = optax.tree.get(opt_state, "eigenvector")
        if eigenvector is not None:
            added = alpha * (optax.tree.get(opt_state, "eigenvalue") >= 0)
            direction = perturbation.eigen_sam(
                direction, eigenvector, 1.0, added
            ).epsilon
        product = jnp.abs(jnp.sum(ravel_pytree(direction)[0] * top))
        return product * tree_math.safe_inverse(tree_math.norm(direction))

    def measure(
        params: PyTree,
        opt_state: optax.OptState,
        order: jax.Array,
        start: jax.Array | None,
        batch_stats: PyTree = None,
    ) -> tuple[Measurement, jax.Array]:
        train_loss, _ = means(params, images, labels, batch_stats)
        if not np.isfinite(train_loss):
            raise FloatingPointError(f"the training loss is {train_loss}")
        few = slice(CURVATURE_EXAMPLES)
        top = top_eigenpair(params, images[few], labels[few], start, batch_stats)
        batches = order[: len(order) // batch_size * batch_size].reshape(-1, batch_size)
        cosines = [
            float(
                cosine(
                    params,
                    opt_state,
                    images[batch],
                    labels[batch],
                    top.eigenvector,
                    batch_stats,
                )
            )
            for batch in batches[:ALIGNMENT_BATCHES]
        ]
        _, accuracy = means(
            params, dataset.test_images, dataset.test_labels, batch_stats
        )
        return Measurement(
            train_loss,
            accuracy,
            float(top.eigenvalue),
            float(top.residual),
            float(np.mean(cosines)),
        ), top.eigenvector

    return measure
