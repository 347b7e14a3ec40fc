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

Loss = Callable[[PyTree, jax.Array, jax.Array], jax.Array]
Means = Callable[[PyTree, jax.Array, jax.Array], tuple[float, float]]
Product = Callable[[PyTree, jax.Array, jax.Array, jax.Array], jax.Array]
TopEigenpair = Callable[[PyTree, jax.Array, jax.Array, jax.Array | None], Eigenpair]


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


Measure = Callable[
    [PyTree, optax.OptState, jax.Array, jax.Array | None],
    tuple[Measurement, jax.Array],
]


def cross_entropy(model: nn.Module) -> Loss:
    """(params, images, labels) -> the mean cross-entropy of the batch."""

    def loss(params: PyTree, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(losses)

    return loss


def make_product(loss: Loss) -> Product:
    """Builds (params, images, labels, v) -> ∇²loss·v, both flat, a chunk at a time.

    On a CPU, convolutions of a few hundred images take half as long for each as those
    of a few thousand.
    """

    @jax.jit
    def chunk_product(
        params: PyTree, images: jax.Array, labels: jax.Array, vector: jax.Array
    ) -> jax.Array:
        unravel = ravel_pytree(params)[1]
        value_fn = lambda p: len(images) * loss(p, images, labels)
        return ravel_pytree(hessian.hvp(value_fn, params, unravel(vector)))[0]

    def product(
        params: PyTree, images: jax.Array, labels: jax.Array, vector: jax.Array
    ) -> jax.Array:
        chunks = [
            chunk_product(
                params,
                images[i : i + _CURVATURE_CHUNK],
                labels[i : i + _CURVATURE_CHUNK],
                vector,
            )
            for i in range(0, len(images), _CURVATURE_CHUNK)
        ]
        return jnp.asarray(sum(chunks)) / len(images)

    return product


def make_top_eigenpair(loss: Loss, num_vectors: int = 20) -> TopEigenpair:
    """Builds (params, images, labels, start) -> the top `Eigenpair` of ∇²loss.

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
    ) -> Eigenpair:
        size = sum(x.size for x in jax.tree.leaves(params))
        v0 = np.random.default_rng(0).normal(size=size)
        if start is not None:
            v0 = np.asarray(start, np.float64)

        def matvec(vector: np.ndarray) -> np.ndarray:
            flat = jnp.asarray(vector.reshape(size), jnp.float32)
            return np.asarray(product(params, images, labels, flat), np.float64)

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
    """Builds (params, images, labels) -> the mean loss and the accuracy."""

    @jax.jit
    def totals(
        params: PyTree, images: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The summed loss and the number of correct answers."""
        logits: Any = model.apply({"params": params}, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.sum(), (logits.argmax(-1) == labels).sum()

    def means(params: PyTree, x: jax.Array, y: jax.Array) -> tuple[float, float]:
        chunks = [
            totals(params, x[i : i + _CHUNK], y[i : i + _CHUNK])
            for i in range(0, len(x), _CHUNK)
        ]
        value, correct = np.sum(jax.device_get(chunks), axis=0)
        return float(value) / len(x), float(correct) / len(x)

    return means


def make_measure(
    model: nn.Module, dataset: Dataset, batch_size: int, alpha: float
) -> Measure:
    """Builds (params, opt_state, order, start) -> (`Measurement`, top eigenvector).

    `order` is the order of the training examples whose first batches measure the
    alignment; `start` is where the search for the top eigenvector begins. `alpha` is
    that of Eigen-SAM, whose eigenvector is looked up in `opt_state`. A training loss
    that is not finite raises FloatingPointError.
    """
    loss = cross_entropy(model)
    means, top_eigenpair = make_means(model), make_top_eigenpair(loss)
    images, labels = dataset.train_images, dataset.train_labels

    @jax.jit
    def cosine(
        params: PyTree,
        opt_state: optax.OptState,
        images: jax.Array,
        labels: jax.Array,
        top: jax.Array,
    ) -> jax.Array:
        """|cos| between `top` and the perturbation by the eigenvector in the state."""
        direction = jax.grad(loss)(params, images, labels)
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
    ) -> tuple[Measurement, jax.Array]:
        train_loss, _ = means(params, images, labels)
        if not np.isfinite(train_loss):
            raise FloatingPointError(f"the training loss is {train_loss}")
        few = slice(CURVATURE_EXAMPLES)
        top = top_eigenpair(params, images[few], labels[few], start)
        batches = order[: len(order) // batch_size * batch_size].reshape(-1, batch_size)
        cosines = [
            float(
                cosine(params, opt_state, images[batch], labels[batch], top.eigenvector)
            )
            for batch in batches[:ALIGNMENT_BATCHES]
        ]
        _, accuracy = means(params, dataset.test_images, dataset.test_labels)
        return Measurement(
            train_loss,
            accuracy,
            float(top.eigenvalue),
            float(top.residual),
            float(np.mean(cosines)),
        ), top.eigenvector

    return measure
