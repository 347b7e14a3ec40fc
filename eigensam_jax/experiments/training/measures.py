"""What is measured of a network while it trains, always on the unperturbed weights."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from scipy.sparse import linalg

from eigensam_jax import hessian, tree_math
from eigensam_jax.eigen import Eigenpair
from eigensam_jax.experiments.data.load import Dataset
from eigensam_jax.experiments.training import losses, methods
from eigensam_jax.experiments.training.losses import Loss
from eigensam_jax.experiments.training.methods import Method
from eigensam_jax.experiments.training.steps import TrainState
from eigensam_jax.tree_math import PyTree

CURVATURE_EXAMPLES = 2_000
CURVATURE_TOLERANCE = 1e-3
ALIGNMENT_BATCHES = 8
_CHUNK = 2_000  # examples per call when a whole set is evaluated
_CURVATURE_CHUNK = 250  # and when it is differentiated twice

# The last argument of each, which may be left out: running statistics of batch
# normalisation, None or empty where there are none.
Means = Callable[..., tuple[float, float]]
Product = Callable[..., jax.Array]
TopEigenpair = Callable[..., Eigenpair]


class Measurement(NamedTuple):
    """One look at a network.

    Attributes:
      train_loss: mean cross-entropy over the training set.
      test_accuracy: fraction of the test set that is classified correctly.
      lambda_max: λ_max of the Hessian of the training loss, on the first training
        images.
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


def make_top_eigenpair(
    loss: Loss, num_vectors: int = 20, tolerance: float = CURVATURE_TOLERANCE
) -> TopEigenpair:
    """Builds (params, images, labels, start, batch_stats) -> ∇²loss's top `Eigenpair`.

    ARPACK's restarted Lanczos iteration runs on the host and asks the device for one
    Hessian-vector product at a time: on a CPU, convolutions inside a compiled loop
    would be many times slower. `start` is where to begin, for example the eigenvector
    found some steps ago; None for a random vector. Eigenvectors are flat arrays
    over the raveled parameters; the residual is at most about `tolerance` times the
    eigenvalue. `num_vectors` are held at a time: fewer are fewer products where `start`
    is good or the eigenvalue stands apart, and more where not.
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
                tol=tolerance,
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
        logits: Any = model.apply(losses.variables(params, batch_stats), images)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return each.sum(), (logits.argmax(-1) == labels).sum()

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
    top_eigenpair: TopEigenpair | None = None,
    loss_examples: int | None = None,
) -> Measure:
    """Builds what looks at a network: -> (`Measurement`, top eigenvector).

    Its arguments are (method, state, start): `start` is where the search for the top
    eigenvector begins, None for anywhere. The Hessian is that of the first `examples`
    training images, its eigenpair by `top_eigenpair`, as `make_top_eigenpair` builds
    it; the training loss, that of the first `loss_examples`, by default of all. The
    alignment is measured on the first batches of the order in which the state has the
    training images. Loss, accuracy and Hessian are those of evaluation, by the
    running statistics where the network has any; the perturbation is that of training,
    but on images that are not augmented. A training loss that is not finite raises
    FloatingPointError.
    """
    loss, means = losses.training_loss(model), make_means(model)
    top_eigenpair = top_eigenpair or make_top_eigenpair(losses.cross_entropy(model))
    images, labels = dataset.train_images, dataset.train_labels
    few = slice(examples)

    @partial(jax.jit, static_argnums=0)
    def cosine(
        structure: Method,
        alpha: jax.Array,
        state: TrainState,
        batch: tuple[jax.Array, jax.Array],
        top: jax.Array,
    ) -> jax.Array:
        """|cos| between `top` and the perturbation from a batch."""
        gradient = jax.grad(lambda *args: loss(*args)[0])
        grads = gradient(state.params, state.batch_stats, *batch)
        direction = methods.epsilon(
            structure._replace(alpha=alpha), grads, state.params, state.opt_state
        )
        product = jnp.abs(jnp.sum(ravel_pytree(direction)[0] * top))
        return product * tree_math.safe_inverse(tree_math.norm(direction))

    def measure(
        method: Method, state: TrainState, start: jax.Array | None
    ) -> tuple[Measurement, jax.Array]:
        train_loss, _ = means(
            *(state.params, images[:loss_examples], labels[:loss_examples]),
            state.batch_stats,
        )
        if not np.isfinite(train_loss):
            raise FloatingPointError(f"the training loss is {train_loss}")
        top = top_eigenpair(
            state.params, images[few], labels[few], start, state.batch_stats
        )
        used = len(state.order) // batch_size * batch_size
        batches = state.order[:used].reshape(-1, batch_size)[:ALIGNMENT_BATCHES]
        cosines = [
            float(
                cosine(
                    method.structure,
                    jnp.float32(method.alpha),
                    state,
                    (images[batch], labels[batch]),
                    top.eigenvector,
                )
            )
            for batch in batches
        ]
        _, accuracy = means(
            state.params, dataset.test_images, dataset.test_labels, state.batch_stats
        )
        return Measurement(
            train_loss,
            accuracy,
            float(top.eigenvalue),
            float(top.residual),
            float(np.mean(cosines)),
        ), top.eigenvector

    return measure
